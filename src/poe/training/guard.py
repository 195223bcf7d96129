"""Numbers that are not finite stop a run before they reach a weight, and are called by name."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from poe.errors import TrainingError
from poe.modeling.placement import is_plain

Named = Iterable[tuple[str, nn.Parameter]]


def check_step(
    step: int, loss: float, norm: float, model: nn.Module, parameters: Named, replay: Callable[[], object]
) -> None:
    """Raise `TrainingError` unless `loss` and the gradients' `norm` are finite; call it before the optimizer's step.

    The message names the first tensor that is not finite, in the order in which a step computes them: a weight, the
    output of a module (found by `replay`, which repeats the step's forward passes), the loss, a gradient.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    parameters = list(parameters)
    culprit = _bad_weight(parameters) or _bad_weight(model.named_parameters()) or _bad_output(model, replay)
    if culprit is None and not math.isfinite(loss):
        culprit = f"the loss ({loss})"
    culprit = culprit or _bad_gradient(parameters) or f"the norm of all gradients ({norm})"
    raise TrainingError(
        f"The loss of step {step} is {loss}, the norm of its gradients {norm}: expected finite numbers. The first "
        f"tensor that is not finite is {culprit}. The step was not taken, and the newest checkpoint, if any, was kept. "
        "Start again with lower learning rates (matrix_lr, head_lr) or with max_grad_norm; --resume goes on from that "
        "checkpoint with the same options, which helps only if the hardware was at fault."
    )


def check_weights(step: int, parameters: Named) -> None:
    """Raise `TrainingError` if a step left a weight that is not finite; call it before a checkpoint is replaced."""
    if culprit := _bad_weight(parameters):
        raise TrainingError(
            f"After step {step} the first tensor that is not finite is {culprit}. No checkpoint was written over the "
            "newest one, if any. Start again with lower learning rates (matrix_lr, head_lr) or with max_grad_norm."
        )


def _bad(tensor: object) -> str | None:
    """Say how many numbers of a tensor are not finite; None if all are, or if it holds no plain floats."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or not is_plain(tensor):
        return None
    finite = torch.isfinite(tensor)
    if finite.all():
        return None
    nan = int(tensor.isnan().sum())
    return f"{nan:,} nan and {tensor.numel() - int(finite.sum()) - nan:,} infinite of {tensor.numel():,} numbers"


def _bad_weight(parameters: Named) -> str | None:
    return next((f"the weight {name} ({what})" for name, p in parameters if (what := _bad(p.detach()))), None)


def _bad_gradient(parameters: Named) -> str | None:
    """The first in the order of the backward pass: from the head down."""
    found = ((name, _bad(p.grad)) for name, p in reversed(list(parameters)))
    return next((f"the gradient of {name} ({what})" for name, what in found if what), None)


def _bad_output(model: nn.Module, replay: Callable[[], object]) -> str | None:
    with _first_bad_output(model) as found, torch.no_grad():
        replay()
    return found[0] if found else None


@contextmanager
def _first_bad_output(model: nn.Module) -> Iterator[list[str]]:
    """Collect which modules return what is not finite, in the order in which they return: the innermost first."""
    found: list[str] = []

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if not found and (what := _bad(tensor)):
                found.append(f"the hidden state that {name} returns ({what})")

    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: look(name, m, a, out))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
