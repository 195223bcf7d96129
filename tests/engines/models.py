"""The models that the engines are tried with: a tiny base of each family, and the real base."""

from typing import Any

WINDOW = {"sliding_window": 8}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh", **WINDOW}
# Family -> fields of its config. The fields are those whose defaults do not fit a small model.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "smollm3": {},
    "mistral": {"sliding_window": None},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {**GEMMA, "tie_word_embeddings": True},
    "gemma3_text": GEMMA,
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 0.5, "embedding_multiplier": 2.0},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "apertus": {},
    "arcee": {},
    "cohere": {},
    "cohere2": WINDOW,
    "ernie4_5": {"head_dim": 16},
    "gpt_neox": {},
    "hunyuan_v1_dense": {"head_dim": 16},
    "nemotron": {},
    "seed_oss": {"head_dim": 16},
    "stablelm": {},
    "starcoder2": {},
}
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
)
# Families whose exports llama.cpp's converter refuses, and its reason: their head is the embedding there.
REFUSED = dict.fromkeys(("cohere", "cohere2"), "Can not map tensor 'lm_head.weight'")
# llama.cpp reads no head beside the embedding in these families, so their stages change the layers alone.
NO_HEAD = ("gemma", "gemma2")
# Tiny models that are converted under the pinned transformers alone: transformers 5 changes a tokenizer of qwen2 that
# is not Qwen's, and writes no rotary_pct for gpt_neox. Published bases have neither problem.
PINNED_ONLY = ("qwen2", "gpt_neox")
REAL = ("smollm2-new", "smollm2-fork")
ADAPTERS = ("smollm2-lora-1", "smollm2-lora-2")  # forks of the real base as LoRA adapters of PEFT

ALL = [*FAMILIES, *REAL, *ADAPTERS]
