"""Which number format a run computes in.

A trained tensor is fp32, or bf16 with an fp32 master copy in the optimizer's state. Never fp16: its smallest number is
6e-8, and the gradient of a loss averaged over a step's tokens is smaller than that unless a scaler multiplies it, which
bf16, with the range of fp32, does not need.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from poe.errors import TrainingError

NAMED = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def bf16_is_fast(device: torch.device | str = "cpu") -> bool:
    """Whether the hardware multiplies bf16 matrices itself: any recent GPU, a CPU with AMX or AVX512-BF16."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(wanted: str, device: torch.device | str = "cpu") -> torch.dtype:
    """Return the dtype that a recipe's `dtype` names; `auto` is bf16 where it is fast, else fp32."""
    if wanted == "auto":
        return torch.bfloat16 if bf16_is_fast(device) else torch.float32
    if wanted not in NAMED:
        raise TrainingError(f"Cannot train in {wanted!r}: expected auto, bfloat16 or float32.")
    return NAMED[wanted]


def stage_dtype(wanted: str, base: PreTrainedModel) -> torch.dtype:
    """Return the dtype of a new stage on an open base: what the recipe names, for `auto` the base's own."""
    return base.dtype if wanted == "auto" else choose_dtype(wanted)


def refuse_fp16(*modules: nn.Module) -> None:
    """Raise `TrainingError` if a weight of a base, or of a stage to be trained on it, is in fp16, on any device."""
    if any(p.dtype == torch.float16 for module in modules for p in module.parameters()):
        raise TrainingError(
            "Cannot train in or above float16: gradients as small as a large batch's become zero in it. Open the base "
            "in bfloat16, or in float32 where the hardware has no bfloat16: "
            "Cascade.from_pretrained(base, dtype=torch.bfloat16)."
        )
