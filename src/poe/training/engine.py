"""The training loop of bases and stages: steps, schedule, validation, checkpoints, and the best weights."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from poe import __version__
from poe.errors import OutputError, PoEError, TrainingError, is_out_of_memory, memory_error
from poe.stages.recipe import Plan
from poe.training.checkpoints.files import has_checkpoint, remove_checkpoints
from poe.training.checkpoints.identity import check_resumable, run_identity
from poe.training.checkpoints.rng import restore_rng, rng_state
from poe.training.checkpoints.state import RunState, load_state, save_state
from poe.training.checks import check_validation_is_finite, check_weights_are_finite
from poe.training.interrupts import AbandonedPassError, Interrupted, StopRequest
from poe.training.optim import build_optimizer
from poe.training.precision import choose_compile
from poe.training.reporting.estimate import (
    check_disk_space,
    estimate_line,
    estimate_run,
    estimate_table,
    folder_bytes,
    format_quantity,
    memory_peak,
)
from poe.training.reporting.history import History
from poe.training.reporting.metrics import Metrics
from poe.training.run import RunContext, RunRows, RunSettings, TrainedModel
from poe.training.schedule import apply_lr, apply_momentum, lr_factor, muon_momentum
from poe.training.step import StepResult, TrainingStep
from poe.training.validation import validate

__all__ = ["Engine", "Interrupted"]


class Engine:
    """Trains a model by a plan, measures validation rows, and leaves the best weights in the model."""

    def __init__(
        self, plan: Plan, trained: TrainedModel, rows: RunRows, settings: RunSettings, context: RunContext
    ) -> None:
        self.plan, self.trained, self.rows, self.settings, self.context = plan, trained, rows, settings, context
        self.rows_per_step = plan.tokens_per_step // plan.seq_len
        self.optimizer = build_optimizer(
            trained.parameters,
            trained.model.config.hidden_size,
            weight_decay=plan.weight_decay,
            momentum=plan.momentum,
            matrix_optimizer=plan.matrix_optimizer,
            # fp32 runs are made to be compared across hardware and numbers of processes
            iteration_dtype=torch.float32 if plan.dtype == "float32" else None,
            process_group=context.world.group,
            **plan.learning_rates,
        )
        self.training_step = TrainingStep(plan, trained, self.optimizer, context.world, self._end_pass)
        self.history = History()
        self.best_weights: dict[str, Tensor] = {}
        self.stop = StopRequest(context.progress.note)
        self._rng = rng_state()  # before the current step

    def run(self, resume: bool = False) -> History:
        """Train to the end. Raises `Interrupted` after saving, `TrainingError` for numbers that are not finite.

        `MemoryLimitError` and the `OutputError` of metrics.jsonl are raised after saving as well, where that is
        possible.
        """
        num_steps = self.settings.num_steps
        first = step = self._load_checkpoint() if resume and has_checkpoint(self.settings.folder) else 0
        self.report_estimate()
        self.context.progress.start(step, num_steps, self.rows.train.num_rows / self.rows_per_step)
        last_save = time.monotonic()
        with self.stop.catch_signals("and saving the state"), self._track(step), self._open_metrics() as metrics:
            try:
                self._validate_if_due(step, metrics)  # of a new run, or of one that was stopped in a validation
                while step < num_steps:
                    started = time.perf_counter()
                    factor = self._set_schedule(step)
                    result = self._take_step(step)
                    seconds = time.perf_counter() - started
                    step += 1
                    self._record_step(step, result, factor, seconds, metrics)
                    if step == 3 and first == 0:
                        self._refine_estimate(seconds)
                    self._validate_if_due(step, metrics)
                    self.training_step.has_updated = False
                    save_due = time.monotonic() - last_save >= self.plan.checkpoint_every
                    stop, save_due = self.context.world.any_process(self._must_stop(metrics), save_due)
                    if stop or (save_due and step < num_steps):
                        self._save_checkpoint(step)
                        last_save = time.monotonic()
                    if stop:
                        raise metrics.failure or Interrupted(f"saved at step {step}")
            except AbandonedPassError:
                self._save_abandoned(step)
                raise Interrupted(f"saved at step {step}" if self.best_weights else "") from None
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise self._explain_memory(error, step, first) from error
            self._save_checkpoint(num_steps)  # protects the run until its result is on disk
            if self.context.world.any_process(self._must_stop(metrics))[0]:
                raise metrics.failure or Interrupted(f"saved at step {num_steps}")
        self._copy_weights(self.best_weights)
        return self.history

    def _save_abandoned(self, step: int) -> None:
        """Save the state before the step or the validation that was abandoned, unless nothing was done yet."""
        self.optimizer.zero_grad(set_to_none=True)
        restore_rng(*self._rng)
        if self.best_weights:
            self._save_checkpoint(step)

    def _must_stop(self, metrics: Metrics) -> bool:
        return bool(self.stop) or metrics.failure is not None

    def _explain_memory(self, error: Exception, step: int, first: int) -> Exception:
        """Save the last whole step, and return the error that names the options to lower."""
        saved = "Nothing was saved yet: start again."
        if has_checkpoint(self.settings.folder):
            saved = "The newest checkpoint was kept: continue with --resume; these options may change."
        if step > first and not self.training_step.has_updated and self.context.world.size == 1:
            with suppress(OutputError, MemoryError, RuntimeError):
                self._save_checkpoint(step)
                saved = f"The run is saved at step {step}: continue with --resume; these options may change."
        tokens, seq_len = self.plan.max_tokens_per_batch, self.plan.seq_len
        advice = f"Lower max_tokens_per_batch (now {tokens:,}; a row has {seq_len:,} tokens)"
        if not self.plan.checkpoint_activations:
            advice += ", or turn on checkpoint_activations"
        return memory_error(f"Step {step + 1}", error, f"{advice}. {saved}")

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints. Call it when the result is on disk."""
        with self.stop.catch_signals("now"):
            remove_checkpoints(self.settings.folder)

    def _set_schedule(self, step: int) -> float:
        """Set the learning rates and the momentum of a step, and return the factor of the learning rates."""
        plan, num_steps = self.plan, self.settings.num_steps
        factor = lr_factor(
            step,
            num_steps,
            initial_lr_factor=plan.initial_lr_factor,
            warmup_ratio=plan.warmup_ratio,
            warmdown_ratio=plan.warmdown_ratio,
            final_lr_factor=plan.final_lr_factor,
        )
        apply_lr(self.optimizer, factor)
        if plan.initial_momentum is not None:
            momentum = muon_momentum(
                step,
                num_steps,
                initial_momentum=plan.initial_momentum,
                momentum=plan.momentum,
                warmup_ratio=plan.warmup_ratio,
            )
            apply_momentum(self.optimizer, momentum)
        return factor

    def _take_step(self, step: int) -> StepResult:
        self._rng = rng_state()
        with self._watch_passes(f"step {step + 1}/{self.settings.num_steps}", step):
            return self.training_step.take(step + 1, self.rows.train.batch(step, self.rows_per_step))

    @contextmanager
    def _watch_passes(self, work: str, step: int | None = None) -> Iterator[None]:
        """Show the progress of a step or a validation, and leave it on a stop signal.

        On a CPU, where a pass can take minutes, this happens at every module of the network. Of several processes none
        can leave alone, so they finish the step.
        """
        progress, device = self.context.progress, self.trained.device
        progress.begin(work, step)
        if device.type != "cpu" or self.context.world.size > 1 or choose_compile(self.plan.compile, device):
            yield
            return
        with self.stop.leave_passes(progress.beat):
            yield

    def _end_pass(self, share: float) -> None:
        self.context.progress.show_share(share)
        if self.context.world.size == 1:
            self.stop.leave_pass()

    def _record_step(self, step: int, result: StepResult, factor: float, seconds: float, metrics: Metrics) -> None:
        self.history.seconds += seconds
        self.history.tokens += result.num_tokens
        record = {
            "step": step,
            "epoch": round(step * self.rows_per_step / self.rows.train.num_rows, 4),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr_factor": factor,
            "tokens_per_s": result.num_tokens / seconds,
            **({"stage_losses": result.losses} if len(result.losses) > 1 else {}),
        }
        self.history.steps.append(record)
        metrics.write(record)
        self.context.progress.show_step(step, result.loss, result.num_tokens / seconds)

    def _validate_if_due(self, step: int, metrics: Metrics) -> None:
        """Validate at step 0, every `validation_every` steps, and after the last one."""
        if step % self.plan.validation_every and step != self.settings.num_steps:
            return
        if self.history.evals and self.history.evals[-1]["step"] == step:  # before the run was stopped
            return
        self._validate(step, metrics)

    def _validate(self, step: int, metrics: Metrics) -> None:
        if self.rows.val is None:
            self.keep_best_weights(step, math.inf)
            return
        started = time.perf_counter()
        rows_per_batch = max(1, self.plan.max_tokens_per_batch // self.plan.seq_len)
        with self._watch_passes(f"validation after step {step}"):
            measured = validate(self.trained, self.rows.val, rows_per_batch, self.context.world, self._show_validation)
        check_validation_is_finite(step, measured["val_bpb"])
        record = {"step": step, **measured}
        self.history.evals.append(record)
        self.history.eval_seconds += time.perf_counter() - started
        metrics.write(record)
        self.context.progress.report_validation(step, record["val_bpb"])
        self.keep_best_weights(step, record["val_bpb"])

    def _show_validation(self, row: int) -> None:
        assert self.rows.val is not None
        self.context.progress.show_validation(row, self.rows.val.num_rows)
        self._end_pass(row / self.rows.val.num_rows)

    def keep_best_weights(self, step: int, bpb: float) -> None:
        """Copy the weights if they are the best so far. Without validation rows the newest count as the best."""
        if bpb < self.history.best_bpb or not self.best_weights or self.rows.val is None:
            self.history.best_step, self.history.best_bpb = step, bpb
            self.best_weights = {name: p.detach().clone() for name, p in self.trained.parameters}

    def report_estimate(self) -> None:
        """Show what the run will take. Raises `OutputError` if its files do not fit on the disk."""
        world = self.context.world
        estimate = estimate_run(self.plan, self.trained, self.rows, self.settings, self.optimizer, world.size)
        if world.is_main:
            check_disk_space(self.settings.folder, estimate.disk_bytes)
        if not self.history.estimate:  # a resumed run keeps its first estimate and its name
            self.history.estimate = estimate.as_dict()
            self.history.name = f"{self.settings.folder.absolute().name}-{time.strftime('%Y%m%d-%H%M%S')}"
        table, line = estimate_table(self.history.estimate), estimate_line(self.history.estimate)
        self.context.progress.show_table(table, line)

    def _refine_estimate(self, step_seconds: float) -> None:
        """Estimate the time again from measured steps and a measured validation."""
        num_validations = 1 + math.ceil(self.settings.num_steps / self.plan.validation_every)
        seconds = step_seconds * self.settings.num_steps + self.history.eval_seconds * num_validations
        self.history.estimate["seconds_after_3_steps"] = float(f"{seconds:.3g}")
        self.context.progress.note(f"after 3 steps: about {format_quantity('seconds', seconds)} for the whole run")

    def _open_metrics(self) -> Metrics:
        records = [*self.history.evals, *self.history.steps]
        folder = self.settings.folder if self.context.world.is_main else None
        return Metrics(folder, records, self.context.log)

    @contextmanager
    def _track(self, step: int) -> Iterator[None]:
        """Start the trackers. When the run ends, for any reason, finish them and remove the progress bars."""
        self.context.trackers.start(self.history.name, self.plan.as_dict(), self.settings.folder, step)
        try:
            yield
        finally:
            self.context.trackers.finish()
            self.context.progress.stop()

    @cached_property
    def _identity(self) -> dict[str, Any]:
        rows = {"training": self.rows.train, "validation": self.rows.val}
        return run_identity(self.plan, self.settings.num_steps, rows, self.trained.parameters, self.settings.facts)

    def _save_checkpoint(self, step: int) -> None:
        parameters = self.trained.parameters
        check_weights_are_finite(step, parameters)
        self.history.peak_bytes = max(self.history.peak_bytes, memory_peak(self.trained.device))
        best = self.best_weights if self.history.best_step != step else {}  # empty: the current weights are the best
        state = RunState(step, dict(parameters), best, self._identity, self.history.__dict__)
        folder, keep = self.settings.folder, self.plan.keep_checkpoints
        save_state(folder, state, self.optimizer, parameters, self.context.world, keep)
        self.history.disk_bytes = max(self.history.disk_bytes, folder_bytes(folder))

    def _load_checkpoint(self) -> int:
        """Restore the newest whole checkpoint and return its step."""
        try:
            state = load_state(
                self.settings.folder,
                self.optimizer,
                self.trained.parameters,
                self.context.world,
                self.context.progress.note,
                lambda saved: check_resumable(saved, self._identity, self.settings.folder),
            )
            self._copy_weights(state.weights)
            self.best_weights = dict(state.best_weights or state.weights)
            self.history = History(**state.history)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, PoEError) or is_out_of_memory(error):
                raise
            raise TrainingError(
                f"The checkpoint in {self.settings.folder} is whole, but poe-cascade {__version__} cannot continue it "
                f"({type(error).__name__}: {error}): continue with the version that wrote it, or start the run again "
                "in another folder."
            ) from error
        return state.step

    @torch.no_grad()
    def _copy_weights(self, weights: Any) -> None:
        for name, parameter in self.trained.parameters:
            parameter.copy_(weights[name])
