"""A small training run that a test can start in another process, kill at any moment, and continue."""

import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from poe import Cascade
from poe.data.packing import PackedRows, pack
from poe.stages import Recipe
from poe.training.checkpoints import files as checkpoint
from poe.training.engine import Engine
from poe.training.hidden_states.sources import whole_model_sources
from poe.training.reporting.progress import Progress
from poe.training.reporting.tracking import Trackers
from poe.training.run import RunContext, RunRows, RunSettings, TrainedModel

VOCABULARY = 61
PLAN = Recipe(
    name="small",
    num_layers=1,
    head="low_rank",
    head_rank=2,
    seq_len=16,
    tokens_per_step=32,
    max_steps=120,
    matrix_lr=0.02,
    validation_every=7,
    max_grad_norm=1.0,
    checkpoint_every=0.0,  # after every step
    keep_checkpoints=2,
    dtype="float32",
)


def rows(count: int, seed: int) -> PackedRows:
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, VOCABULARY, rng.integers(3, 16)) for _ in range(count)]
    return pack([(ids, np.ones(len(ids), bool)) for ids in documents], PLAN.seq_len, seed=seed)


def small_engine(
    run: Path,
    plan: Recipe = PLAN,
    train: PackedRows | None = None,
    facts: dict[str, str] | None = None,
    trackers: Trackers | None = None,
) -> tuple[Engine, Cascade]:
    """Return an engine that depends on seeds only, not on the time or the process."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    cascade = Cascade(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)))
    cascade.add_stage(plan, seed=plan.seed)
    stage = cascade.stages[plan.name]
    stage.requires_grad_(True)
    run.mkdir(parents=True, exist_ok=True)
    model = cascade.model(plan.name)
    token_bytes = torch.ones(VOCABULARY, dtype=torch.int64)
    parameters = list(stage.named_parameters())
    trained = TrainedModel(model, parameters, whole_model_sources(model, plan.compile), token_bytes)
    settings = RunSettings(run, plan.max_steps or 1, facts or {})
    context = RunContext(Progress("small", quiet=True), trackers or Trackers({}, print))
    return Engine(plan, trained, RunRows(train or rows(40, 1), rows(4, 2)), settings, context), cascade


def stop_after(engine: Engine, steps: int) -> None:
    """Let the engine receive a stop signal between its step number `steps` (from 1) and the next one."""
    take_step = engine._take_step

    def take_and_stop(step: int) -> Any:
        result = take_step(step)
        engine.stop.requested = step + 1 == steps
        return result

    engine._take_step = take_and_stop  # type: ignore[method-assign]


def train(run: Path, ready: Connection | None = None, deadly_operation: int | None = None) -> None:
    """Start or continue the run; with `deadly_operation` = n, kill this process at its n-th checkpoint operation.

    Send a message to `ready` when training begins.
    """
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # slow, and a killed process loses no written data
    if deadly_operation is not None:
        die_at(deadly_operation)
    engine, cascade = small_engine(run)
    if ready is not None:
        ready.send(None)
    engine.run(resume=checkpoint.has_checkpoint(run))
    cascade.save_stage(PLAN.name, run)
    engine.remove_checkpoints()


def die_at(operation: int) -> None:
    """Kill this process at the n-th operation that writes, renames or removes a checkpoint."""
    left = operation

    def killing(real: Callable[..., Any], halfway: Callable[..., None] = lambda *args: None) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                halfway(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    def write_half_a_file(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)

    def remove_half_a_folder(path: Path, *rest: Any) -> None:
        for file in sorted(path.iterdir())[::2] if path.is_dir() else []:
            file.unlink()

    save_file = checkpoint.save_file
    checkpoint.save_file = killing(save_file, write_half_a_file)
    shutil.rmtree = killing(shutil.rmtree, remove_half_a_folder)
    os.fsync = killing(os.fsync)
    os.rename = killing(os.rename)
