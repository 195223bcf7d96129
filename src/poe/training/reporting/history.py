"""The history of a run."""

import math
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
    eval_seconds: float = 0.0
    peak_bytes: int = 0  # peak memory over all processes that continued the run
    estimate: dict[str, Any] = field(default_factory=dict)  # made before the first step
    name: str = ""  # the name of the run in the trackers

    @property
    def actual(self) -> dict[str, Any]:
        """The actual values of the quantities that were estimated."""
        return {"tokens": self.tokens, "seconds": self.seconds + self.eval_seconds, "memory_bytes": self.peak_bytes}
