"""A trained head becomes a smaller one: the best approximation of a given rank."""

import dataclasses
from dataclasses import dataclass

import torch

from poe.errors import StageError
from poe.modeling.heads import HeadDelta, LowRankHead
from poe.modeling.stage import Stage


@dataclass(frozen=True)
class HeadReport:
    """What replacing a head delta W by one of low rank cost.

    `relative_error` is the Frobenius norm of the change over that of W, `energy` the share of the squared norm that is
    kept. The errors of logits are absolute, over all the token ids that were given; None if none were.
    """

    rank: int
    parameters_before: int
    parameters_after: int
    relative_error: float
    energy: float
    max_logit_error: float | None = None
    mean_logit_error: float | None = None


@torch.no_grad()
def compress_head(stage: Stage, rank: int) -> HeadReport:
    """Replace a stage's head delta by the nearest one of `rank` (truncated SVD: Eckart and Young, 1936).

    The factors share the singular values evenly: `a = sqrt(S) V^T` (rank, width), `b = U sqrt(S)` (vocabulary, rank),
    in the head's dtype. Raises `StageError` if there is no head delta or the new one would not be smaller.
    """
    head = stage.head
    assert isinstance(head, HeadDelta)
    delta = head.delta()
    if delta is None:
        raise StageError(f"Stage {stage.name!r} has no head delta: there is nothing to compress.")
    before = sum(p.numel() for p in head.parameters())
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank * sum(delta.shape) < before:
        raise StageError(
            f"Stage {stage.name!r}: rank should be a whole number from 1 to {(before - 1) // sum(delta.shape)}, so "
            f"that the head gets smaller than its {before:,} parameters, got {rank!r}."
        )
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    small = LowRankHead(delta.shape[0], delta.shape[1], rank).to(next(head.parameters()))
    small.a.copy_(s[:rank, None].sqrt() * vt[:rank])
    small.b.copy_(u[:, :rank] * s[:rank].sqrt())
    small.requires_grad_(next(head.parameters()).requires_grad)
    norm = float(delta.norm())
    error = float((delta - small.delta()).norm()) / norm if norm else 0.0
    stage.head = small
    stage.config = dataclasses.replace(stage.config, head="low_rank", head_rank=rank)
    stage.source = None  # what its files hold is another head
    energy = float(s[:rank].square().sum() / s.square().sum()) if norm else 1.0
    return HeadReport(rank, before, rank * sum(delta.shape), error, energy)
