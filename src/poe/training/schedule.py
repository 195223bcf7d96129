"""The schedules of the learning rates and of Muon's momentum: pure functions of the step, and what applies them."""

import torch

__all__ = ["apply_lr", "apply_momentum", "lr_factor", "muon_momentum"]


def lr_factor(
    step: int, num_steps: int, *, start: float = 0.2, warmup: float = 0.05, warmdown: float = 0.9, final: float = 0.0
) -> float:
    """What every group's `initial_lr` is multiplied by in step `step` (0 .. num_steps - 1) of `num_steps`.

    A trapezoid over `t = step / num_steps`: from `start` at t = 0 linearly up to 1 at t = `warmup`, and from 1 at
    t = 1 - `warmdown` linearly down to `final` at t = 1; where the two overlap, the smaller. `warmup` and `warmdown`
    are shares of the steps in 0 .. 1; 0 turns the ramp off. `final` belongs to `step == num_steps`, so the last step
    taken is just above it; steps beyond stay there. Defaults: the stage recipe of Cognica PoE (started at 0.2x,
    warm-up 5 %, warm-down 90 %).

    Raises `ValueError` for a share, `start` or `final` outside 0 .. 1, a negative step, or `num_steps` < 1.
    """
    for name, value in {"start": start, "warmup": warmup, "warmdown": warmdown, "final": final}.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}: expected a number from 0 to 1, got {value}.")
    if num_steps < 1 or step < 0:
        raise ValueError(f"Expected step >= 0 and num_steps >= 1, got step {step} of {num_steps}.")
    t = min(step / num_steps, 1.0)
    factor = 1.0
    if t < warmup:
        factor = min(factor, start + (1.0 - start) * (t / warmup))
    if 1.0 - t < warmdown:
        factor = min(factor, final + (1.0 - final) * ((1.0 - t) / warmdown))
    return factor


def apply_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's `lr` to `factor` times its `initial_lr`. Raises `KeyError` if a group has no `initial_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]


def muon_momentum(
    step: int, num_steps: int, *, start: float = 0.85, momentum: float = 0.95, warmup: float = 0.05
) -> float:
    """Muon's momentum in step `step` (0 .. num_steps - 1): from `start` linearly to `momentum` over the share `warmup`.

    While the average is young it should be short: early gradients turn quickly. The idea and 0.85 -> 0.95 are those of
    nanochat (karpathy/nanochat), there over 300 steps. Raises `ValueError` for a number outside 0 .. 1 (momenta: below
    1), a negative step, or `num_steps` < 1.
    """
    for name, value in {"start": start, "momentum": momentum}.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name}: expected a number from 0 to below 1, got {value}.")
    ramp = lr_factor(step, num_steps, start=0.0, warmup=warmup, warmdown=0.0)
    return start + (momentum - start) * ramp


def apply_momentum(optimizer: torch.optim.Optimizer, momentum: float) -> None:
    """Set the `momentum` of every Muon group; AdamW groups have none."""
    for group in optimizer.param_groups:
        if group.get("kind") == "muon":
            group["momentum"] = momentum
