"""Faults in a run: signals, lost terminals, full disks, exhausted memory, an evaluation that fails."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from command_line import run_program
from conftest import SMALL_RUN, mostly_slow
from poe import Cascade, train_stage
from poe.data import statistics_page
from poe.data.drops import DropReport
from poe.errors import MemoryLimitError, OutputError, TrainingError
from poe.files.lock import hold
from poe.files.output import LOCK, atomic_folder
from poe.modeling import saves
from poe.training import sweep as sweep_module
from poe.training.checkpoints.files import list_checkpoints
from poe.training.engine import Engine
from poe.training.interrupts import STOP_SIGNALS, StopRequest, stop_signals_raise
from poe.training.reporting import report
from poe.training.reporting.metrics import Metrics
from poe.training.reporting.progress import Progress
from poe.training.sweep import sweep
from small_run import PLAN, small_engine
from test_training_runs import QUIET
from test_training_runs import command as stage_command

FEW = PLAN.replace(max_steps=5, validation_every=2, checkpoint_every=1e9)
EXHAUSTED = {
    "host": MemoryError("Unable to allocate 7.45 GiB for an array"),
    "torch": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000 bytes"),
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total of 8 GiB."),
}
NUMBERS = {
    "host": "7.45 GiB more were needed",
    "torch": "7.45 GiB more were needed, and ",
    "device": "20.00 GiB. GPU 0",
}


def fail_at_call(number: int, function: Any, error: BaseException) -> Any:
    """Return `function`, but with an error at its call `number`, counted from 1."""
    calls = iter(range(1, 10**6))

    def call(*args, **options):
        if next(calls) == number:
            raise error
        return function(*args, **options)

    return call


@pytest.mark.parametrize("kind", mostly_slow(EXHAUSTED, ["device"]))
def test_exhausted_memory_is_one_message_and_the_run_is_saved(kind: str, tmp_path: Path) -> None:
    whole, _ = small_engine(tmp_path / "whole", FEW)
    whole.run()
    engine, _ = small_engine(tmp_path / "run", FEW)
    step = engine.training_step
    step.accumulate_gradients = fail_at_call(4, step.accumulate_gradients, EXHAUSTED[kind])  # type: ignore[method-assign]
    with pytest.raises(MemoryLimitError, match="Step 4 does not fit into memory") as refused:
        engine.run()
    for part in ("Lower max_tokens_per_batch", "saved at step 3: continue with --resume", NUMBERS[kind]):
        assert part in str(refused.value)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    resumed, _ = small_engine(tmp_path / "run", FEW.replace(checkpoint_activations=True))
    resumed.run(resume=True)
    for name, weights in whole.best_weights.items():
        assert torch.equal(weights, resumed.best_weights[name])


def test_a_step_that_was_half_taken_is_not_saved(tmp_path: Path) -> None:
    engine, _ = small_engine(tmp_path, FEW)
    engine.optimizer.step = fail_at_call(3, engine.optimizer.step, MemoryError())  # type: ignore[method-assign]
    with pytest.raises(MemoryLimitError, match="Nothing was saved yet"):
        engine.run()
    assert not list_checkpoints(tmp_path)


def test_exhausted_memory_in_any_command_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in EXHAUSTED.values():
        monkeypatch.setattr(Cascade, "from_pretrained", fail_at_call(1, None, error))
        done = run_program("poe", "generate", "demo", "text")
        assert done.returncode == 1
        assert done.stderr.startswith("error: This command does not fit into memory: ")
        assert "Traceback" not in done.stderr


def test_metrics_on_a_full_disk_save_the_run_before_they_end_it(tmp_path: Path, monkeypatch) -> None:
    whole, _ = small_engine(tmp_path / "whole", FEW)
    whole.run()
    real = Engine._open_metrics

    def open_full(engine: Engine) -> Metrics:
        metrics = real(engine)
        metrics._file = open("/dev/full", "w")  # noqa: SIM115 - the run closes it
        return metrics

    engine, _ = small_engine(tmp_path / "run", FEW)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_open_metrics", open_full)
        with pytest.raises(OutputError, match=r"metrics\.jsonl could not be written: No space.*continue with --resume"):
            engine.run()
    resumed, _ = small_engine(tmp_path / "run", FEW)
    resumed.run(resume=True)
    for name, weights in whole.best_weights.items():
        assert torch.equal(weights, resumed.best_weights[name])


def test_reports_on_a_full_disk_are_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="/dev/full could not be written"), DropReport(Path("/dev/full")) as dropped:
        dropped.drop("source", "reason", "x" * 100_000)

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Metrics(tmp_path):
        pass
    monkeypatch.setattr(os, "fsync", refuse)
    notes: list[str] = []
    report.try_to_draw_report(tmp_path, notes.append, "a run")
    assert "there is no report.png" in notes[0]
    with pytest.raises(OutputError, match=r"training\.json could not be written"):
        report.write_training_json(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class LostStream:
    """A terminal that was closed."""

    def write(self, *arguments: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    flush = isatty = fileno = write  # type: ignore[assignment]


@pytest.mark.parametrize("stream", [LostStream(), None])
def test_progress_on_a_lost_terminal_does_not_end_the_run(stream: Any, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    engine, _ = small_engine(tmp_path, FEW)
    object.__setattr__(engine.context, "progress", Progress("x"))
    assert engine.run().best_step >= 0


def test_bars_on_a_terminal_that_is_lost_do_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=len, flush=int, isatty=lambda: True, encoding="utf-8"))
    progress = Progress("x")
    progress.start(0, 10, 5.0)
    monkeypatch.setattr(sys, "stderr", LostStream())
    progress.show_step(1, 1.0, 10.0)
    progress.report_validation(1, 1.0)
    progress.stop()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_closed_terminal_and_sigterm_stop_a_run_like_ctrl_c(number: signal.Signals) -> None:
    before = [signal.signal(each, signal.default_int_handler) for each in STOP_SIGNALS]
    try:
        stop = StopRequest(lambda text: None)
        with stop.catch_signals("now"):
            os.kill(os.getpid(), number)
        assert stop
        with pytest.raises(KeyboardInterrupt), stop_signals_raise():
            os.kill(os.getpid(), number)
        signal.signal(number, signal.SIG_IGN)  # nohup
        with stop_signals_raise():
            os.kill(os.getpid(), number)
    finally:
        for each, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(each, handler)


def test_the_stage_is_saved_before_it_is_evaluated(demo_base: Path, tmp_path: Path) -> None:
    """An evaluation that fails or is interrupted costs the evaluation alone."""

    def run(evaluate: Any, resume: bool = True) -> Any:
        cascade, fields = Cascade.from_pretrained(demo_base), {**SMALL_RUN, "max_steps": 1}
        return train_stage(
            cascade, "demo", "demo=40", tmp_path, resume=resume, evaluate=evaluate, progress=QUIET, **fields
        )

    with pytest.raises(TrainingError, match=r"saved in .*, but its evaluation failed \(KeyError: 'x'\).*--resume"):
        run(fail_at_call(1, None, KeyError("x")), resume=False)
    delta = (tmp_path / "delta.safetensors").read_bytes()
    assert list_checkpoints(tmp_path)
    run(lambda cascade, name, held_out: {"held out": {}})
    assert json.loads((tmp_path / "training.json").read_text())["evaluation"] == {"held out": {}}
    assert (tmp_path / "delta.safetensors").read_bytes() == delta
    assert not list_checkpoints(tmp_path)
    assert not list(tmp_path.glob(".poe-*"))


def test_checkpoints_of_another_version_are_refused_with_a_sentence(tmp_path: Path) -> None:
    engine, _ = small_engine(tmp_path, FEW)
    engine._validate(0, Metrics(None))
    engine._save_checkpoint(1)
    path = tmp_path / "checkpoint-1" / "meta.json"
    meta = json.loads(path.read_text())
    changes = {
        "poe-cascade of an older version": {"layout": None, "version": None},
        "poe-cascade 99": {"layout": 99, "version": "99"},
        "cannot continue it": {"history": {"steps": [], "unknown": 1}},
        r"cannot continue it \(KeyError": {"history": None, "identity": None},
    }
    for message, change in changes.items():
        path.write_text(json.dumps({k: v for k, v in {**meta, **change}.items() if v is not None}))
        with pytest.raises(TrainingError, match=message):
            small_engine(tmp_path, FEW)[0].run(resume=True)


def test_no_run_writes_into_a_folder_that_another_run_uses(demo_base: Path, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        with atomic_folder(folder):
            pass

    cascade = Cascade.from_pretrained(demo_base)
    runs = {
        "train": lambda: train_stage(cascade, "demo", "demo=40", tmp_path, progress=QUIET),
        "resume": lambda: train_stage(cascade, "demo", "demo=40", tmp_path, resume=True, progress=QUIET),
        "sweep": lambda: sweep(cascade, "demo", {"num_layers": [1]}, "demo=40", tmp_path, resume=True, progress=QUIET),
        "save": lambda: write(tmp_path),
    }
    with hold(tmp_path / LOCK, create=True):
        for run in runs.values():
            with pytest.raises(OutputError, match="in use by another process"):
                run()


@pytest.mark.parametrize("moves", mostly_slow(range(0, 20, 3), [3]))
def test_a_stage_that_is_compressed_in_place_opens_after_a_kill(moves: int, saved_base, tmp_path: Path) -> None:
    """Between any two files that take their names."""
    cascade = Cascade.from_pretrained(saved_base()).add_stage(name="t", num_layers=1, head="dense")
    folder = cascade.save_stage("t", tmp_path / "t")
    cascade.stages["t"].head.weight.data.normal_()
    cascade.compress_head("t", 2)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        real, left = os.replace, iter(range(moves))

        def replace(source, target):
            if saves.COMPLETE_SAVE in str(source) and next(left, None) is None:
                raise SystemExit
            real(source, target)

        patch.setattr(os, "replace", replace)
        cascade.save_stage("t", folder)
    assert Cascade.from_pretrained(saved_base()).load_stage(folder).stages["t"].config.head == "low_rank"
    assert not list(folder.glob(".poe-*"))


def test_a_sweep_does_not_empty_the_folder_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "num_layers=1").mkdir()
    (tmp_path / "num_layers=1" / "metrics.jsonl").write_text("{}\n")
    with hold(tmp_path / "num_layers=1" / LOCK, create=True), pytest.raises(OutputError, match="in use by"):
        sweep_module._remove_all_but(tmp_path / "num_layers=1")
    assert (tmp_path / "num_layers=1" / "metrics.jsonl").is_file()


def test_a_page_of_statistics_and_its_picture_are_written_both_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    def refuse(path: Path, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(statistics_page, "_plot", lambda counted: b"png")
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(OutputError, match=r"page\.\w+ could not be written: No space left"):
        statistics_page.write_page(tmp_path / "page.md", [], DropReport(), [])
    assert not list(tmp_path.iterdir())


COMMANDS = {
    "fold": "poe fold demo --out {}",
    "compress": "poe compress demo --int8 --out {}",
    "native": "poe export demo --native {}",
    "peft": "poe export demo --peft {}",
    "invocation": "poe export demo --peft {} --invocation x",
    "cognica": "poe import cognica . {} --base demo",
    "import": "poe import peft . {} --base demo",
    "nanochat": "poe import nanochat . {}",
    "stats": "poe data stats demo --out {}.html",
    "rows": "poe data export demo {}.jsonl",
    "calibrate": "poe calibrate demo --out {}",
}


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_a_command_that_cannot_write_its_result_fails_before_it_works(line: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("mine")
    worked = AssertionError("it worked before it looked at its output")
    monkeypatch.setattr(Cascade, "from_pretrained", fail_at_call(1, None, worked))
    monkeypatch.setattr("poe.data.corpus.read_corpus", fail_at_call(1, None, worked))
    monkeypatch.setattr("poe.loaders.nanochat_base.import_nanochat", fail_at_call(1, None, worked))
    program, *words = line.format(tmp_path / "file" / "result").split()
    done = run_program(program, *words)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'file'} is a file: expected a folder")


BROKEN_DATA = {
    "sweep": "poe-train sweep demo --try num_layers=1,2 --base {base} --data messages={data} --out {out}",
    "base": "poe-train base text --data text={data} --out {out}",
    "stats": "poe data stats messages={data} --base {base} --out {out}/page.html",
    "rows": "poe data export messages={data} {out}/rows.jsonl",
}


@pytest.mark.parametrize("command", mostly_slow(BROKEN_DATA, ["sweep", "base"]))
def test_a_command_that_fails_in_its_data_leaves_no_folder(command: str, demo_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"messages": 3}\nnot json\n')
    line = BROKEN_DATA[command].format(base=demo_base, data=data, out=tmp_path / "runs" / "new")
    done = run_program(*line.split())
    assert done.returncode == 1
    assert "No row of the data source" in done.stderr or "text" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [data]


POOL = """
import os, time
from poe.data.workers import ordered_map
def work(task):
    os.write(1, f"{os.getpid()}\\n".encode())  # one write, as two processes share the pipe
    time.sleep(60)
list(ordered_map(work, range(4), 2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
def test_workers_end_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", POOL], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    alive = [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    for worker in alive:
        os.kill(worker, signal.SIGKILL)
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("stderr", ["full", "closed"])
def test_a_run_without_standard_streams_is_a_run(demo_base: Path, tmp_path: Path, stderr: str) -> None:
    """Results that cannot be delivered are exit code 1, and the stage is there."""
    words = stage_command(demo_base, tmp_path / "run", "--max-steps", "2", data="demo=60")
    redirected = "2>/dev/full" if stderr == "full" else "2>&-"
    line = f"{' '.join(words)} >/dev/full {redirected}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["sh", "-c", line], env=environment, check=False, timeout=300)
    assert done.returncode == 1
    assert Cascade.from_pretrained(tmp_path / "run").active == "demo"


@pytest.mark.slow
def test_a_terminal_that_closes_saves_the_run(demo_base: Path, tmp_path: Path) -> None:
    words = stage_command(demo_base, tmp_path / "run", "--max-steps", "400", data="demo=60")
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=restore_sighup)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 130
    assert list_checkpoints(tmp_path / "run")


def restore_sighup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
