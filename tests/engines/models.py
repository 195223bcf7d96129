"""The models that the engines are tried with: tiny bases of each family, and the real base."""

from typing import Any

WINDOW = {"sliding_window": 8}
TIED = {"tie_word_embeddings": True}
# Wide heads show which attention scale is used.
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "hidden_activation": "gelu_pytorch_tanh", **WINDOW, **TIED}
GLM = {"head_dim": 16, "rms_norm_eps": 1e-5}
# Model type, or model type and a word about the base -> fields of its config, where the defaults do not fit.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": TIED,
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "smollm3": {},
    "mistral": {"sliding_window": None},
    "gemma": {"head_dim": 16, **TIED},
    "gemma2": GEMMA,
    "gemma2-27b": {**GEMMA, "query_pre_attn_scalar": 16, "num_hidden_layers": 41},
    "gemma3_text": {**GEMMA, "tie_word_embeddings": False},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 0.5, "embedding_multiplier": 2.0},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "apertus": {},
    "arcee": {},
    "cohere": TIED,
    "cohere2": {**WINDOW, **TIED, "head_dim": 16},
    "ernie4_5": {"head_dim": 16},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    "exaone4-deep": {**WINDOW, "num_hidden_layers": 59},
    "glm": GLM,
    "glm4": GLM,
    "gpt_neox": {"num_key_value_heads": 4},
    "hunyuan_v1_dense": {"head_dim": 16},
    "nemotron": {},
    "phi": {"intermediate_size": 256, "num_key_value_heads": 4},
    "phi3": {},
    "seed_oss": {"head_dim": 16},
    "stablelm": {},
    "starcoder2": {},
}
# Bases whose exports are another model in llama.cpp, or none at all. The export must warn.
DIFFERENT: dict[str, dict[str, Any]] = {
    "gemma-head": FAMILIES["gemma"],
    "gemma2-head": GEMMA,
    "gemma2-order": {**GEMMA, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "gemma2-46": {**GEMMA, "num_hidden_layers": 41},
    "gemma3_text-27b": {**GEMMA, "query_pre_attn_scalar": 16},
    "olmo2-tied": TIED,
    "cohere-head": FAMILIES["cohere"],
    "cohere2-head": FAMILIES["cohere2"],
    "exaone4-windows": WINDOW,
    "mistral-windows": WINDOW,
    "phi3-windows": WINDOW,
    "qwen2-windows": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3-windows": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1, "head_dim": 16},
    "starcoder2-windows": WINDOW,
    "smollm3-positions": {"no_rope_layers": [1, 0, 1]},
    "glm-theta": {**GLM, "rope_theta": 1e6},
    "phi-narrow": {"num_key_value_heads": 4},
}
# llama.cpp has no architecture for these: its converter refuses their exports by name.
UNKNOWN: dict[str, dict[str, Any]] = {
    "cwm": {},
    "helium": {"head_dim": 16},
    "nanochat": {},
    "persimmon": {},
    "poe": {},
}
# Stages without a head, whose exports keep the tied head of their base.
NO_HEAD = (
    "llama-tied",
    "olmo2-tied",
    "gemma",
    "gemma2",
    "gemma2-27b",
    "gemma2-order",
    "gemma2-46",
    "cohere",
    "cohere2",
)
# Families that llama.cpp's converter reads with a SentencePiece model, which may be small. It takes a byte-level
# tokenizer only if it is a published one: the others have that of SmolLM2.
SENTENCEPIECE = (
    "llama",
    "mistral",
    "smollm3",
    "apertus",
    "arcee",
    "gemma",
    "gemma2",
    "gemma3_text",
    "ernie4_5",
    "nemotron",
    "phi3",
    *UNKNOWN,
)
# Bases that vLLM is tried with. It leaves the head of cohere out without a message, and refuses that of gemma2. Its
# windows of cohere2 are one token longer than those of transformers.
IN_VLLM = [*(name for name in FAMILIES if "-" not in name), "nanochat", "cohere-head", "cohere2-head", "gemma2-head"]
DIFFERENT_IN_VLLM = ("cohere-head", "cohere2-head", "cohere2")
REFUSED_IN_VLLM = {"gemma2-head": "no module or parameter named 'lm_head'"}
# Converted under the pinned transformers alone. Under transformers 5 the converter finds no rotary_pct for gpt_neox,
# even if config.json has one; and a tokenizer of qwen2 that is not Qwen's, as in this tiny model, is changed.
PINNED_ONLY = ("qwen2", "gpt_neox")
REAL = ("smollm2-new", "smollm2-fork")
ADAPTERS = ("smollm2-lora-1", "smollm2-lora-2")  # forks of the real base as LoRA adapters of PEFT

ALL = [*REAL, ADAPTERS[0], *FAMILIES, *DIFFERENT, *UNKNOWN]


def family_of(name: str) -> str:
    """Return the model type of a tiny model."""
    return name.partition("-")[0]
