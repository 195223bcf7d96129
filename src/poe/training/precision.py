"""The dtype and the device of a run, and whether it is compiled.

A trained tensor is fp32, or bf16 with an fp32 master copy in the optimizer's state. It is never fp16. The smallest
number of fp16 is 6e-8, and the gradient of a loss averaged over the tokens of a step is smaller than that without a
loss scaler. bf16 has the range of fp32 and needs no scaler.
"""

import os
import shutil
from typing import Literal

import torch
from torch import nn
from torch.utils._triton import has_triton
from transformers import PreTrainedModel

from poe.errors import TrainingError
from poe.modeling.placement import missing_device

TRAINED_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def bf16_is_fast(device: torch.device | str = "cpu") -> bool:
    """Return whether the hardware multiplies bf16 matrices: any recent GPU, or a CPU with AMX or AVX512-BF16.

    Other CPUs emulate bf16, and the same step takes several times as long as in fp32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def choose_device(wanted: str = "auto") -> torch.device:
    """Return a device by name; "auto" is the first GPU, or the CPU if there is none.

    Raises `TrainingError` for another name, and for a device that this machine does not have.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise TrainingError(f"There is no device {wanted!r}: expected auto, cpu, cuda, cuda:1, or mps.") from None
    if problem := missing_device(device):
        raise TrainingError(f"{problem} Leave the device out to use what there is.")
    return device


def choose_dtype(wanted: str, device: torch.device | str = "cpu") -> torch.dtype:
    """Return the dtype for a recipe's `dtype`; `auto` is bf16 if the hardware is fast at it, otherwise fp32."""
    if wanted == "auto":
        return torch.bfloat16 if bf16_is_fast(device) else torch.float32
    if wanted not in TRAINED_DTYPES:
        raise TrainingError(f"Cannot train in {wanted!r}: expected auto, bfloat16 or float32.")
    return TRAINED_DTYPES[wanted]


def choose_compile(wanted: bool | Literal["auto"], device: torch.device | str) -> bool:
    """Return whether to compile, for a recipe's `compile`; `auto` is true on a GPU that has Triton and a C compiler."""
    if wanted != "auto":
        return wanted
    compilers = (os.environ.get("CC") or "cc", "gcc", "clang")
    return torch.device(device).type == "cuda" and has_triton() and any(map(shutil.which, compilers))


def stage_dtype(wanted: str, base: PreTrainedModel) -> torch.dtype:
    """Return the dtype of a new stage: the recipe's, or for `auto` that of the base."""
    return base.dtype if wanted == "auto" else choose_dtype(wanted)


def check_not_fp16(*modules: nn.Module) -> None:
    """Raise `TrainingError` if a weight of a base, or of the stage to be trained, is in fp16."""
    if any(p.dtype == torch.float16 for module in modules for p in module.parameters()):
        raise TrainingError(
            "Cannot train in or above float16: the small gradients of a large batch become zero in it. Open the base "
            "in bfloat16, or in float32 if the hardware has no bfloat16: "
            "Cascade.from_pretrained(base, dtype=torch.bfloat16)."
        )
