"""Which settings hold when a model generates: the caller's, or those that the base's authors recommend."""

from typing import Any

from transformers import GenerationConfig

REPLY_TOKENS = 160  # the most tokens of a reply to a held-out question
REPLY_BATCH = 32  # questions that are answered together

# What decides no token: special tokens, the form of the output, how it is computed, and the length, which callers give.
_NOT_DECIDING = (
    *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "use_cache", "max_length"),
    *("output_", "return_", "transformers_", "_", "compile_config", "disable_compile", "cache_implementation"),
)


def greedy_options(**options: Any) -> dict[str, Any]:
    """Return options of `generate` that take the most likely token at every step; `options` are added.

    A base's generation config can have a repetition penalty, beams, forced or suppressed tokens, and `generate` applies
    them also with `do_sample=False`. A penalty punishes what a call must do: copy names from the prompt. These options
    set every one of them back to what changes no token.
    """
    neutral = GenerationConfig()
    defaults = {**neutral.to_dict(), **neutral._get_default_generation_params()}
    settings = {name: value for name, value in defaults.items() if not name.startswith(_NOT_DECIDING)}
    return {**settings, "do_sample": False, **options}
