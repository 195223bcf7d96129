"""The training loop that bases and stages share: step, schedule, validation, the best weights."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from poe.data.packing import Batch, Rows
from poe.modeling.families import logits_of
from poe.modeling.placement import device_of
from poe.stages.recipe import BaseRecipe, Plan
from poe.training.checkpoints.files import has_checkpoint, remove_checkpoints
from poe.training.checkpoints.identity import check_same_run, run_identity
from poe.training.checkpoints.state import State, read_state, write_state
from poe.training.guard import check_step, check_weights
from poe.training.hidden_states.sources import FromBoundary, Hidden, Whole
from poe.training.interrupts import Interrupted, StopRequest
from poe.training.local import Prediction, Stagewise
from poe.training.loss import IGNORED, cross_entropy_sum, per_label_losses
from poe.training.optim import build_optimizer
from poe.training.parallel.distributed import ALONE, World
from poe.training.reporting.estimate import (
    estimate_line,
    estimate_run,
    estimate_table,
    memory_peak,
    readable,
    refuse_full_disk,
)
from poe.training.reporting.history import History
from poe.training.reporting.metrics import Metrics
from poe.training.reporting.progress import Progress
from poe.training.reporting.tracking import Trackers
from poe.training.schedule import apply_lr, apply_momentum, lr_factor, muon_momentum

__all__ = ["Engine", "Interrupted"]


class Engine:
    """Trains `parameters` of `model` on `train`, measures `val`, and leaves the best weights in the model.

    `parameters` are (name, parameter) pairs, all that will be saved; `token_bytes` (V,) counts the UTF-8 bytes of every
    token, 0 for special ones, which is what bits per byte are per. `run` is the folder for the checkpoints and
    metrics.jsonl. Every row is (B, T) tokens; `plan` says how many make a step. `hidden` are the sources of normalized
    hidden states for training and for validation (default: the whole model). `facts` are what else makes this run what
    it is (the base's fingerprint): a checkpoint with others is not continued. `result_bytes` is the size of the file to
    be written, for the estimate. `trackers` are told what metrics.jsonl is told. The processes of `world` share every
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
        *,
        hidden: tuple[Hidden, Hidden] | None = None,
        facts: Mapping[str, str] | None = None,
        result_bytes: int | None = None,
        trackers: Trackers | None = None,
        world: World = ALONE,
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
        self.world = world
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
            # a run in fp32 is one to be compared: with itself on other hardware, or on another number of processes
            iteration_dtype=torch.float32 if plan.dtype == "float32" else None,
            process_group=world.group,
            **rates,
        )
        self.history = History()
        self.best: dict[str, Tensor] = {}
        self._stop = StopRequest(progress.note)

    def run(self, resume: bool = False) -> History:
        """Train to the end. Raises `Interrupted` after saving, `TrainingError` for numbers that are not finite."""
        first = step = self._restore() if resume and has_checkpoint(self.run_folder) else 0
        self._announce()
        self.progress.start(step, self.num_steps, self.train.num_rows / self.rows_per_step)
        last_save = time.monotonic()
        known = [*self.history.evals, *self.history.steps]
        folder = self.run_folder if self.world.is_main else None
        with self._stop.watched(), self._tracked(step), Metrics(folder, known, self.trackers.log) as metrics:
            if step == 0:
                self._evaluate(0, metrics)
            while step < self.num_steps:
                started = time.perf_counter()
                factor = self._schedule(step)
                losses, norm, slots = self._step(step)
                loss = losses[-1]
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
                    **({"stage_losses": losses} if len(losses) > 1 else {}),
                }
                self.history.steps.append(record)
                metrics.write(record)
                self.progress.step(step, loss, slots / elapsed)
                if step == 3 and first == 0:
                    self._refine_estimate(elapsed)
                if step % self.plan.validation_every == 0 or step == self.num_steps:
                    self._evaluate(step, metrics)
                due = time.monotonic() - last_save >= self.plan.checkpoint_every
                stop, due = self.world.any_of(bool(self._stop), due)
                if stop or (due and step < self.num_steps):
                    self._save(step)
                    last_save = time.monotonic()
                if stop:
                    raise Interrupted
        self._save(step)  # until the result is written, a crash must not cost the run
        self._load_best()
        return self.history

    def clean_up(self) -> None:
        """Remove the checkpoints; call it when the result is on disk."""
        remove_checkpoints(self.run_folder)

    def _schedule(self, step: int) -> float:
        """Set the rates and the momentum of a step; returns what the rates were multiplied by."""
        plan = self.plan
        factor = lr_factor(
            step,
            self.num_steps,
            start=plan.initial_lr_factor,
            warmup=plan.warmup_ratio,
            warmdown=plan.warmdown_ratio,
            final=plan.final_lr_factor,
        )
        apply_lr(self.optimizer, factor)
        if plan.initial_momentum is not None:
            momentum = {"start": plan.initial_momentum, "momentum": plan.momentum}
            apply_momentum(self.optimizer, muon_momentum(step, self.num_steps, warmup=plan.warmup_ratio, **momentum))
        return factor

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
            processes=self.world.size,
        )
        if self.world.is_main:
            refuse_full_disk(self.run_folder, estimate.disk_bytes)
        if not self.history.estimate:  # a run that is continued keeps what was said when it began
            self.history.estimate = estimate.as_dict()
            self.history.name = f"{self.run_folder.absolute().name}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.progress.table(estimate_table(self.history.estimate), estimate_line(self.history.estimate))

    def _refine_estimate(self, step_seconds: float) -> None:
        """The time again, now that some steps and a validation were measured."""
        measures = 1 + math.ceil(self.num_steps / self.plan.validation_every)
        seconds = step_seconds * self.num_steps + self.history.eval_seconds * measures
        self.history.estimate["seconds_after_3_steps"] = float(f"{seconds:.3g}")
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

    def _step(self, step: int) -> tuple[list[float], float, int]:
        """One optimizer step; returns the losses (nats per trained token), the gradients' norm, the number of slots."""
        self.model.train()
        batch = self.train.batch(step, self.rows_per_step)
        trained = max(int((batch.labels != IGNORED).sum()), 1)
        own = Batch(*(tensor[self.world.own_rows(self.rows_per_step)] for tensor in batch))
        losses = self._accumulate(own, trained)
        norm = float(self.optimizer.clip_grad_norm_(self.plan.max_grad_norm))
        check_step(step + 1, sum(losses), norm, self.model, self.parameters, lambda: self._replay(own))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses, norm, batch.input_ids.numel()

    def _accumulate(self, batch: Batch, trained: int) -> list[float]:
        """Leave this process's part of the gradients of the mean over `trained` labels; return that mean over all.

        One mean for each of the model's predictions, its own the last: those of a PoE base's stages, or that one alone.
        """
        losses = []
        for part in self._batches(batch):
            sums = []
            for hidden, weight, bias in self._predictions(self._hidden, part, learning=True):
                loss = cross_entropy_sum(hidden, weight, part.labels, self.logits, bias, z_loss=self.plan.z_loss)
                (loss / trained).backward()
                sums.append(loss.detach())
            losses.append(torch.stack(sums))
        totals = torch.stack(losses).double().sum(0).tolist()  # read at the end: a GPU does not wait
        return [total / trained for total in self.world.all_sum(*totals)]

    def _predictions(self, source: Hidden, batch: Batch, learning: bool = False) -> Iterator[Prediction]:
        """What the model predicts at each place that counts; its own prediction is the last."""
        if isinstance(source, Stagewise):
            yield from source.predictions(batch, learning)
        else:
            yield Prediction(source(batch), self._head.weight, self._head.bias)

    def _replay(self, batch: Batch) -> None:
        for part in self._batches(batch):
            self._hidden(part)

    @property
    def _head(self) -> Any:
        """The output embeddings: `weight` (V, D), folded in a grown model, and `bias` (V,) or None."""
        return self.model.get_output_embeddings()

    @torch.no_grad()
    def _evaluate(self, step: int, metrics: Metrics) -> None:
        if self.val is None:
            self.best_snapshot(step, math.inf)
            return
        started = time.perf_counter()
        self.model.eval()
        total: Any = 0.0  # (K, 4), of every prediction: nats, labels, bits, bytes
        for numbers in self.world.shares(self.val.num_rows, self.rows_per_batch):
            # a part without rows goes through the network, too: the processes may have to bring its layers together
            rows = [self.val.batch(number, 1) for number in numbers] or [_unlabeled(self.val.batch(0, 1))]
            part = Batch(*(torch.cat(tensors).to(self._device) for tensors in zip(*rows, strict=True)))
            sizes = self.token_bytes.to(part.labels.device)[part.labels[part.labels != IGNORED]]
            found = []
            for hidden, weight, bias in self._predictions(self._val_hidden, part):
                losses = per_label_losses(hidden, weight, part.labels, self.logits, bias)
                losses = losses.to(part.labels.device, torch.float64)
                bits = losses[sizes > 0].sum().item() / math.log(2)
                found.append([losses.sum().item(), losses.numel(), bits, int(sizes.sum())])
            total = total + torch.tensor(found, dtype=torch.float64)
            self.progress.evaluating(numbers.stop, self.val.num_rows)
        results = [self.world.all_sum(*sums) for sums in total.tolist()]
        nats, labels_seen, bits, bytes_seen = results[-1]
        record: dict[str, Any] = {
            "step": step,
            "val_bpb": bits / max(bytes_seen, 1),
            "val_loss": nats / max(labels_seen, 1),
        }
        if len(results) > 1:
            record["stage_bpb"] = [bits / max(bytes_seen, 1) for _, _, bits, bytes_seen in results]
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
        self.history.peak_bytes = max(self.history.peak_bytes, memory_peak(self._device))
        best = self.best if self.history.best_step != step else {}  # else the weights are the best ones
        state = State(step, dict(self.parameters), best, self._identity, self.history.__dict__)
        write_state(self.run_folder, state, self.optimizer, self.parameters, self.world, self.plan.keep_checkpoints)

    @torch.no_grad()
    def _restore(self) -> int:
        state = read_state(self.run_folder, self.optimizer, self.parameters, self.world, self.progress.note, self._same)
        for name, parameter in self.parameters:
            parameter.copy_(state.weights[name])
        self.best = dict(state.best or state.weights)
        self.history = History(**state.history)
        return state.step

    def _same(self, identity: Mapping[str, Any]) -> None:
        check_same_run(identity, self._identity, self.run_folder)


def _unlabeled(batch: Batch) -> Batch:
    return batch._replace(labels=torch.full_like(batch.labels, IGNORED))
