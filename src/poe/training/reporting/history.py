"""The history of a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """The measurements of a run so far. They are saved with every checkpoint and end up in training.json."""

    # step, epoch, loss (nats per label), grad_norm, lr_factor, tokens_per_s; for a base with several stages also
    # stage_losses, of which the last is the loss
    steps: list[dict[str, Any]] = field(default_factory=list)
    # step, val_bpb, val_loss (nats per label); for a base with several stages also stage_bpb
    evals: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = -1
    best_bpb: float = math.inf
    seconds: float = 0.0  # of the steps
    tokens: int = 0  # positions that went through the network, padding included
    eval_seconds: float = 0.0  # of the validations
    evaluation_seconds: float | None = None  # of the held-out questions, once they are answered
    disk_bytes: int = 0  # largest size of the run's folder, after a checkpoint
    peak_bytes: int = 0  # peak memory over all processes that continued the run
    estimate: dict[str, Any] = field(default_factory=dict)  # made before the first step
    name: str = ""  # the name of the run in the trackers

    @property
    def actual(self) -> dict[str, Any]:
        """The actual values of the quantities that were estimated."""
        actual = {
            "tokens": self.tokens,
            "steps": len(self.steps),
            "passes": self.steps[-1]["epoch"] if self.steps else 0,
            "seconds": self.seconds + self.eval_seconds,
            "memory_bytes": self.peak_bytes,
            "disk_bytes": self.disk_bytes,
        }
        return actual if self.evaluation_seconds is None else {**actual, "evaluation_seconds": self.evaluation_seconds}


def summarize_run(record: Mapping[str, Any], history: History) -> dict[str, float]:
    """Return the result of a run in numbers, from its training.json and its history.

    `loss` is that of the last step, and `val_loss` and `val_bpb` those of the weights that were kept. The scores of an
    evaluation are `SPLIT/base/exact`, `SPLIT/stage/exact`, and so on.
    """
    best = next((point for point in history.evals if point["step"] == history.best_step), {})
    metrics: dict[str, float] = {
        **({"loss": history.steps[-1]["loss"]} if history.steps else {}),
        **{name: best[name] for name in ("val_loss", "val_bpb") if name in best},
        **({"val_bpb_before": history.evals[0]["val_bpb"]} if history.evals else {}),
        **{name: record[name] for name in ("best_step", "steps", "tokens", "seconds", "tokens_per_s")},
    }
    for split, models in record.get("evaluation", {}).items():
        for model, scores in models.items():
            metrics |= {f"{split}/{model}/{name}": score for name, score in scores.items() if score is not None}
    return metrics
