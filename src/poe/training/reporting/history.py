"""What happened in a run so far."""

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """It is saved with every checkpoint and ends in training.json."""

    # step, epoch, loss (nats per trained token), grad_norm, lr_factor, tokens_per_s; of a base with several stages also
    # stage_losses, the last of which is the loss
    steps: list[dict[str, Any]] = field(default_factory=list)
    # step, val_bpb, val_loss (nats per trained token); of a base with several stages also stage_bpb
    evals: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = -1
    best_bpb: float = math.inf
    seconds: float = 0.0
    tokens: int = 0  # slots that went through the network, padding included
    eval_seconds: float = 0.0
    peak_bytes: int = 0  # of memory, over all processes that took part one after the other
    estimate: dict[str, Any] = field(default_factory=dict)  # what was said before the first step
    name: str = ""  # what trackers know the run by

    @property
    def actual(self) -> dict[str, Any]:
        """What happened, under the names of the estimate."""
        return {"tokens": self.tokens, "seconds": self.seconds + self.eval_seconds, "memory_bytes": self.peak_bytes}
