"""The training loop that bases and stages share: step, schedule, validation, checkpoints, interruption."""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from poe.data.packing import Batch
from poe.errors import OutputError, TrainingError
from poe.modeling.families import logits_of
from poe.modeling.placement import device_of
from poe.stages.recipe import BaseRecipe, Plan
from poe.training.checkpoint import (
    has_checkpoint,
    load_checkpoint,
    optimizer_tensors,
    remove_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from poe.training.distributed import ALONE, World
from poe.training.loss import cross_entropy_sum, per_label_losses
from poe.training.optim import build_optimizer
from poe.training.progress import Progress
from poe.training.schedule import apply_lr, lr_factor


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved a checkpoint."""


class Rows(Protocol):
    """Rows by step number: the same step gives the same rows, before and after a resume."""

    @property
    def num_rows(self) -> int: ...

    def batch(self, step: int, rows_per_step: int) -> Batch: ...


@dataclass
class History:
    """What happened so far; it is saved with every checkpoint and ends in training.json."""

    steps: list[dict[str, float]] = field(default_factory=list)  # step, loss (nats), lr_factor, tokens_per_s
    evals: list[dict[str, float]] = field(default_factory=list)  # step, val_bpb, val_loss (nats per trained token)
    best_step: int = -1
    best_bpb: float = math.inf
    seconds: float = 0.0
    tokens: int = 0  # slots that went through the network, padding included


class Engine:
    """Trains `parameters` of `model` on `train`, measures `val`, and leaves the best weights in the model.

    `parameters` are (name, parameter) pairs, all that will be saved; `token_bytes` (V,) counts the UTF-8 bytes of every
    token, 0 for special ones, which is what bits per byte are per. `run` is the folder for the checkpoint and
    metrics.jsonl. Every row is (B, T) tokens; `plan` says how many make a step. The processes of `world` share every
    step's rows, and only the main one writes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Iterable[tuple[str, nn.Parameter]],
        plan: Plan,
        train: Rows,
        val: Rows | None,
        token_bytes: Tensor,
        run: Path,
        num_steps: int,
        progress: Progress,
        world: World = ALONE,
    ) -> None:
        self.world = world
        self.model, self.plan, self.train, self.val, self.run_folder = model, plan, train, val, run
        self.parameters = list(parameters)
        self.token_bytes = token_bytes
        self.logits = logits_of(model.config)
        self.num_steps = num_steps
        self.progress = progress
        self.rows_per_step = plan.tokens_per_step // plan.seq_len
        self.rows_per_batch = max(1, plan.max_tokens_per_batch // plan.seq_len)
        rates: dict[str, Any] = {"matrix_lr": plan.matrix_lr, "head_lr": plan.head_lr}
        if isinstance(plan, BaseRecipe):
            rates = {"matrix_lr": plan.matrix_lr, "unembed_lr": plan.head_lr, "embed_lr": plan.embed_lr}
        self.optimizer = build_optimizer(
            self.parameters,
            model.config.hidden_size,
            weight_decay=plan.weight_decay,
            momentum=plan.momentum,
            **rates,
        )
        names = {id(p): name for name, p in self.parameters}
        self._names = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        self.history = History()
        self.best: dict[str, Tensor] = {}
        self._stop_requested = False

    @property
    def checkpoint(self) -> Path:
        return self.run_folder / "checkpoint"

    def run(self, resume: bool = False) -> History:
        """Train to the end. Raises `Interrupted` after saving, `TrainingError` for a loss that is not a number."""
        step = self._restore() if resume and has_checkpoint(self.checkpoint) else 0
        if self.world.is_main:
            self._check_disk()
        self.progress.start(step, self.num_steps)
        last_save = time.monotonic()
        with self._signals(), self._metrics_file.open("w", encoding="utf-8") as metrics:
            for record in sorted([*self.history.evals, *self.history.steps], key=lambda r: r["step"]):
                metrics.write(json.dumps(record) + "\n")  # what the checkpoint knows; what came after it is redone
            if step == 0:
                self._evaluate(0, metrics)
            while step < self.num_steps:
                started = time.perf_counter()
                factor = lr_factor(
                    step,
                    self.num_steps,
                    start=self.plan.start,
                    warmup=self.plan.warmup,
                    warmdown=self.plan.warmdown,
                    final=self.plan.final,
                )
                apply_lr(self.optimizer, factor)
                loss, slots = self._step(step)
                elapsed = time.perf_counter() - started
                step += 1
                self.history.seconds += elapsed
                self.history.tokens += slots
                record = {"step": step, "loss": loss, "lr_factor": factor, "tokens_per_s": slots / elapsed}
                self.history.steps.append(record)
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
                self.progress.step(step, loss, slots / elapsed)
                if step % self.plan.eval_every == 0 or step == self.num_steps:
                    self._evaluate(step, metrics)
                due = time.monotonic() - last_save >= self.plan.checkpoint_every
                stop, due = self.world.any_of(self._stop_requested, due)
                if stop or (due and step < self.num_steps):
                    self._save(step)
                    last_save = time.monotonic()
                if stop:
                    self.progress.stop()
                    raise Interrupted
        self._save(step)  # until the result is written, a crash must not cost the run
        self.progress.stop()
        self._load_best()
        return self.history

    def clean_up(self) -> None:
        """Remove the checkpoint; call it when the result is on disk."""
        remove_checkpoint(self.checkpoint)

    @property
    def _metrics_file(self) -> Path:
        return self.run_folder / "metrics.jsonl" if self.world.is_main else Path(os.devnull)

    def _check_disk(self) -> None:
        """Refuse to start where the result could not be kept: two checkpoints (old and new) and the weights."""
        numbers = sum(p.numel() for _, p in self.parameters)
        halves = any(p.element_size() < 4 for _, p in self.parameters)
        # weights and best weights, master copies, and at most two optimiser states in fp32
        checkpoint = 2 * sum(p.numel() * p.element_size() for _, p in self.parameters) + numbers * 4 * (
            3 if halves else 2
        )
        needed, free = 2 * checkpoint + 4 * numbers, shutil.disk_usage(self.run_folder).free
        if free < needed:
            raise OutputError(
                f"Not enough disk for {self.run_folder}: this run writes up to {needed / 2**20:,.0f} MiB, "
                f"{free / 2**20:,.0f} MiB are free. Free some space, or choose another folder with --out."
            )

    def _hidden(self, batch: Batch) -> Tensor:
        """(B, T) tokens -> normalised hidden states (B, T, D); documents in a row do not see each other."""
        backbone = getattr(self.model, self.model.base_model_prefix)
        return backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state

    @property
    def _device(self) -> torch.device:
        return device_of(self.model.get_input_embeddings())

    def _batches(self, batch: Batch) -> Iterator[Batch]:
        device = self._device
        for parts in zip(*(t.split(self.rows_per_batch) for t in batch), strict=True):
            yield Batch(*(part.to(device) for part in parts))

    def _step(self, step: int) -> tuple[float, int]:
        """One optimiser step; returns the mean loss in nats per trained token and the number of slots."""
        self.model.train()
        batch = self.train.batch(step, self.rows_per_step)
        trained = int((batch.labels != -100).sum())
        total = 0.0
        own = self.world.own_rows(self.rows_per_step)
        for part in self._batches(Batch(*(tensor[own] for tensor in batch))):
            loss = cross_entropy_sum(self._hidden(part), self._head.weight, part.labels, self.logits, self._head.bias)
            (loss / max(trained, 1)).backward()
            total += loss.item()
        (total,) = self.world.all_sum(total)
        loss_per_token = total / max(trained, 1)
        if not math.isfinite(loss_per_token):
            raise TrainingError(
                f"The loss of step {step + 1} is {loss_per_token}: expected a finite number. Lower the learning rates "
                "(matrix_lr, head_lr); the newest checkpoint, if any, was kept and --resume continues from it."
            )
        self.world.sum_gradients(p for _, p in self.parameters)
        if self.plan.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([p for _, p in self.parameters], self.plan.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss_per_token, batch.input_ids.numel()

    @property
    def _head(self) -> Any:
        """The output embeddings: `weight` (V, D), folded in a grown model, and `bias` (V,) or None."""
        return self.model.get_output_embeddings()

    @torch.no_grad()
    def _evaluate(self, step: int, metrics: Any) -> None:
        if self.val is None:
            self.best_snapshot(step, math.inf)
            return
        self.model.eval()
        nats = bits = 0.0
        labels_seen = bytes_seen = 0.0
        for numbers in self.world.shares(self.val.num_rows, self.rows_per_batch):
            # a part without rows goes through the network, too: the processes may have to bring its layers together
            rows = [self.val.batch(number, 1) for number in numbers] or [_unlabelled(self.val.batch(0, 1))]
            part = Batch(*(torch.cat(tensors).to(self._device) for tensors in zip(*rows, strict=True)))
            losses = per_label_losses(
                self._hidden(part), self._head.weight, part.labels, self.logits, self._head.bias
            ).to(part.labels.device, torch.float64)
            sizes = self.token_bytes.to(part.labels.device)[part.labels[part.labels != -100]]
            nats += losses.sum().item()
            labels_seen += losses.numel()
            bits += losses[sizes > 0].sum().item() / math.log(2)
            bytes_seen += int(sizes.sum())
        nats, bits, labels_seen, bytes_seen = self.world.all_sum(nats, bits, labels_seen, bytes_seen)
        record = {"step": step, "val_bpb": bits / max(bytes_seen, 1), "val_loss": nats / max(labels_seen, 1)}
        self.history.evals.append(record)
        metrics.write(json.dumps(record) + "\n")
        self.progress.evaluated(step, record["val_bpb"])
        self.best_snapshot(step, record["val_bpb"])

    def best_snapshot(self, step: int, bpb: float) -> None:
        """Keep a copy of the weights if they are the best so far (or if nothing is measured: the newest)."""
        if bpb < self.history.best_bpb or not self.best or self.val is None:
            self.history.best_step, self.history.best_bpb = step, bpb
            self.best = {name: p.detach().clone() for name, p in self.parameters}

    @torch.no_grad()
    def _load_best(self) -> None:
        for name, parameter in self.parameters:
            parameter.copy_(self.best[name])

    def _save(self, step: int) -> None:
        generators = self.world.gather(torch.get_rng_state())
        # an optimiser whose state is divided among the processes writes `optimizer-RANK` here, each its own
        if self.world.is_main:
            self._write_checkpoint(step, generators)
        self.world.barrier()  # none may leave, and so end the others, while it is being written

    def _write_checkpoint(self, step: int, generators: list[Tensor]) -> None:
        tensors, numbers = optimizer_tensors(self.optimizer, self._names)
        groups: dict[str, dict[str, Tensor]] = {
            "weights": dict(self.parameters),
            "best": self.best,
            "optimizer": tensors,
            "rng": {_generator(rank): state for rank, state in enumerate(generators)},
        }
        meta = {
            "step": step,
            "num_steps": self.num_steps,
            "plan": self.plan.as_dict(),
            "history": self.history.__dict__,
            "optimizer": numbers,
            "num_rows": self.train.num_rows,
        }
        save_checkpoint(self.checkpoint, groups, meta)

    @torch.no_grad()
    def _restore(self) -> int:
        groups, meta = load_checkpoint(self.checkpoint)
        mine: dict[str, Any] = {
            "plan": self.plan.as_dict(),
            "num_steps": self.num_steps,
            "num_rows": self.train.num_rows,
        }
        differing = [
            f"{k}: {meta['plan'].get(k)!r} -> {v!r}" for k, v in mine["plan"].items() if meta["plan"].get(k) != v
        ]
        differing += [f"{k}: {meta[k]} -> {mine[k]}" for k in ("num_steps", "num_rows") if meta[k] != mine[k]]
        if differing:
            raise TrainingError(
                f"The checkpoint {self.checkpoint} belongs to another run (then -> now): {'; '.join(differing)}. "
                "Resume with the options it was started with, or choose another output folder."
            )
        for name, parameter in self.parameters:
            parameter.copy_(groups["weights"][name])
        self.best = groups["best"]
        restore_optimizer(self.optimizer, self._names, groups["optimizer"], meta["optimizer"])
        if (state := groups["rng"].get(_generator(self.world.rank))) is not None:  # fewer processes may have saved it
            torch.set_rng_state(state)
        self.history = History(**meta["history"])
        return int(meta["step"])

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Finish the step in hand on the first Ctrl-C or SIGTERM; a second one stops at once."""

        def request(number: int, frame: FrameType | None) -> None:
            if self._stop_requested:
                raise KeyboardInterrupt
            self._stop_requested = True
            self.progress.note("stopping after this step; once more to stop at once")

        try:
            previous = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: signals are the caller's
            yield
            return
        try:
            yield
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)


def _unlabelled(batch: Batch) -> Batch:
    return batch._replace(labels=torch.full_like(batch.labels, -100))


def _generator(rank: int) -> str:
    """The name under which a checkpoint holds the state of a process's random generator."""
    return f"torch-{rank}" if rank else "torch"
