"""Trackers: the classes of accelerate, chosen by name. A tracker that fails is dropped, and the run continues."""

import contextlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from poe.errors import MissingExtraError, RecipeError, suggest
from poe.training.reporting.progress import STANDARD_ERROR

PROJECT = "poe"
TENSORBOARD, WANDB = "tensorboard", "wandb"  # the folders of these trackers in the folder of the run


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker sees it. A resumed run has the name of the first run, and the step of its checkpoint."""

    name: str
    config: Mapping[str, Any]
    folder: Path
    step: int  # 0 for a new run


class Tracker(Protocol):
    """The methods of accelerate's trackers that a run calls. Any of them may fail."""

    def start(self) -> None: ...

    def log(self, values: dict[str, float], step: int | None = None) -> None: ...

    def finish(self) -> None: ...


def make_trackio(run: TrackedRun) -> Tracker:
    """Return a tracker of trackio, which stores runs on this machine (`trackio show --project poe`) or on a Space."""
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(PROJECT, name=run.name, config=dict(run.config), resume="allow", embed=False)


def make_wandb(run: TrackedRun) -> Tracker:
    """Return a tracker of Weights & Biases. Without an account, `WANDB_MODE=offline` writes into the run's folder."""
    from accelerate.tracking import WandBTracker

    options = {"id": run.name, "dir": run.folder, "resume": "allow", "reinit": "create_new"}
    return WandBTracker(PROJECT, name=run.name, config=dict(run.config), **options)


def make_tensorboard(run: TrackedRun) -> Tracker:
    """Return a tracker that writes event files of TensorBoard into `tensorboard/` in the run's folder.

    A resumed run repeats the steps after its checkpoint. `purge_step` makes TensorBoard show the repeated ones.
    """
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker(TENSORBOARD, run.folder, purge_step=run.step + 1 if run.step else None)


MakeTracker = Callable[[TrackedRun], Tracker]
TRACKERS: dict[str, MakeTracker] = {"trackio": make_trackio, WANDB: make_wandb, TENSORBOARD: make_tensorboard}


class Trackers:
    """Any number of trackers by name. When one fails, `note` reports it once and it is dropped."""

    def __init__(self, makers: Mapping[str, MakeTracker], note: Callable[[str], None]) -> None:
        self._makers = dict(makers)
        self._trackers: dict[str, Tracker] = {}
        self._note = note

    @property
    def names(self) -> list[str]:
        """The names of the trackers, in order."""
        return list(self._makers)

    def start(self, name: str, config: Mapping[str, Any], folder: Path, step: int) -> None:
        """Start the run `name` in its folder, or continue it after `step`."""
        run = TrackedRun(name, config, folder, step)
        if self._makers:
            from accelerate.state import PartialState

            PartialState()  # accelerate's trackers log through it
        for tracker_name, make in self._makers.items():
            with self._drop_if_failing(tracker_name):
                tracker = make(run)
                tracker.start()
                self._trackers[tracker_name] = tracker

    def log(self, record: Mapping[str, Any]) -> None:
        """Log a line of metrics.jsonl: numbers by name, and `step`."""
        values = split_lists(record)
        step = int(values.pop("step"))
        for name, tracker in list(self._trackers.items()):
            with self._drop_if_failing(name):
                tracker.log(values, step=step)

    def finish(self) -> None:
        """Finish the run in every tracker."""
        for name, tracker in list(self._trackers.items()):
            with self._drop_if_failing(name):
                tracker.finish()

    @contextlib.contextmanager
    def _drop_if_failing(self, name: str) -> Any:
        try:
            with contextlib.redirect_stdout(STANDARD_ERROR):  # trackers print; standard output is for results
                yield
        except Exception as error:  # any library may fail here, and the result does not depend on it
            self._trackers.pop(name, None)
            reason = str(error).partition("\n")[0]
            self._note(
                f"the tracker {name} failed and was dropped: {type(error).__name__}: {reason}. metrics.jsonl has all "
                "records."
            )


def open_trackers(names: str, note: Callable[[str], None]) -> Trackers:
    """Return the trackers of a comma-separated list such as `trackio,tensorboard`.

    Raises `RecipeError` for an unknown name, `MissingExtraError` for a library that is not installed.
    """
    chosen = [name for name in (part.strip() for part in names.split(",")) if name]
    for name in chosen:
        if name not in TRACKERS:
            raise RecipeError(f"Unknown tracker {name!r} in track.{suggest(name, TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            package = '"poe-cascade[track]"' if name == "trackio" else name
            raise MissingExtraError(f"track: {name} is not installed: pip install {package}")
    return Trackers({name: TRACKERS[name] for name in dict.fromkeys(chosen)}, note)


def split_lists(record: Mapping[str, Any]) -> dict[str, float]:
    """Return a record with one number for each element of a list, such as `stage_losses/0`."""
    values: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, list):
            values |= {f"{key}/{index}": element for index, element in enumerate(value)}
        else:
            values[key] = value
    return values
