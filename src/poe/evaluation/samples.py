"""Several sampled replies to one question: their mean, and how often some or all of k replies are right."""

import math
from collections.abc import Sequence

from poe.evaluation.call_metrics import Counts


def add_samples(samples: Sequence[Counts], success: str | None) -> Counts:
    """Return what the replies to one question add to each metric together.

    With several replies there are also pass@k and pass^k of the metric `success`, from 2 to the number of replies.
    """
    names = dict.fromkeys(name for counts in samples for name in counts)
    added: Counts = {}
    for name in names:
        pairs = [counts.get(name, (0.0, 0.0)) for counts in samples]
        added[name] = sum(above for above, _ in pairs), sum(below for _, below in pairs)
    right, total = map(round, added.get(success or "", (0, 0)))
    for k in range(2, total + 1):
        added[f"pass@{k}"] = estimate_some(total, right, k), 1.0
        added[f"pass^{k}"] = estimate_all(total, right, k), 1.0
    return added


def estimate_some(total: int, right: int, k: int) -> float:
    """Return pass@k: the unbiased estimate that at least one of k replies is right, from `total` (arXiv 2107.03374)."""
    return 1 - math.comb(total - right, k) / math.comb(total, k)


def estimate_all(total: int, right: int, k: int) -> float:
    """Return pass^k: the unbiased estimate that all of k replies are right, from `total` (arXiv 2406.12045)."""
    return math.comb(right, k) / math.comb(total, k)
