"""Several processes as one run: the numbers of a single process, each row once, and errors that end all of them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import distributed_worker
from conftest import demo_tokenizer, tiny_base
from distributed_worker import DATA, FIELDS, STEPS
from poe import Cascade, train_stage
from poe.errors import RecipeError, TrainingError
from poe.loaders.base import save_base_folder
from poe.modeling.modeling_poe import PoEConfig, PoEForCausalLM
from poe.stages import load_recipe
from poe.training.checkpoints.files import has_checkpoint
from poe.training.parallel.distributed import SINGLE_PROCESS, World, count_rows_per_step, join_world
from poe.training.parallel.sharding import is_sharded, shard_base
from poe.training.reporting.progress import Progress
from poe.training.step import TrainingStep

PROGRAM = str(Path(__file__).with_name("distributed_worker.py"))
LOST = "Another of the 2 processes stopped"


@given(st.integers(1, 9), st.integers(1, 60))
def test_the_rows_of_a_step_go_to_one_process_each(size: int, each: int) -> None:
    rows = list(range(size * each))
    parts = [rows[World(rank, size).own_rows(len(rows))] for rank in range(size)]
    assert [row for part in parts for row in part] == rows
    assert {len(part) for part in parts} == {each}


@given(st.integers(1, 9), st.integers(0, 200), st.integers(1, 20))
def test_validation_rows_are_split_into_equally_many_parts_per_process(size: int, rows: int, at_once: int) -> None:
    parts = [list(World(rank, size).split_rows(rows, at_once)) for rank in range(size)]
    assert sorted(row for process in parts for part in process for row in part) == list(range(rows))
    assert len({len(part) for part in parts}) == 1  # all processes must run a sharded layer together
    assert all(len(part) <= at_once for process in parts for part in process)


def test_a_single_process_takes_every_row() -> None:
    assert list(SINGLE_PROCESS.split_rows(7, 3)) == [range(3), range(3, 6), range(6, 7)]
    assert SINGLE_PROCESS.all_reduce(1.5, 2) == [1.5, 2]
    assert SINGLE_PROCESS.any_process(False, True) == [False, True]


@given(st.integers(1, 12), st.integers(1, 40))
def test_uneven_step_is_refused_with_sizes_that_fit(size: int, rows: int) -> None:
    plan = load_recipe("demo", seq_len=64, tokens_per_step=64 * rows)
    if rows % size == 0:
        assert count_rows_per_step(plan, World(size=size)) == rows
        return
    with pytest.raises(RecipeError, match="cannot share evenly") as refusal:
        count_rows_per_step(plan, World(size=size))
    suggested = int(re.search(r"such as (\d+)", str(refusal.value)).group(1))
    assert count_rows_per_step(plan.replace(tokens_per_step=suggested), World(size=size)) % size == 0
    numbers = [int(n) for n in re.search(r"processes: ([\d, ]+)\.", str(refusal.value)).group(1).split(",")]
    assert all(count_rows_per_step(plan, World(size=n)) == rows for n in numbers)


def run_in_threads(size: int, per_node: int, act: Callable[[World], object]) -> list[object]:
    """Return the result or the error of `act` in each of `size` threads, which share a store as processes do."""
    store = dist.HashStore()
    results: list[object] = [None] * size

    def work(rank: int) -> None:
        try:
            results[rank] = act(World(rank, size, rank % per_node, store=store))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in reversed(range(size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def test_main_process_runs_first_and_then_one_process_per_node() -> None:
    order: list[int] = []

    def prepare(world: World) -> None:
        with world.main_process_first():
            time.sleep(0.02)
            order.append(world.rank)

    run_in_threads(6, 2, prepare)
    assert order[0] == 0
    assert sorted(order) == list(range(6))
    for rank in (1, 3, 5):  # after the first of its node
        assert order.index(rank) > order.index(rank - 1)


def test_failure_of_the_main_process_ends_all_and_is_reported_once() -> None:
    reports: list[str] = []

    def prepare(world: World) -> None:
        try:
            with world.main_process_first():
                assert world.is_main, "only the main process may enter the block"
                raise RecipeError("there is no such thing")
        except (RecipeError, TrainingError) as error:
            with world.report_once(str(error)) as is_reporter:
                if is_reporter:
                    reports.append(f"{world.rank}: {error}")
            raise

    results = run_in_threads(4, 2, prepare)
    assert [str(error) for error in results] == ["there is no such thing"] * 4
    assert reports == ["0: there is no such thing"]


def test_different_options_of_processes_are_refused_with_the_differences() -> None:
    results = run_in_threads(2, 2, lambda world: world.check_equal({"seed": world.rank, "rows": 7}))
    assert results[0] is None
    assert isinstance(results[1], TrainingError)
    assert "seed: 0 -> 1" in str(results[1])
    assert "rows" not in str(results[1])


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_incomplete_launcher_environment_is_refused(monkeypatch, missing: str) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(TrainingError, match=f"{missing} is not set"), join_world():
        pass


def test_launcher_of_one_process_creates_no_group(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join_world() as world:
        assert (world.size, world.group) == (1, None)
        assert not dist.is_initialized()


def test_base_that_cannot_be_sharded_is_refused_and_stays_whole() -> None:
    recurrent = Cascade(tiny_base("hrm"))
    with pytest.raises(RecipeError, match="recurrent"):
        shard_base(recurrent, SINGLE_PROCESS)
    spread = Cascade(tiny_base("qwen3"))
    spread.base.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(RecipeError, match="device_map"):
        shard_base(spread, SINGLE_PROCESS)
    assert not is_sharded(recurrent.base)
    assert not is_sharded(spread.base)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random base with the demo's tokenizer and template."""
    torch.manual_seed(0)
    tokenizer = demo_tokenizer()
    config = PoEConfig(vocab_size=600, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, eos_token_id=1)
    return save_base_folder(PoEForCausalLM(config), tmp_path_factory.mktemp("base") / "base", tokenizer)


def launch(launcher: list[str], *args: str) -> subprocess.Popen[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", *launcher, f"--{'main_process' if 'accelerate' in launcher[0] else 'master'}"]
    program[-1] += "_port" if "accelerate" in launcher[0] else "-port"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*program, str(port), PROGRAM, *args], env=environment, **pipes)


TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2"]
# --multi_gpu starts several processes on one machine, CPU processes if there is no GPU
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"]
ACCELERATE += ["--num_machines", "1", "--dynamo_backend", "no"]


def alone(base: Path, out: Path, **fields) -> tuple[list[float], list[float], Cascade]:
    """Return losses and validation losses of a single process, and its cascade."""
    cascade = Cascade.from_pretrained(base, dtype=torch.float32)
    plan = {**FIELDS, **fields}
    run = train_stage(cascade, "demo", DATA, out, progress=Progress("test", quiet=True), **plan)
    return [r["loss"] for r in run.history.steps], [r["val_loss"] for r in run.history.evals], cascade


def test_two_processes_train_like_one_with_whole_and_sharded_base(base: Path, tmp_path: Path, monkeypatch):
    process = launch(TORCHRUN, str(tmp_path), str(base))
    output = process.communicate(timeout=500)[0]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]

    monkeypatch.setattr(TrainingStep, "_micro_batches", TrainingStep._micro_batches)
    seen = distributed_worker.rows_seen()
    losses, evals, cascade = alone(base, tmp_path / "alone", max_steps=STEPS)
    for run in ("plain", "divided"):
        for rank in ranks:
            assert rank[run]["losses"] == pytest.approx(losses, abs=1e-5)
            assert rank[run]["evals"] == pytest.approx(evals, abs=1e-5)
        assert ranks[0][run] == {**ranks[1][run], "bytes": ranks[0][run]["bytes"]}

    # the rows of every step are those of one process, each in one of the two
    assert len(ranks[0]["rows"]) == len(ranks[1]["rows"]) == len(seen) == STEPS
    for own, other, all_rows in zip(ranks[0]["rows"], ranks[1]["rows"], seen, strict=True):
        assert own + other == all_rows
        assert len(own) == len(other)

    layers = sum(p.numel() * p.element_size() for p in cascade.base.model.layers.parameters())
    for rank in ranks:
        whole, here = rank["divided"]["bytes"]
        assert here == whole - layers // 2
        assert rank["plain"]["bytes"] == [whole, whole]
    for run in ("plain", "divided"):
        assert ranks[0][run]["evaluation"] == distributed_worker.answer(cascade, "demo", {})

    deltas = [(tmp_path / run / "delta.safetensors").read_bytes() for run in ("plain", "divided")]
    assert deltas[0] == deltas[1]
    assert Cascade.from_pretrained(tmp_path / "divided").active == "demo"
    steps = [json.loads(line)["step"] for line in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted([*range(STEPS + 1), 3, 6])  # each written once
    assert json.loads((tmp_path / "plain" / "training.json").read_text())["processes"] == 2

    assert process.returncode == 1
    assert "the second process failed" in output  # an error of any process is shown
    assert output.count(LOST) >= 1


@pytest.mark.slow
def test_run_resumes_with_another_number_of_processes(base: Path, tmp_path: Path) -> None:
    out, steps = tmp_path / "out", 90
    fields = {**FIELDS, "max_steps": steps, "checkpoint_every": 0.2, "validation_every": 45}
    options = [part for k, v in fields.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    command = ["train", "stage", "demo", "--no-eval", "--base", str(base), "--out", str(out), "--data", DATA, *options]

    killed = launch(TORCHRUN, *command)
    wait_for_steps(out, 20, killed)
    os.kill(worker(killed, rank=1), signal.SIGKILL)
    output = killed.communicate(timeout=120)[0]  # the timeout fails the test if the run hangs
    assert killed.returncode != 0
    assert output.count(LOST) == output.count("--resume") == 1
    assert has_checkpoint(out)
    assert not (out / "delta.safetensors").exists()

    stopped = launch(ACCELERATE, *command, "--resume")
    wait_for_steps(out, 50, stopped)
    stopped.send_signal(signal.SIGTERM)
    output = stopped.communicate(timeout=120)[0]
    assert stopped.returncode != 0
    assert output.count("Stopped; saved at step") == 1
    assert "2 processes" in output

    run = [alone(base, tmp_path / "whole", **fields), alone(base, out, **fields, resume=True)]
    assert run[1][0] == pytest.approx(run[0][0], abs=1e-5)
    assert run[1][1] == pytest.approx(run[0][1], abs=1e-5)


def wait_for_steps(out: Path, steps: int, process: subprocess.Popen[str]) -> None:
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count('"loss"') >= steps:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    raise AssertionError(f"no {steps} steps in three minutes")


def worker(launcher: subprocess.Popen[str], rank: int) -> int:
    """Return the process id of a rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            environment = folder.joinpath("environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher.pid and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"the launcher has no process of rank {rank}")


def test_a_device_is_not_chosen_for_the_processes_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match="does not apply to the 2 processes"), join_world("cpu"):
        pass
