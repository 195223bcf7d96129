"""The parts of a training run, as the engine and the estimate take them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from poe.data.packing import Rows
from poe.errors import TrainingError
from poe.modeling.placement import device_of
from poe.training.hidden_states.sources import HiddenSources
from poe.training.parallel.distributed import SINGLE_PROCESS, World
from poe.training.reporting.progress import Progress
from poe.training.reporting.tracking import Trackers

Callback = Callable[[dict[str, Any]], object]
"""Gets every line of metrics.jsonl: a step, or a validation."""


@dataclass(frozen=True)
class TrainedModel:
    """A model, and the parameters of it that are trained and saved."""

    model: PreTrainedModel
    parameters: list[tuple[str, nn.Parameter]]
    sources: HiddenSources
    token_bytes: Tensor  # (V,) UTF-8 bytes of every token, 0 for special tokens; bits per byte are divided by them

    @property
    def device(self) -> torch.device:
        """The device of the token ids."""
        return device_of(self.model.get_input_embeddings())


@dataclass(frozen=True)
class RunRows:
    """The packed rows of a run, (B, T) tokens each. Without validation rows the newest weights count as the best."""

    train: Rows
    val: Rows | None


@dataclass(frozen=True)
class RunSettings:
    """The folder and the length of a run."""

    folder: Path  # of the checkpoints and metrics.jsonl
    num_steps: int
    facts: Mapping[str, str] = field(default_factory=dict)  # a checkpoint with other facts is not continued
    result_bytes: int | None = None  # size of the file that the run will write, for the estimate
    questions: Mapping[str, list[int]] = field(default_factory=dict)  # tokens of each prompt to answer, by split


@dataclass(frozen=True)
class RunContext:
    """Where a run reports, and the processes that share its rows. Only the main process writes."""

    progress: Progress
    trackers: Trackers
    world: World = SINGLE_PROCESS
    callbacks: tuple[Callback, ...] = ()

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass a line of metrics.jsonl to the trackers and the callbacks."""
        self.trackers.log(record)
        for callback in self.callbacks:
            callback(dict(record))


def check_callbacks(callbacks: Iterable[object]) -> None:
    """Raise `TrainingError` for a callback that is no function, such as a `TrainerCallback` of transformers."""
    for callback in callbacks:
        if not callable(callback):
            raise TrainingError(
                f"A callback should be a function that takes a dict of metrics, such as print, got {callback!r}. "
                "Callbacks of transformers work with TRL's trainers (docs/how-to/trl.md)."
            )
