"""The training loop that bases and stages share: step, schedule, validation, checkpoints, interruption."""

import math
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from poe.data.packing import Batch
from poe.modeling.families import logits_of
from poe.modeling.placement import device_of
from poe.stages.recipe import BaseRecipe, Plan
from poe.training.checkpoint import (
    has_checkpoint,
    load_checkpoint,
    optimizer_tensors,
    remove_checkpoints,
    restore_optimizer,
    save_checkpoint,
)
from poe.training.estimate import (
    estimate_line,
    estimate_run,
    estimate_table,
    memory_peak,
    readable,
    refuse_full_disk,
)
from poe.training.guard import check_step, check_weights
from poe.training.hidden import FromBoundary, Hidden, Whole
from poe.training.identity import refuse_another, run_identity
from poe.training.loss import cross_entropy_sum, per_label_losses
from poe.training.metrics import Metrics
from poe.training.optim import build_optimizer
from poe.training.progress import Progress
from poe.training.rng import restore_rng, rng_state
from poe.training.schedule import apply_lr, apply_momentum, lr_factor, muon_momentum
from poe.training.tracking import Trackers


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

    # step, epoch, loss (nats), lr_factor, grad_norm, tokens_per_s
    steps: list[dict[str, float]] = field(default_factory=list)
    evals: list[dict[str, float]] = field(default_factory=list)  # step, val_bpb, val_loss (nats per trained token)
    best_step: int = -1
    best_bpb: float = math.inf
    seconds: float = 0.0
    tokens: int = 0  # slots that went through the network, padding included
    eval_seconds: float = 0.0
    peak_bytes: int = 0  # of memory, over all processes that took part one after the other
    estimate: dict[str, Any] = field(default_factory=dict)  # what was said before the first step
    name: str = ""  # what trackers know the run by

    @property
    def actual(self) -> dict[str, Any]:
        """What happened, under the names of the estimate."""
        return {"tokens": self.tokens, "seconds": self.seconds + self.eval_seconds, "memory_bytes": self.peak_bytes}


class Engine:
    """Trains `parameters` of `model` on `train`, measures `val`, and leaves the best weights in the model.

    `parameters` are (name, parameter) pairs, all that will be saved; `token_bytes` (V,) counts the UTF-8 bytes of every
    token, 0 for special ones, which is what bits per byte are per. `run` is the folder for the checkpoints and
    metrics.jsonl. Every row is (B, T) tokens; `plan` says how many make a step. `hidden` are the sources of normalised
    hidden states for training and for validation (default: the whole model). `facts` are what else makes this run what
    it is (the base's fingerprint): a checkpoint with others is not continued. `result_bytes` is the size of the file to
    be written, for the estimate. `trackers` are told what metrics.jsonl is told.
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
        *,
        hidden: tuple[Hidden, Hidden] | None = None,
        facts: Mapping[str, str] | None = None,
        result_bytes: int | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        self.model, self.plan, self.train, self.val, self.run_folder = model, plan, train, val, run
        self.parameters = list(parameters)
        self.token_bytes = token_bytes
        self.logits = logits_of(model.config)
        self.num_steps = num_steps
        self.progress = progress
        self._hidden, self._val_hidden = hidden or (Whole(model, plan.compile), Whole(model))
        self.facts, self.result_bytes = dict(facts or {}), result_bytes
        self.trackers = trackers or Trackers({}, progress.note)
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
            matrix_optimizer=plan.matrix_optimizer,
            **rates,
        )
        names = {id(p): name for name, p in self.parameters}
        self._names = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        self.history = History()
        self.best: dict[str, Tensor] = {}
        self._stop_requested = False

    def run(self, resume: bool = False) -> History:
        """Train to the end. Raises `Interrupted` after saving, `TrainingError` for numbers that are not finite."""
        first = step = self._restore() if resume and has_checkpoint(self.run_folder) else 0
        self._announce()
        self.progress.start(step, self.num_steps, self.train.num_rows / self.rows_per_step)
        last_save = time.monotonic()
        known = [*self.history.evals, *self.history.steps]
        with self._signals(), self._tracked(step), Metrics(self.run_folder, known, self.trackers.log) as metrics:
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
                momentum = {"start": self.plan.momentum_start, "momentum": self.plan.momentum}
                apply_momentum(self.optimizer, muon_momentum(step, self.num_steps, warmup=self.plan.warmup, **momentum))
                loss, norm, slots = self._step(step)
                elapsed = time.perf_counter() - started
                step += 1
                self.history.seconds += elapsed
                self.history.tokens += slots
                record = {
                    "step": step,
                    "epoch": round(step * self.rows_per_step / self.train.num_rows, 4),
                    "loss": loss,
                    "grad_norm": norm,
                    "lr_factor": factor,
                    "tokens_per_s": slots / elapsed,
                }
                self.history.steps.append(record)
                metrics.write(record)
                self.progress.step(step, loss, slots / elapsed)
                if step == 3 and first == 0:
                    self._refine_estimate(elapsed)
                if step % self.plan.eval_every == 0 or step == self.num_steps:
                    self._evaluate(step, metrics)
                due = time.monotonic() - last_save >= self.plan.checkpoint_every
                if self._stop_requested or (due and step < self.num_steps):
                    self._save(step)
                    last_save = time.monotonic()
                if self._stop_requested:
                    raise Interrupted
        self._save(step)  # until the result is written, a crash must not cost the run
        self._load_best()
        return self.history

    def clean_up(self) -> None:
        """Remove the checkpoints; call it when the result is on disk."""
        remove_checkpoints(self.run_folder)

    def _announce(self) -> None:
        """Say what the run will take; refuse to start where what it writes could not be kept."""
        estimate = estimate_run(
            self.model,
            self.parameters,
            self.optimizer,
            self.plan,
            self.train,
            self.val,
            self.num_steps,
            self._hidden,
            self.result_bytes,
            cached=isinstance(self._hidden, FromBoundary),
        )
        refuse_full_disk(self.run_folder, estimate.disk_bytes)
        if not self.history.estimate:  # a run that is continued keeps what was said when it began
            self.history.estimate = estimate.as_dict()
            self.history.name = f"{self.run_folder.absolute().name}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.progress.table(estimate_table(self.history.estimate), estimate_line(self.history.estimate))

    def _refine_estimate(self, step_seconds: float) -> None:
        """The time again, now that some steps and a validation were measured."""
        measures = 1 + math.ceil(self.num_steps / self.plan.eval_every)
        seconds = step_seconds * self.num_steps + self.history.eval_seconds * measures
        self.history.estimate["seconds_after_3_steps"] = round(seconds, 1)
        self.progress.note(f"after 3 steps: about {readable('seconds', seconds)} for the whole run")

    @contextmanager
    def _tracked(self, step: int) -> Iterator[None]:
        """Whatever ends the run: trackers are finished, and the bars are taken down."""
        self.trackers.start(self.history.name, self.plan.as_dict(), self.run_folder, step)
        try:
            yield
        finally:
            self.trackers.finish()
            self.progress.stop()

    @property
    def _device(self) -> torch.device:
        return device_of(self.model.get_input_embeddings())

    def _batches(self, batch: Batch) -> Iterator[Batch]:
        device = self._device
        for parts in zip(*(t.split(self.rows_per_batch) for t in batch), strict=True):
            yield Batch(*(part.to(device) for part in parts))

    def _step(self, step: int) -> tuple[float, float, int]:
        """One optimiser step; returns the loss (nats per trained token), the gradients' norm, the number of slots."""
        self.model.train()
        batch = self.train.batch(step, self.rows_per_step)
        loss = self._accumulate(batch)
        norm = float(self.optimizer.clip_grad_norm_(self.plan.max_grad_norm))
        check_step(step + 1, loss, norm, self.model, self.parameters, lambda: self._replay(batch))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm, batch.input_ids.numel()

    def _accumulate(self, batch: Batch) -> float:
        """Leave the gradients of the mean loss in the parameters, micro-batch by micro-batch; return that mean."""
        trained = max(int((batch.labels != -100).sum()), 1)
        losses = []
        for part in self._batches(batch):
            hidden, head = self._hidden(part), self._head
            loss = cross_entropy_sum(hidden, head.weight, part.labels, self.logits, head.bias, z_loss=self.plan.z_loss)
            (loss / trained).backward()
            losses.append(loss.detach())
        return sum(loss.item() for loss in losses) / trained  # read at the end: a GPU is not made to wait in between

    def _replay(self, batch: Batch) -> None:
        for part in self._batches(batch):
            self._hidden(part)

    @property
    def _head(self) -> Any:
        """The output embeddings: `weight` (V, D), folded in a grown model, and `bias` (V,) or None."""
        return self.model.get_output_embeddings()

    @torch.no_grad()
    def _evaluate(self, step: int, metrics: Metrics) -> None:
        started = time.perf_counter()
        if self.val is None:
            self.best_snapshot(step, math.inf)
            return
        self.model.eval()
        nats = bits = 0.0
        labels_seen = bytes_seen = 0
        for start in range(0, self.val.num_rows, self.rows_per_batch):
            count = min(self.rows_per_batch, self.val.num_rows - start)
            rows = [self.val.batch(start + i, 1) for i in range(count)]
            part = Batch(*(torch.cat(tensors).to(self._device) for tensors in zip(*rows, strict=True)))
            losses = per_label_losses(
                self._val_hidden(part), self._head.weight, part.labels, self.logits, self._head.bias
            ).double()
            sizes = self.token_bytes.to(part.labels.device)[part.labels[part.labels != -100]]
            nats += losses.sum().item()
            labels_seen += losses.numel()
            bits += losses[sizes > 0].sum().item() / math.log(2)
            bytes_seen += int(sizes.sum())
            self.progress.evaluating(start + count, self.val.num_rows)
        record = {"step": step, "val_bpb": bits / max(bytes_seen, 1), "val_loss": nats / max(labels_seen, 1)}
        self.history.evals.append(record)
        self.history.eval_seconds += time.perf_counter() - started
        metrics.write(record)
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

    @cached_property
    def _identity(self) -> dict[str, Any]:
        rows = {"training": self.train, "validation": self.val}
        return run_identity(self.plan, self.num_steps, rows, self.parameters, self.facts)

    def _save(self, step: int) -> None:
        check_weights(step, self.parameters)
        tensors, numbers = optimizer_tensors(self.optimizer, self._names)
        generators, generator_numbers = rng_state()
        self.history.peak_bytes = max(self.history.peak_bytes, memory_peak(self._device))
        groups: dict[str, Mapping[str, Tensor]] = {
            "weights": dict(self.parameters),
            "optimizer": tensors,
            "rng": generators,
        }
        if self.history.best_step != step:  # else the weights are the best ones
            groups["best"] = self.best
        meta = {
            "step": step,
            "identity": self._identity,
            "history": self.history.__dict__,
            "optimizer": numbers,
            "rng": generator_numbers,
        }
        save_checkpoint(self.run_folder, step, groups, meta, self.plan.keep_checkpoints)

    @torch.no_grad()
    def _restore(self) -> int:
        groups, meta = load_checkpoint(self.run_folder, self.progress.note)
        refuse_another(meta["identity"], self._identity, self.run_folder)
        for name, parameter in self.parameters:
            parameter.copy_(groups["weights"][name])
        self.best = groups.get("best") or groups["weights"]
        restore_optimizer(self.optimizer, self._names, groups["optimizer"], meta["optimizer"])
        restore_rng(groups["rng"], meta["rng"])
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
