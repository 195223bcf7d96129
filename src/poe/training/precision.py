"""Which number format a run computes in."""

import torch

from poe.errors import TrainingError


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
    named = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if wanted not in named:
        raise TrainingError(f"Cannot train in {wanted!r}: expected auto, bfloat16 or float32.")
    return named[wanted]
