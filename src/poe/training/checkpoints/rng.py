"""The state of every random generator that a run may use, as tensors and JSON values."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the states of torch (CPU and every GPU) as tensors, and those of Python and numpy as JSON values."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda-{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return tensors, {"python": [version, list(numbers), gauss], "numpy": [name, np.asarray(keys).tolist(), *rest]}


def restore_rng(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Restore the result of `rng_state`; the states of GPUs that this machine lacks are ignored."""
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda-{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda-{i}"], i)
    version, state, gauss = numbers["python"]
    random.setstate((version, tuple(state), gauss))
    name, keys, *rest = numbers["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
