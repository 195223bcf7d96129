"""Checkpoints: after a kill or an error at any moment, the next run continues from the newest whole checkpoint."""

import errno
import json
import multiprocessing
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from poe.errors import OutputError, TrainingError
from poe.training.checkpoints import files as checkpoint
from poe.training.checkpoints.files import (
    begin_checkpoint,
    finish_checkpoint,
    has_checkpoint,
    list_checkpoints,
    load_checkpoint,
    remove_checkpoints,
    step_of,
    write_group,
)
from poe.training.checkpoints.rng import restore_rng, rng_state
from poe.training.engine import Engine
from poe.training.reporting.metrics import Metrics, read_metrics
from small_run import PLAN, rows, small_engine, stop_after, train

TIMED = ("tokens_per_s",)


def write_checkpoint(run: Path, step: int, keep: int = 1) -> Path:
    new = begin_checkpoint(run, step)
    write_group(new, "weights", {"w": torch.full((64,), float(step))})
    return finish_checkpoint(new, {"step": step}, keep)


def read_metrics_without_times(run: Path) -> list[dict]:
    """Return the lines of metrics.jsonl in order, without the values that depend on time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMED} for record in lines]


@pytest.mark.parametrize("num_kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_run_killed_at_any_moment_ends_with_the_bytes_of_an_uninterrupted_run(tmp_path: Path, num_kills: int) -> None:
    """Half of the kills come at a random moment, half at a random operation of writing a checkpoint."""
    processes = multiprocessing.get_context("forkserver")  # imports torch once and forks every run
    processes.set_forkserver_preload(["poe.training.trainer", "transformers.models.llama.modeling_llama"])
    chance = random.Random(os.getpid())

    def started(run: Path, deadly_operation: int | None = None) -> tuple[multiprocessing.Process, object]:
        listening, telling = processes.Pipe(duplex=False)
        process = processes.Process(target=train, args=(run, telling, deadly_operation))
        process.start()
        telling.close()
        return process, listening

    undisturbed, _ = started(tmp_path / "whole")
    undisturbed.join(120)
    assert undisturbed.exitcode == 0
    kills = runs = 0
    while kills < num_kills:
        run = tmp_path / f"killed-{(runs := runs + 1)}"
        finished = False
        while not finished:
            at_operation = chance.randrange(1, 40) if kills % 2 and kills < num_kills else None
            process, listening = started(run, at_operation)
            if at_operation is None and kills < num_kills:
                listening.poll(60)
                process.join(chance.random() * 0.1)
                process.kill()
            process.join(120)
            finished = process.exitcode == 0
            assert finished or process.exitcode == -9, process.exitcode
            kills += not finished
        assert (run / "delta.safetensors").read_bytes() == (tmp_path / "whole" / "delta.safetensors").read_bytes()
        assert read_metrics_without_times(run) == read_metrics_without_times(tmp_path / "whole")
        assert not list(run.glob("checkpoint*"))


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (5, 9, 10, 100):  # ordered by number, not by name
        write_checkpoint(tmp_path, step, keep=2)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [100, 10]
    remove_checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TrainingError, match="there is no checkpoint"):
        load_checkpoint(tmp_path)


def damage_missing(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()


def damage_truncated(folder: Path) -> None:
    os.truncate(folder / "weights.safetensors", 100)


def damage_a_bit(folder: Path) -> None:
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(data)


def damage_meta(folder: Path) -> None:
    (folder / "meta.json").write_text('{"step": 2')


def damage_meta_away(folder: Path) -> None:
    (folder / "meta.json").unlink()


def damage_meta_kind(folder: Path) -> None:
    (folder / "meta.json").write_text("[]")


DAMAGES = [damage_missing, damage_truncated, damage_a_bit, damage_meta, damage_meta_away, damage_meta_kind]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_reported_and_the_previous_one_loaded(damage, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, keep=2)
    damage(write_checkpoint(tmp_path, 2, keep=2))
    notes: list[str] = []
    groups, meta = load_checkpoint(tmp_path, notes.append)
    assert meta["step"] == 1
    assert groups["weights"]["w"][0] == 1
    assert len(notes) == 1
    assert "checkpoint-2 is not whole" in notes[0]
    write_checkpoint(tmp_path, 2)  # the resumed run reaches this step again
    assert load_checkpoint(tmp_path)[1]["step"] == 2
    damage(tmp_path / "checkpoint-2")
    with pytest.raises(TrainingError, match="checkpoint-2 is not whole"):
        load_checkpoint(tmp_path)


def test_damaged_later_checkpoint_is_removed_by_the_next_write(tmp_path: Path) -> None:
    """Otherwise the damaged checkpoint would be the only one kept."""
    write_checkpoint(tmp_path, 1, keep=2)
    damage_truncated(write_checkpoint(tmp_path, 9, keep=2))
    write_checkpoint(tmp_path, 2, keep=1)
    assert load_checkpoint(tmp_path)[1]["step"] == 2


@pytest.mark.parametrize("operation", range(1, 8))
def test_full_disk_keeps_the_old_checkpoint_and_no_partial_files(operation, tmp_path, monkeypatch) -> None:
    write_checkpoint(tmp_path, 1)
    left = operation

    def full(real):
        def call(*args, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full(checkpoint.save_file))
        patch.setattr(os, "fsync", full(os.fsync))
        patch.setattr(Path, "mkdir", full(Path.mkdir))
        patch.setattr(Path, "rename", full(Path.rename))
        patch.setattr(checkpoint, "_digest", full(checkpoint._digest))
        with pytest.raises(OutputError, match=r"checkpoint-2 could not be written.*No space left"):
            write_checkpoint(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert load_checkpoint(tmp_path)[1]["step"] == 1


def test_every_random_generator_is_restored() -> None:
    before = rng_state()
    drawn = (random.random(), random.gauss(0, 1), np.random.random(), np.random.normal(), torch.rand(1).item())
    tensors, numbers = before
    restore_rng(tensors, json.loads(json.dumps(numbers)))  # as in a file
    again = (random.random(), random.gauss(0, 1), np.random.random(), np.random.normal(), torch.rand(1).item())
    assert again == drawn


def run_three_steps(run: Path, plan=PLAN, **options) -> Engine:
    """Return an engine that was stopped after its third step."""
    engine, _ = small_engine(run, plan, **options)
    stop_after(engine, 3)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    return engine


def test_best_weights_are_not_written_twice(tmp_path: Path) -> None:
    run_three_steps(tmp_path / "a", PLAN.replace(validation_every=3))
    best = json.loads((tmp_path / "a" / "checkpoint-3" / "meta.json").read_text())["history"]["best_step"]
    assert (tmp_path / "a" / "checkpoint-3" / "best.safetensors").exists() == (best != 3)
    run_three_steps(tmp_path / "b")  # no validation at step 3: the best weights are those of step 0
    assert (tmp_path / "b" / "checkpoint-3" / "best.safetensors").exists()
    engine, _ = small_engine(tmp_path / "a", PLAN.replace(validation_every=3))
    engine._load_checkpoint()
    assert set(engine.best_weights) == {name for name, _ in engine.trained.parameters}


@pytest.mark.parametrize(
    ("fields", "options", "difference"),
    [
        ({"matrix_lr": 0.5}, {}, "matrix_lr: 0.02 -> 0.5"),
        ({"max_steps": 121}, {}, "max_steps: 120 -> 121"),
        ({}, {"train": rows(40, 3)}, "training rows: "),
        ({}, {"facts": {"base": "another"}}, "base: 'one' -> 'another'"),
        ({"num_layers": 2}, {}, "num_layers: 1 -> 2"),
    ],
)
def test_checkpoint_of_another_run_is_refused(fields, options, difference: str, tmp_path: Path) -> None:
    facts = {"facts": {"base": "one"}}
    run_three_steps(tmp_path, **facts)
    engine, _ = small_engine(tmp_path, PLAN.replace(**fields), **(facts | options))
    with pytest.raises(TrainingError, match="belongs to another run") as refused:
        engine.run(resume=True)
    assert difference in str(refused.value)
    assert has_checkpoint(tmp_path)


def test_fields_that_do_not_change_the_result_may_change_on_resume(tmp_path: Path) -> None:
    run_three_steps(tmp_path)
    plan = PLAN.replace(keep_checkpoints=1, checkpoint_every=60.0, description="now with a word about it")
    engine, _ = small_engine(tmp_path, plan)
    assert engine._load_checkpoint() == 3


def test_metrics_start_with_the_checkpoint_history_and_skip_a_torn_line(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        for step in range(1, 4):
            metrics.write({"step": step, "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)[0]] == [1, 2, 3]
    records: list[dict] = []
    saved = [{"step": 2, "val_bpb": 2.0}, {"step": 0, "val_bpb": 3.0}, *({"step": s, "loss": 1.0} for s in (1, 2))]
    with Metrics(tmp_path, saved, records.append) as metrics:
        metrics.write({"step": 3, "loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], "val_bpb" in r) for r in lines] == [(0, True), (1, False), (2, False), (2, True), (3, False)]
    assert records == [{"step": 3, "loss": 0.5}]
