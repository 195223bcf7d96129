"""One optimizer step: forward and backward passes in micro-batches, clipping, and the update."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from poe.data.packing import Batch
from poe.modeling.families import logits_of
from poe.stages.recipe import Plan
from poe.training.checks import check_step_is_finite
from poe.training.loss import IGNORED, cross_entropy_sum
from poe.training.optim import MuonAdamW
from poe.training.parallel.distributed import World
from poe.training.run import TrainedModel


class StepResult(NamedTuple):
    """The losses of a step in nats per label (the model's own last), and its gradient norm before clipping."""

    losses: list[float]
    grad_norm: float
    num_tokens: int  # padding included

    @property
    def loss(self) -> float:
        return self.losses[-1]


class TrainingStep:
    """Takes optimizer steps on `trained` by `plan`. The processes of `world` share the rows of every step.

    `on_pass` is called after every forward and backward pass with the share of the step that is done.
    """

    def __init__(
        self,
        plan: Plan,
        trained: TrainedModel,
        optimizer: MuonAdamW,
        world: World,
        on_pass: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._plan, self._trained, self._optimizer, self._world = plan, trained, optimizer, world
        self._logits = logits_of(trained.model.config)
        self._rows_per_batch = max(1, plan.max_tokens_per_batch // plan.seq_len)
        self._on_pass = on_pass
        self.has_updated = False  # from the update of the weights until the caller has recorded the step

    def take(self, step: int, batch: Batch) -> StepResult:
        """Take step number `step` (from 1) on the rows of all processes. Raises `TrainingError` for nan and inf."""
        model, parameters = self._trained.model, self._trained.parameters
        model.train()
        num_labels = max(int((batch.labels != IGNORED).sum()), 1)
        own_rows = self._world.own_rows(batch.input_ids.shape[0])
        own_batch = Batch(*(tensor[own_rows] for tensor in batch))
        losses = self.accumulate_gradients(own_batch, num_labels)
        norm = float(self._optimizer.clip_grad_norm_(self._plan.max_grad_norm))
        check_step_is_finite(step, sum(losses), norm, model, parameters, lambda: self._replay_forward(own_batch))
        self.has_updated = True
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(losses, norm, batch.input_ids.numel())

    def accumulate_gradients(self, batch: Batch, num_labels: int) -> list[float]:
        """Add this process's share of the gradients of the mean loss, and return that mean over all processes.

        The mean is over the `num_labels` labels of the whole step. There is one mean for each prediction of the model:
        one for every stage of a PoE base with local learning, else one.
        """
        losses, num_rows, rows_done = [], batch.input_ids.shape[0], 0
        for part in self._micro_batches(batch):
            sums = []
            for hidden, weight, bias in self._trained.sources.train.predictions(part, learning=True):
                loss = cross_entropy_sum(hidden, weight, part.labels, self._logits, bias, z_loss=self._plan.z_loss)
                (loss / num_labels).backward()
                sums.append(loss.detach())
            losses.append(torch.stack(sums))
            rows_done += part.input_ids.shape[0]
            self._on_pass(rows_done / num_rows)
        totals = torch.stack(losses).double().sum(0).tolist()  # the only read of a loss: a GPU waits here once
        return [total / num_labels for total in self._world.all_reduce(*totals)]

    def _micro_batches(self, batch: Batch) -> Iterator[Batch]:
        for parts in zip(*(tensor.split(self._rows_per_batch) for tensor in batch), strict=True):
            yield Batch(*(part.to(self._trained.device) for part in parts))

    def _replay_forward(self, batch: Batch) -> None:
        for part in self._micro_batches(batch):
            self._trained.sources.train(part)
