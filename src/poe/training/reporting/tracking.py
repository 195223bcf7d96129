"""Trackers by name: they are told what metrics.jsonl holds, and whatever becomes of them, the run goes on."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from poe.errors import MissingExtraError, RecipeError, suggest

PROJECT = "poe"
TENSORBOARD, WANDB = "tensorboard", "wandb"  # their folders in the run's folder


class Tracker(Protocol):
    """What a tracker can do. Each call may fail in any way: `Trackers` keeps that from the run."""

    def start(self, name: str, config: Mapping[str, Any], run: Path, step: int) -> None:
        """Begin the run `name` in folder `run`, or continue it after `step` (0: it is new)."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take a line of metrics.jsonl: numbers by name, `step` among them."""

    def finish(self) -> None:
        """Say that no more will come."""


class Trackio:
    """trackio: kept on this machine (`trackio show --project poe`), or on a Space if it is told to by its variables."""

    def start(self, name: str, config: Mapping[str, Any], run: Path, step: int) -> None:
        import trackio

        self._run = trackio.init(project=PROJECT, name=name, config=dict(config), resume="allow", embed=False)

    def log(self, record: Mapping[str, Any]) -> None:
        values, step = _split(record)
        self._run.log(values, step=step)

    def finish(self) -> None:
        self._run.finish()


class WandB:
    """Weights & Biases; without an account `WANDB_MODE=offline` keeps the run in its folder."""

    def start(self, name: str, config: Mapping[str, Any], run: Path, step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=PROJECT, name=name, id=name, config=dict(config), dir=run, resume="allow", reinit="create_new"
        )

    def log(self, record: Mapping[str, Any]) -> None:
        values, step = _split(record)
        self._run.log(values, step=step)

    def finish(self) -> None:
        self._run.finish()


class TensorBoard:
    """TensorBoard's event files, in `tensorboard/` of the run's folder."""

    def start(self, name: str, config: Mapping[str, Any], run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was written after the checkpoint is redone: TensorBoard then shows the newer.
        self._writer = SummaryWriter(str(run / TENSORBOARD), purge_step=step + 1 if step else None)

    def log(self, record: Mapping[str, Any]) -> None:
        values, step = _split(record)
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def finish(self) -> None:
        self._writer.close()


TRACKERS: dict[str, type[Tracker]] = {"trackio": Trackio, WANDB: WandB, TENSORBOARD: TensorBoard}


class Trackers:
    """Any number of trackers by name; one that fails is reported by one `note` and left out from then on."""

    def __init__(self, trackers: Mapping[str, Tracker], note: Callable[[str], None]) -> None:
        self._working = dict(trackers)
        self._note = note

    def start(self, name: str, config: Mapping[str, Any], run: Path, step: int) -> None:
        self._tell(lambda tracker: tracker.start(name, config, run, step))

    def log(self, record: Mapping[str, Any]) -> None:
        self._tell(lambda tracker: tracker.log(record))

    def finish(self) -> None:
        self._tell(lambda tracker: tracker.finish())

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._working.items()):
            try:
                with contextlib.redirect_stdout(sys.stderr):  # they talk; standard output is for results
                    what(tracker)
            except Exception as error:  # somebody else's program, and nothing of the run's result depends on it
                del self._working[name]
                said = str(error).partition("\n")[0]
                self._note(f"{name} failed and is left out: {type(error).__name__}: {said}. metrics.jsonl has it all.")


def open_trackers(names: str, note: Callable[[str], None]) -> Trackers:
    """Return the trackers of a comma list such as `trackio,tensorboard`; none for an empty one.

    Raises `RecipeError` for an unknown name, `MissingExtraError` for a library that is not installed.
    """
    wanted = [name for name in (part.strip() for part in names.split(",")) if name]
    for name in wanted:
        if name not in TRACKERS:
            raise RecipeError(f"Unknown tracker {name!r} in track.{suggest(name, TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            package = '"poe-cascade[track]"' if name == "trackio" else name
            raise MissingExtraError(f"track: {name} is not installed: pip install {package}")
    return Trackers({name: TRACKERS[name]() for name in dict.fromkeys(wanted)}, note)


def _split(record: Mapping[str, Any]) -> tuple[dict[str, float], int]:
    """The numbers of a record by name, those of a list by name and place, and the step that they are of."""
    values: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, list):
            values |= {f"{key}/{place}": part for place, part in enumerate(value)}
        elif key != "step":
            values[key] = value
    return values, int(record["step"])
