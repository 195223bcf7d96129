"""torch.compile, on request: for the forward pass of training, whose shapes packing keeps static."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from poe.errors import TrainingError


def compiled(backbone: nn.Module) -> Callable[..., Any]:
    """Return what calls `backbone`, compiled at the first call; the module itself, its names and its hooks stay.

    Every row is full, so one shape is compiled (two, where the last micro-batch of a step is smaller). Raises
    `TrainingError`, at the first call, where it cannot be compiled.
    """
    fast = torch.compile(backbone, dynamic=False)

    def forward(**inputs: Any) -> Any:
        try:
            return fast(**inputs)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise TrainingError(
                f"torch.compile cannot compile the {type(backbone).__name__}: {reason} On a CPU it needs a C++ "
                "compiler. Train without it (compile: false), at some cost in speed."
            ) from error

    return forward
