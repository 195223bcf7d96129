"""What became of a stage: whether it was trained at all, learned nothing, or diverged."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def describe_failure(record: Mapping[str, Any]) -> str | None:
    """Return why a run is no success, from its training.json: it learned nothing, or it diverged. None if it is one."""
    trajectory, best = record.get("trajectory") or [], record.get("best_step")
    if len(trajectory) < 2 or best is None:
        return None
    before, after = trajectory[0]["val_bpb"], trajectory[-1]["val_bpb"]
    numbers = f"validation began at {before:.4f} bits per byte and ended at {after:.4f}"
    advice = "Try lower learning rates (matrix_lr, head_lr), max_grad_norm, or other data."
    if best == 0:
        return (
            f"The run learned nothing: {numbers}, and no step was better than the first. The weights of the result are "
            f"those from before the training. {advice}"
        )
    if not after <= before:
        return f"The run diverged: {numbers}. The weights of the result are those of step {best}, the best. {advice}"
    return None


def describe_untrained(delta: Mapping[str, Tensor]) -> str | None:
    """Return that a stage was never trained, from its tensors; None if it was.

    Every layer of a new stage has a matrix of zeros, which the first step changes.
    """
    with_zeros: dict[str, bool] = {}
    for name, tensor in delta.items():
        kind, _, rest = name.partition(".")
        layer = rest.partition(".")[0]
        if kind == "layers" and tensor.ndim == 2:
            with_zeros[layer] = with_zeros.get(layer, False) or not tensor.any()
    if with_zeros and all(with_zeros.values()):
        return "The stage was never trained: it computes exactly what the base below it computes."
    return None
