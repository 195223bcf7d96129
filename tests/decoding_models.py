"""Tiny models of every kind that decoding must handle (windows, features of PoE, soft caps), and their inputs."""

import torch
from transformers import PreTrainedModel

from conftest import GEMMA, scramble, tiny_model, token_ids
from poe import Cascade

WINDOWS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
# Name -> (model type, fields of its config). All have four layers.
MODELS: dict[str, tuple[str, dict]] = {
    "poe": ("poe", {}),
    "poe with stages": ("poe", {"stage_layers": [1, 1, 1, 1], "stage_heads": True}),
    "poe with everything": (
        "poe",
        {
            "layer_scalars": True,
            "value_embedding_layers": [1, 3],
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "sliding_window": 4,
            "smear_channels": 4,
            "backout_layer": 1,
        },
    ),
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3 sliding": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "layer_types": WINDOWS},
    ),
    "gemma2": ("gemma2", {**GEMMA, "final_logit_softcapping": 3.0, "layer_types": WINDOWS}),
    "gemma3": ("gemma3_text", {**GEMMA, "layer_types": WINDOWS[::-1], "tie_word_embeddings": True}),
}


def decoding_cascade(name: str, stage: str | None = None, dtype: torch.dtype = torch.float32) -> Cascade:
    """Return a cascade on a base of four layers. `stage`: "top" (after all), "low" (after three), or None."""
    model_type, fields = MODELS[name]
    cascade = Cascade(tiny_model(model_type, {"num_hidden_layers": 4, **fields}, dtype))
    if stage is not None:
        cascade.add_stage(name="s", num_layers=2, attach_at=3 if stage == "low" else None)
        scramble(cascade.stages["s"], 2)
    return cascade


def model_of(cascade: Cascade) -> PreTrainedModel:
    """Return the native model of the active stage."""
    return cascade.model(cascade.active)


def prompts(rows: int, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return token ids and mask (rows, length). Row r is padded on the left with r tokens."""
    ids = token_ids(rows, length, seed)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, :row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Return the positions (B, T) of tokens under an attention mask, as `generate` counts them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
