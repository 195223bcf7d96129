"""Whether a difference between two runs on the same questions is more than chance."""

from collections.abc import Mapping, Sequence

import numpy as np

from poe.evaluation.call_metrics import RESAMPLES, Counts, sum_shares, take_columns

_ROUNDING = 1e-9


def compute_p_values(
    first: Sequence[Counts], second: Sequence[Counts], *, exchanges: int = RESAMPLES, seed: int = 0
) -> dict[str, float]:
    """Return for each metric the two-sided p-value of the paired randomization test (Noreen 1989; Yeh 2000).

    Row i of both is about the same question. If the runs were equally good, the answers to a question could be
    exchanged between them: the p-value is the share of random exchanges with at least the difference that was seen,
    which itself counts as one.
    """
    exchanged = np.random.default_rng(seed).integers(0, 2, (exchanges, len(first))).astype(np.float64)
    p_values = {}
    for name in dict.fromkeys(name for row in (*first, *second) for name in row):
        (above, below), (above_other, below_other) = take_columns(first, name), take_columns(second, name)
        moved, moved_below = exchanged @ (above_other - above), exchanged @ (below_other - below)
        differences = sum_shares(above_other.sum() - moved, below_other.sum() - moved_below) - sum_shares(
            above.sum() + moved, below.sum() + moved_below
        )
        seen = sum_shares(above_other.sum(keepdims=True), below_other.sum(keepdims=True)) - sum_shares(
            above.sum(keepdims=True), below.sum(keepdims=True)
        )
        if not np.isnan(seen[0]):
            differences = differences[~np.isnan(differences)]
            as_large = np.abs(differences) >= abs(seen[0]) - _ROUNDING
            p_values[name] = float((1 + as_large.sum()) / (1 + len(differences)))
    return p_values


def adjust_p_values(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values of several comparisons, adjusted for their number by Holm's method."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted
