"""Where the engine gets the hidden states that the head reads: from the whole model, or from the boundary upwards.

The base is frozen, so what its layers say about a row never changes. Validation rows are the same at every evaluation:
what they look like at the boundary is remembered in memory, in the dtype it was computed in, as far as it fits.
Training rows are taken from a cache on disk if the recipe says so (hidden_cache.py).
"""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from poe.data.packing import Batch, PackedRows
from poe.errors import TrainingError
from poe.modeling.boundary import Boundary
from poe.modeling.families import is_prefix_lm
from poe.stages.recipe import Recipe
from poe.training.compiled import compiled
from poe.training.hidden_states.cache import HiddenCache, boundary_facts
from poe.training.prefix import prompt_attention
from poe.training.reporting.progress import Progress

if TYPE_CHECKING:
    from poe.cascade import Cascade

Hidden = Callable[[Batch], Tensor]  # rows of (B, T) tokens -> normalized hidden states (B, T, D)
States = Callable[[Batch], Tensor]  # rows of (B, T) tokens -> what `Boundary.below` says of them, (B, K, T, D)
REMEMBERED_BYTES = 1 << 29
_TRIED_TOKENS = 64


class Whole:
    """The whole model, every time, compiled if `compile`; documents in a row do not see each other.

    A PrefixLM base reads the prompt of each document in both directions.
    """

    def __init__(self, model: PreTrainedModel, compile: bool = False) -> None:
        backbone = getattr(model, model.base_model_prefix)
        self._model, self._backbone = model, compiled(backbone) if compile else backbone

    def __call__(self, batch: Batch) -> Tensor:
        mask = prompt_attention(self._model, batch) if is_prefix_lm(self._model.config) else None
        hidden: Tensor = self._backbone(
            input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
        return hidden


class FromBoundary:
    """The layers from the boundary upwards, on states that come from elsewhere."""

    def __init__(self, boundary: Boundary, states: States) -> None:
        self._boundary, self._states = boundary, states

    def __call__(self, batch: Batch) -> Tensor:
        return self._boundary.above(self._states(batch), batch.input_ids, batch.position_ids)


class Remembered:
    """States of whole batches, computed when a batch is first seen and kept, on the CPU, up to `limit` bytes."""

    def __init__(self, boundary: Boundary, limit: int = REMEMBERED_BYTES) -> None:
        self._boundary, self._left = boundary, limit
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, batch: Batch) -> Tensor:
        content = torch.stack([batch.input_ids, batch.position_ids]).cpu().numpy()
        key = hashlib.blake2b(content.tobytes(), digest_size=16).digest()
        if (known := self._known.get(key)) is not None:
            return known.to(batch.input_ids.device)
        states = self._boundary.below(batch.input_ids, batch.position_ids)
        if states.nbytes <= self._left:
            self._left -= states.nbytes
            self._known[key] = states.cpu()
        return states


def hidden_sources(
    cascade: "Cascade",
    plan: Recipe,
    train: PackedRows,
    val: PackedRows,
    num_steps: int,
    progress: Progress,
) -> tuple[Hidden, Hidden]:
    """Return the sources for training and for validation of stage `plan.name`; fill the cache if the recipe has one.

    Raises `OutputError` when the cache does not fit on the disk, `TrainingError` for a base whose upper layers read
    more than the hidden state below them, or whose states depend on more than the row.
    """
    model, base = cascade.model(plan.name), cascade.base
    boundary = Boundary(base, cascade.stages[plan.name])
    whole, training = Whole(model), Whole(model, plan.compile)
    if is_prefix_lm(base.config):
        if plan.cache_hidden:
            raise TrainingError(
                "cache_hidden: this base reads prompts in both directions (prefix_lm), so what it makes of a row "
                "depends on what is learned of it, which the cache does not know: leave the option out."
            )
        return training, whole
    if not _is_enough(boundary, whole, train.batch(0, 1)):
        if plan.cache_hidden:
            raise TrainingError(
                f"cache_hidden: in a base of model type {base.config.model_type!r} a stage's layers read more than the "
                "hidden state below them, so it cannot be cached: leave the option out."
            )
        return training, whole
    if not plan.cache_hidden:
        return training, FromBoundary(boundary, Remembered(boundary))
    rows_per_step = plan.tokens_per_step // plan.seq_len
    rows_at_once = max(1, plan.max_tokens_per_batch // plan.seq_len)
    used = min(train.num_rows, num_steps * rows_per_step)
    if num_steps * rows_per_step <= train.num_rows:
        progress.note(
            "every row is used once, so this run gains nothing from the cache; further stages, heads and sweeps on the "
            "same rows do. For several passes over the same rows give --max-steps."
        )
    facts = boundary_facts(cascade, plan.name, boundary)
    cached = HiddenCache(boundary, facts, torch.bfloat16, train, used, min(rows_at_once, rows_per_step))
    checked = HiddenCache(boundary, facts, base.dtype, val, val.num_rows, rows_at_once)
    for cache, rows in ((cached, "training"), (checked, "validation")):
        cache.fill(rows, progress)
    return FromBoundary(boundary, cached), FromBoundary(boundary, checked)


@torch.no_grad()
def _is_enough(boundary: Boundary, whole: Whole, batch: Batch) -> bool:
    """Try the boundary on the first tokens of a row: is what follows from it what the model says?"""
    part = Batch(*(t[:, :_TRIED_TOKENS].to(boundary.device) for t in batch))
    try:
        replayed: Any = boundary.above(boundary.below(*_inputs(part)), *_inputs(part))
    except (AttributeError, TypeError, RuntimeError):
        return False
    return torch.allclose(replayed.float(), whole(part).float(), rtol=1e-2, atol=1e-3)


def _inputs(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.input_ids, batch.position_ids
