"""Stop signals after the training: during the evaluation, and while the result is written, no work is lost."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import run_program
from conftest import mostly_slow
from poe.commands import train as commands
from poe.training import pretrain, sweep, trainer
from poe.training.checkpoints.files import list_checkpoints
from poe.training.engine import Engine
from poe.training.interrupts import STOP_SIGNALS, Interrupted
from poe.training.pretrain import train_base
from test_base_training import QUIET, recipe  # noqa: F401 - a fixture
from test_training_runs import command, start

SCORES = {"held-out": {"stage": {"rows": 1, "exact": 1.0, "names": 1.0, "valid": 1.0, "abstained": None}}}
CONTINUE = "To continue: poe-train stage demo "


@pytest.fixture(autouse=True)
def handled_signals() -> Iterator[None]:
    """Handle the signals as a program in a terminal does, also if the tests run in the background."""
    before = [signal.signal(number, signal.default_int_handler) for number in STOP_SIGNALS]
    yield
    for number, handler in zip(STOP_SIGNALS, before, strict=True):
        signal.signal(number, handler)


def send_at_call(call: int, function: Any, number: signal.Signals) -> Any:
    """Return `function`, but it sends this process a signal at its call `call`, counted from 1."""
    calls = iter(range(1, 100))

    def send(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    return send


def train(base: Path, out: Path, *options: str, evaluate: bool) -> Any:
    words = command(base, out, "--max-steps", "2", *options, data="demo=60")[3:]
    return run_program("poe-train", *(word for word in words if word != "--no-eval" or not evaluate))


# what the signal meets -> the place that sends it (object, name, call), and what is said to be saved
MOMENTS: dict[str, tuple[tuple[Any, str, int], str]] = {
    "evaluation": ((commands, "_evaluate", 1), f", and its evaluation is missing. {CONTINUE}"),
    "save": ((trainer, "try_to_draw_report", 1), f", and its evaluation is missing. {CONTINUE}"),
    "save of the evaluation": ((trainer, "try_to_draw_report", 2), ".\n"),
    "save without an evaluation": ((trainer, "try_to_draw_report", 1), f". {CONTINUE}"),
}


@pytest.mark.parametrize(
    ("moment", "number"),
    mostly_slow(
        [*((moment, signal.SIGINT) for moment in MOMENTS), *(("evaluation", number) for number in STOP_SIGNALS[1:])],
        [("evaluation", signal.SIGTERM)],
    ),
)
def test_a_signal_after_the_training_loses_no_work(
    moment: str, number: signal.Signals, demo_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, exit code 130, and a resumed run does what is missing, without a step."""
    (owner, name, call), saved = MOMENTS[moment]
    evaluate = moment != "save without an evaluation"
    monkeypatch.setattr(commands, "_evaluate", lambda *arguments: SCORES)
    monkeypatch.setattr(trainer, "describe_failure", lambda record: None)
    monkeypatch.setattr(commands, "_raise_failure", lambda record: None)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, send_at_call(call, getattr(owner, name), number))
        stopped = train(demo_base, tmp_path, evaluate=evaluate)
    assert stopped.returncode == 130, stopped.stderr
    assert f"Stopped; the stage is saved in {tmp_path}{saved}" in stopped.stderr.replace(" \n", " ")
    assert stopped.stderr.splitlines()[-1].startswith("Stopped; ")
    delta = (tmp_path / "delta.safetensors").read_bytes()
    assert not list(tmp_path.glob(".poe-*"))
    assert bool(list_checkpoints(tmp_path)) == ("continue" in saved)
    if "continue" in saved:
        monkeypatch.setattr(Engine, "_take_step", None)  # no step is left
        resumed = train(demo_base, tmp_path, "--resume", evaluate=evaluate)
        assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "delta.safetensors").read_bytes() == delta
    record = json.loads((tmp_path / "training.json").read_text())
    assert record.get("evaluation") == (SCORES if evaluate else None)
    assert not list_checkpoints(tmp_path)


@pytest.mark.slow
def test_a_second_signal_in_the_save_leaves_the_checkpoint(
    demo_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = trainer.try_to_draw_report
    with monkeypatch.context() as patch:
        twice = send_at_call(1, send_at_call(1, draw, signal.SIGINT), signal.SIGINT)
        patch.setattr(trainer, "try_to_draw_report", twice)
        stopped = train(demo_base, tmp_path, evaluate=False)
    assert stopped.returncode == 130
    assert "Stopped; saved at step 2. To continue:" in stopped.stderr
    assert not (tmp_path / "delta.safetensors").exists()
    assert train(demo_base, tmp_path, "--resume", evaluate=False).returncode in (0, 1)  # 1: it learned nothing
    assert (tmp_path / "delta.safetensors").is_file()


@pytest.mark.slow
def test_a_signal_in_the_save_of_a_base_ends_a_finished_run(
    recipe: Any,  # noqa: F811 - the fixture
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send = send_at_call(1, pretrain.try_to_draw_report, signal.SIGTERM)
    monkeypatch.setattr(pretrain, "try_to_draw_report", send)
    with pytest.raises(Interrupted, match=f"the base is saved in {tmp_path}"):
        train_base(recipe.replace(max_steps=2), tmp_path / "run", progress=QUIET)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert not list_checkpoints(tmp_path / "run")


@pytest.mark.slow
def test_a_signal_in_the_save_of_a_candidate_repeats_no_candidate(
    demo_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [word for word in command(demo_base, tmp_path / "out", "--max-steps", "2")[4:] if word != "--no-eval"]
    words = ["sweep", *words, "--try", "head=none,low_rank", "--head-rank", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "try_to_draw_report", send_at_call(2, trainer.try_to_draw_report, signal.SIGINT))
        stopped = run_program("poe-train", *words)
    assert stopped.returncode == 130
    assert "head=low_rank. To continue: poe-train sweep demo" in stopped.stderr
    steps: list[int] = []
    take = Engine._take_step
    monkeypatch.setattr(Engine, "_take_step", lambda engine, step: steps.append(step) or take(engine, step))
    resumed = run_program("poe-train", *words, "--resume")
    assert resumed.returncode in (0, 1), resumed.stderr
    assert (tmp_path / "out" / sweep.RECORD).is_file()
    assert not steps


@pytest.mark.slow
def test_a_signal_in_the_evaluation_of_a_real_process_keeps_the_stage(demo_base: Path, tmp_path: Path) -> None:
    options = ("--max-steps", "2", "--eval-rows", "60")
    words = [word for word in command(demo_base, tmp_path, *options, data="demo=60") if word != "--no-eval"]
    process: Any = start(words, text=True)
    while "answering" not in (line := process.stderr.readline()):
        assert line, "the process ended"
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 130, errors
    last = errors.splitlines()[-1]
    assert last.startswith(f"Stopped; the stage is saved in {tmp_path}, and its evaluation is missing. {CONTINUE}")
    resumed = train(demo_base, tmp_path, "--resume", *options, evaluate=False)
    assert resumed.returncode in (0, 1), resumed.stderr  # 1: it learned nothing
    assert (tmp_path / "delta.safetensors").is_file()
    assert not list_checkpoints(tmp_path)
