"""Replace a trained head delta by its best approximation of a given rank."""

import dataclasses
from dataclasses import dataclass

import torch

from poe.errors import StageError
from poe.modeling.heads import HeadDelta, LowRankHead
from poe.modeling.stage import Stage


@dataclass(frozen=True)
class HeadReport:
    """The size and the error of a head delta after compression.

    rank               rank of the new delta
    parameters_before  numbers in the old delta
    parameters_after   numbers in the new delta
    relative_error     Frobenius norm of the change, divided by that of the old delta
    energy             share of the squared Frobenius norm that the new delta keeps, 0 to 1
    max_logit_error    largest absolute error of a logit on the given token ids; None without token ids
    mean_logit_error   mean absolute error of the logits on the given token ids; None without token ids
    """

    rank: int
    parameters_before: int
    parameters_after: int
    relative_error: float
    energy: float
    max_logit_error: float | None = None
    mean_logit_error: float | None = None

    def with_change(self, before: torch.Tensor, after: torch.Tensor) -> "HeadReport":
        """Return the report with the errors of the logits, given those before and after."""
        change = (after.float() - before.float()).abs()
        return dataclasses.replace(self, max_logit_error=float(change.max()), mean_logit_error=float(change.mean()))


@torch.no_grad()
def compress_head(stage: Stage, rank: int) -> HeadReport:
    """Replace the head delta of a stage by the nearest one of `rank`, with a truncated SVD (Eckart and Young, 1936).

    Both factors get the square roots of the singular values: `a = sqrt(S) V^T` (rank, width) and `b = U sqrt(S)`
    (vocabulary, rank), in the dtype of the head. Raises `StageError` if there is no head delta, or if the new one would
    not be smaller.
    """
    head = stage.head
    assert isinstance(head, HeadDelta)
    delta = head.delta()
    if delta is None:
        raise StageError(f"Stage {stage.name!r} has no head delta to compress.")
    before = sum(p.numel() for p in head.parameters())
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank * sum(delta.shape) < before:
        raise StageError(
            f"Stage {stage.name!r}: rank should be a whole number from 1 to {(before - 1) // sum(delta.shape)}, to "
            f"make the head smaller than its {before:,} parameters, got {rank!r}."
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
    stage.source = None  # its files hold the old head
    energy = float(s[:rank].square().sum() / s.square().sum()) if norm else 1.0
    return HeadReport(rank, before, rank * sum(delta.shape), error, energy)
