"""Validation: the loss of held-out rows in nats per label and in bits per byte."""

import math
from collections.abc import Callable
from typing import Any

import torch

from poe.data.packing import Batch, Rows
from poe.modeling.families import logits_of
from poe.training.loss import IGNORED, per_label_losses
from poe.training.parallel.distributed import World
from poe.training.run import TrainedModel


@torch.no_grad()
def validate(
    trained: TrainedModel, rows: Rows, rows_per_batch: int, world: World, show_row: Callable[[int], None]
) -> dict[str, Any]:
    """Return `val_bpb` (bits per byte) and `val_loss` (nats per label) of `rows`, over all processes.

    A model with several predictions also has `stage_bpb`, one number for each; the last is `val_bpb`. `show_row` is
    called with the number of rows that are done.
    """
    trained.model.eval()
    totals: Any = 0.0  # (K, 4), for every prediction: nats, labels, bits, bytes
    for numbers in world.split_rows(rows.num_rows, rows_per_batch):
        # A process without rows runs one unlabeled row: with a sharded base all processes must run the layers.
        parts = [rows.batch(number, 1) for number in numbers] or [_remove_labels(rows.batch(0, 1))]
        totals = totals + torch.tensor(sum_losses(trained, parts), dtype=torch.float64)
        show_row(numbers.stop)
    sums = [world.all_reduce(*values) for values in totals.tolist()]
    nats, num_labels, bits, num_bytes = sums[-1]
    record: dict[str, Any] = {"val_bpb": bits / max(num_bytes, 1), "val_loss": nats / max(num_labels, 1)}
    if len(sums) > 1:
        record["stage_bpb"] = [bits / max(num_bytes, 1) for _, _, bits, num_bytes in sums]
    return record


@torch.no_grad()
def sum_losses(trained: TrainedModel, rows: list[Batch]) -> list[list[float]]:
    """Return the sums of nats, labels, bits and bytes for every prediction. Bits count tokens with bytes only."""
    batch = Batch(*(torch.cat(tensors).to(trained.device) for tensors in zip(*rows, strict=True)))
    logits = logits_of(trained.model.config)
    sizes = trained.token_bytes.to(batch.labels.device)[batch.labels[batch.labels != IGNORED]]
    sums = []
    for hidden, weight, bias in trained.sources.val.predictions(batch):
        losses = per_label_losses(hidden, weight, batch.labels, logits, bias)
        losses = losses.to(batch.labels.device, torch.float64)
        bits = losses[sizes > 0].sum().item() / math.log(2)
        sums.append([losses.sum().item(), losses.numel(), bits, int(sizes.sum())])
    return sums


def _remove_labels(batch: Batch) -> Batch:
    return batch._replace(labels=torch.full_like(batch.labels, IGNORED))
