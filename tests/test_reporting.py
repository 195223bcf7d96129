"""Reports of a run: progress bars or lines, trackers that may fail, and the picture drawn from metrics.jsonl."""

import io
import json
import types
from pathlib import Path

import pytest
from rich.console import Console

from poe.errors import MissingExtraError, OutputError, RecipeError
from poe.training.reporting import tracking
from poe.training.reporting.metrics import read_metrics
from poe.training.reporting.progress import Progress
from poe.training.reporting.report import draw_report
from poe.training.reporting.tracking import TrackedRun, Trackers, open_trackers
from small_run import PLAN, small_engine, stop_after


class Recorder:
    """A tracker that records its calls, and fails at the call named `fails_at`."""

    def __init__(self, fails_at: str = "") -> None:
        self.calls: list = []
        self.fails_at = fails_at
        self.run: TrackedRun | None = None

    def make(self, run: TrackedRun) -> "Recorder":
        self.run = run
        return self

    def _record(self, call: str, *arguments) -> None:
        self.calls.append((call, *arguments))
        if call == self.fails_at:
            raise ConnectionError("the server is gone\nand more")

    def start(self) -> None:
        assert self.run is not None
        self._record("start", self.run.name, self.run.step)

    def log(self, values, step) -> None:
        self._record("log", {**values, "step": step})

    def finish(self) -> None:
        self._record("finish")


def test_trackers_receive_the_records_of_metrics_jsonl(tmp_path: Path) -> None:
    tracker = Recorder()
    engine, _ = small_engine(tmp_path, PLAN.replace(max_steps=9), trackers=Trackers({"t": tracker.make}, print))
    engine.run()
    steps, evals = read_metrics(tmp_path)
    assert [record["step"] for record in steps] == list(range(1, 10))
    assert [record["step"] for record in evals] == [0, 7, 9]
    assert all({"loss", "epoch", "lr_factor", "grad_norm", "tokens_per_s"} <= set(record) for record in steps)
    assert all(record["grad_norm"] > 0 for record in steps)
    assert tracker.calls[0] == ("start", engine.history.name, 0)
    assert tracker.calls[-1] == ("finish",)
    logged = [record for _, record in tracker.calls[1:-1]]
    assert logged == [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_resumed_run_keeps_its_name_in_trackers(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    engine, _ = small_engine(tmp_path, trackers=Trackers({"t": first.make}, print))
    stop_after(engine, 1)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert first.calls[-1] == ("finish",)
    engine.history.name = "another"  # the resumed run must read the name from the checkpoint
    resumed, _ = small_engine(tmp_path, trackers=Trackers({"t": second.make}, print))
    stop_after(resumed, 2)
    with pytest.raises(KeyboardInterrupt):
        resumed.run(resume=True)
    assert second.calls[0] == ("start", first.calls[0][1], 1)
    assert [record["step"] for call, *rest in second.calls if call == "log" for record in rest] == [2]


@pytest.mark.parametrize("fails_at", ["start", "log", "finish"])
def test_failing_tracker_is_reported_once_and_dropped(fails_at: str, tmp_path: Path) -> None:
    notes: list[str] = []
    broken, sound = Recorder(fails_at), Recorder()
    trackers = Trackers({"broken": broken.make, "sound": sound.make}, notes.append)
    engine, _ = small_engine(tmp_path, PLAN.replace(max_steps=3), trackers=trackers)
    history = engine.run()
    assert len(history.steps) == 3
    assert len(notes) == 1
    assert "the tracker broken failed and was dropped: ConnectionError: the server is gone." in notes[0]
    assert sum(call == fails_at for call, *_ in broken.calls) == 1
    assert len(sound.calls) == 1 + 3 + 2 + 1


def test_trackers_are_opened_by_name(monkeypatch) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    assert not open_trackers("", print).names
    with pytest.raises(RecipeError, match="Did you mean 'trackio'"):
        open_trackers("trackoi", print)
    with pytest.raises(MissingExtraError, match=r'pip install "poe-cascade\[track\]"'):
        open_trackers("trackio", print)
    with pytest.raises(MissingExtraError, match="pip install wandb"):
        open_trackers(" wandb ,trackio", print)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: types.ModuleType(name))
    assert open_trackers("tensorboard, trackio,trackio", print).names == ["tensorboard", "trackio"]


@pytest.mark.parametrize("name", list(tracking.TRACKERS))
def test_installed_trackers_record_a_run_and_its_continuation_offline(name: str, tmp_path: Path, monkeypatch) -> None:
    for variable, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path / "t"),
    }.items():
        monkeypatch.setenv(variable, value)  # before the library is imported
    pytest.importorskip(name)
    notes: list[str] = []
    for first in (0, 3):
        trackers = open_trackers(name, notes.append)
        trackers.start("run-1", PLAN.as_dict(), tmp_path, first)
        for step in range(first + 1, first + 4):
            trackers.log({"step": step, "loss": 1.0 / step, "lr_factor": 0.5})
        trackers.log({"step": first + 3, "val_bpb": 0.5, "val_loss": 1.0})
        trackers.finish()
    assert not notes
    assert any(path.is_file() and path.stat().st_size for path in tmp_path.rglob("*"))


def test_report_is_drawn_from_metrics_jsonl_only(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(OutputError, match=r"no metrics.jsonl"):
        draw_report(tmp_path)
    engine, _ = small_engine(tmp_path, PLAN.replace(max_steps=12, checkpoint_every=60.0))
    engine.run()
    assert draw_report(tmp_path)
    first = (tmp_path / "report.png").read_bytes()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[: len(lines) // 2]) + "\n")
    assert draw_report(tmp_path)
    assert (tmp_path / "report.png").read_bytes() != first
    (tmp_path / "metrics.jsonl").write_text("")  # a run without steps
    assert draw_report(tmp_path)


def shown(terminal: bool, monkeypatch, epochs: float = 2.5) -> str:
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress("stage x")
    progress.console = Console(file=io.StringIO(), force_terminal=terminal, width=150, highlight=False, soft_wrap=True)
    progress.start(0, 10, 10 / epochs)
    for step in range(1, 11):
        progress.show_step(step, 2.0, 1000.0)
        for row in range(4):
            progress.show_validation(row + 1, 4)
        progress.report_validation(step, 0.5)
        if progress._live is not None:
            progress._live.refresh()
    progress.note("[brackets] are not markup")
    progress.stop()
    return progress.console.file.getvalue()


def test_progress_shows_bars_on_a_terminal(monkeypatch) -> None:
    text = shown(True, monkeypatch)
    for expected in (
        "step 10/10",
        "loss 2.000",
        "1,000 tok/s",
        "epoch 1/3",
        "epoch 3/3",
        "val bpb 0.5000",
        "[brackets]",
    ):
        assert expected in text
    assert "epoch 1/1" not in shown(True, monkeypatch, epochs=0.5)


def test_progress_prints_lines_in_a_log(monkeypatch) -> None:
    text = shown(False, monkeypatch)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert all(line.startswith("stage x: ") for line in lines)
    assert "step 10/10  loss 2.000  1,000 tok/s  epoch 2.50/2.50" in lines[-3]
    assert lines[-1] == "stage x: [brackets] are not markup"
    assert sum("val bpb" in line for line in lines) == 10
