"""The schedules of the learning rates and of Muon's momentum, as pure functions of the step."""

import torch

__all__ = ["apply_lr", "apply_momentum", "lr_factor", "muon_momentum"]


def lr_factor(
    step: int,
    num_steps: int,
    *,
    initial_lr_factor: float = 0.2,
    warmup_ratio: float = 0.05,
    warmdown_ratio: float = 0.9,
    final_lr_factor: float = 0.0,
) -> float:
    """Return the factor of every learning rate in step `step` (0 .. num_steps - 1) of `num_steps`.

    The schedule is a trapezoid over `t = step / num_steps`. It rises linearly from `initial_lr_factor` at t = 0 to 1 at
    t = `warmup_ratio`, and falls linearly from 1 at t = 1 - `warmdown_ratio` to `final_lr_factor` at t = 1. Where the
    two ramps overlap, the smaller value counts. A ratio is a share of the steps in 0 .. 1; 0 turns its ramp off. The
    value at t = 1 belongs to `step == num_steps`, so the last step is just above it; later steps keep it. The defaults
    are the stage recipe of Cognica PoE.

    Raises `ValueError` for a ratio or factor outside 0 .. 1, a negative step, or `num_steps` < 1.
    """
    shares = {
        "initial_lr_factor": initial_lr_factor,
        "warmup_ratio": warmup_ratio,
        "warmdown_ratio": warmdown_ratio,
        "final_lr_factor": final_lr_factor,
    }
    for name, value in shares.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}: expected a number from 0 to 1, got {value}.")
    if num_steps < 1 or step < 0:
        raise ValueError(f"Expected step >= 0 and num_steps >= 1, got step {step} of {num_steps}.")
    t = min(step / num_steps, 1.0)
    factor = 1.0
    if t < warmup_ratio:
        factor = min(factor, initial_lr_factor + (1.0 - initial_lr_factor) * (t / warmup_ratio))
    if 1.0 - t < warmdown_ratio:
        factor = min(factor, final_lr_factor + (1.0 - final_lr_factor) * ((1.0 - t) / warmdown_ratio))
    return factor


def apply_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the `lr` of every group to `factor` times its `initial_lr`. Raises `KeyError` without `initial_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]


def muon_momentum(
    step: int,
    num_steps: int,
    *,
    initial_momentum: float = 0.85,
    momentum: float = 0.95,
    warmup_ratio: float = 0.05,
) -> float:
    """Return Muon's momentum in step `step` (0 .. num_steps - 1).

    It rises linearly from `initial_momentum` to `momentum` over the share `warmup_ratio` of the steps, because early
    gradients change direction quickly. The idea and 0.85 -> 0.95 are from nanochat (karpathy/nanochat), there over 300
    steps. Raises `ValueError` for a momentum outside 0 .. 1 (1 excluded), a ratio outside 0 .. 1, a negative step, or
    `num_steps` < 1.
    """
    for name, value in {"initial_momentum": initial_momentum, "momentum": momentum}.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name}: expected a number from 0 to below 1, got {value}.")
    ramp = lr_factor(step, num_steps, initial_lr_factor=0.0, warmup_ratio=warmup_ratio, warmdown_ratio=0.0)
    return initial_momentum + (momentum - initial_momentum) * ramp


def apply_momentum(optimizer: torch.optim.Optimizer, momentum: float) -> None:
    """Set the `momentum` of every Muon group; AdamW groups have none."""
    for group in optimizer.param_groups:
        if group.get("kind") == "muon":
            group["momentum"] = momentum
