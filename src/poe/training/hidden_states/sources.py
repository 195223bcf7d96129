"""Where training gets the hidden states that the head reads.

The base is frozen, so its layers compute the same states for a row every time. Training and validation can therefore
start at the stage's boundary, from cached states: validation rows from memory, training rows from disk if the recipe
has `cache_hidden` (see disk_cache.py). The fallback is the whole model.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel

from poe.cascade import Cascade
from poe.data.packing import IGNORED, Batch, PackedRows
from poe.errors import TrainingError
from poe.modeling.answer_boundary import AnswerBoundary, Read
from poe.modeling.boundary import Boundary
from poe.modeling.families import is_prefix_lm
from poe.modeling.modeling_poe import PoEForCausalLM
from poe.modeling.placement import device_of
from poe.modeling.span_attention import attend_by_span, find_layers_config
from poe.stages.recipe import Recipe
from poe.training.forward import compile_boundary, compile_forward, explain_failed_compilation, prefix_lm_mask
from poe.training.hidden_states.disk_cache import DiskCache, RowReader, boundary_facts
from poe.training.precision import choose_compile
from poe.training.reporting.progress import Progress

BoundaryStates = Callable[[Batch], Tensor]  # rows of (B, T) tokens -> states at the boundary (B, K, T, D)
MEMORY_CACHE_BYTES = 1 << 29
_CHECKED_TOKENS = 64


class Prediction(NamedTuple):
    """The input of the loss: normalized hidden states (B, T, D), the head's weight (V, D) and its bias (V,) or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


class HiddenSource(Protocol):
    """Computes the hidden states that the head reads."""

    cached: bool  # whether the states below the boundary come from a cache, so that these layers cost nothing
    answers_only: bool  # whether only the tokens of answers go through the stage

    def __call__(self, batch: Batch) -> Tensor:
        """Return the normalized hidden states (B, T, D) of rows of (B, T) tokens."""

    def predictions(self, batch: Batch, learning: bool = False) -> Iterator[Prediction]:
        """Yield the predictions of the model, its own last; with `learning` those that have a loss to learn from."""


class HiddenSources(NamedTuple):
    """The sources for training rows and for validation rows."""

    train: HiddenSource
    val: HiddenSource


class WholeModel:
    """All layers of the model, compiled on request. Documents in a packed row do not attend to each other."""

    cached = False
    answers_only = False

    def __init__(self, model: PreTrainedModel, compile: bool = False) -> None:
        backbone = getattr(model, model.base_model_prefix)
        self._model, self._backbone = model, compile_forward(backbone) if compile else backbone
        self._layers_config = None if compile else find_layers_config(model)

    def __call__(self, batch: Batch) -> Tensor:
        mask = prefix_lm_mask(self._model, batch) if is_prefix_lm(self._model.config) else None
        with attend_by_span(self._layers_config, batch.input_ids.device):
            hidden: Tensor = self._backbone(
                input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
            ).last_hidden_state
        return hidden

    def predictions(self, batch: Batch, learning: bool = False) -> Iterator[Prediction]:
        yield _predict(self._model, self(batch))


class AboveBoundary:
    """The layers of `model` above the boundary, on states from a cache."""

    cached = True
    answers_only = False

    def __init__(self, model: PreTrainedModel, boundary: Boundary, states: BoundaryStates) -> None:
        self._model, self._boundary, self._states = model, boundary, states

    def __call__(self, batch: Batch) -> Tensor:
        with explain_failed_compilation(self._model):
            return self._boundary.above(self._states(batch), batch.input_ids, batch.position_ids)

    def predictions(self, batch: Batch, learning: bool = False) -> Iterator[Prediction]:
        yield _predict(self._model, self(batch))


class StagePredictions:
    """The predictions of every stage of a PoE base, for local learning (Cognica PoE).

    With `local` every stage learns from its own prediction and no gradient crosses a boundary: the shared head (and the
    stage's own, if there is one) reads the residual stream after every stage, the loss there is the only one that
    reaches the layers of the stage, and the stream is detached before the next stage. So only one stage's graph is in
    memory at a time. Greedy layer-wise training goes back to arXiv 1812.11446. Without `local` only the last stage has
    a loss, which is ordinary backpropagation.
    """

    cached = False
    answers_only = False

    def __init__(self, model: PoEForCausalLM, local: bool) -> None:
        self._model, self._local = model, local
        self.boundaries = model.config.boundaries

    def __call__(self, batch: Batch) -> Tensor:
        *_, last = self.predictions(batch)
        return last.hidden

    def predictions(self, batch: Batch, learning: bool = False) -> Iterator[Prediction]:
        """Yield the predictions to learn from, or all of them. A stage runs when its prediction is requested."""
        num_stages = len(self.boundaries)
        chosen = range(num_stages) if self._local or not learning else range(num_stages - 1, num_stages)
        states = self._model.model.stages(
            batch.input_ids,
            position_ids=batch.position_ids,
            boundaries=[self.boundaries[stage] for stage in chosen],
            detach=self._local and learning,
        )
        for stage, hidden in zip(chosen, states, strict=True):
            yield Prediction(hidden, self._model.head_weight(stage))


def _predict(model: PreTrainedModel, hidden: Tensor) -> Prediction:
    head: Any = model.get_output_embeddings()  # of a grown model the weight is folded at every read
    return Prediction(hidden, head.weight, head.bias)


class MemoryCache:
    """Boundary states of whole batches, kept on the CPU in the dtype they were computed in, up to `max_bytes`."""

    def __init__(self, boundary: RowReader, max_bytes: int = MEMORY_CACHE_BYTES) -> None:
        self._boundary, self._bytes_left = boundary, max_bytes
        self._states: dict[bytes, Tensor] = {}

    def __call__(self, batch: Batch) -> Tensor:
        content = torch.stack([batch.input_ids, batch.position_ids]).cpu().numpy()
        key = hashlib.blake2b(content.tobytes(), digest_size=16).digest()
        if (cached := self._states.get(key)) is not None:
            return cached.to(batch.input_ids.device)
        states = self._boundary.below(batch.input_ids, batch.position_ids)
        if states.nbytes <= self._bytes_left:
            self._bytes_left -= states.nbytes
            self._states[key] = states.cpu()
        return states


class AnswerTokens:
    """The answers' tokens of rows, through the layers of a fork that is active on the answer.

    The layers below read the whole rows without a graph; `read` does that, or returns what they left from a cache.
    """

    answers_only = True

    def __init__(
        self, model: PreTrainedModel, boundary: AnswerBoundary, read: Callable[[Batch], Read], cached: bool
    ) -> None:
        self._model, self._boundary, self._read, self.cached = model, boundary, read, cached

    def __call__(self, batch: Batch) -> Tensor:
        active = batch.labels != IGNORED
        with explain_failed_compilation(self._model):
            return self._boundary.above(self._read(batch), batch.input_ids, batch.position_ids, active)

    def predictions(self, batch: Batch, learning: bool = False) -> Iterator[Prediction]:
        yield _predict(self._model, self(batch))


class PackedReads:
    """An `AnswerBoundary` as a `Boundary`: everything that the layers below leave of a token is one vector."""

    states = 1

    def __init__(self, boundary: AnswerBoundary, batch: Batch) -> None:
        self._boundary, self.device = boundary, boundary.device
        some = Batch(*(t[:, :1].to(boundary.device) for t in batch))
        parts = self._parts(boundary.below(some.input_ids, some.position_ids))
        self._shapes = [part.shape[2:] for part in parts]
        self.width = sum(shape.numel() for shape in self._shapes)
        self.layers = [*boundary.layers, "keys and values above"]

    def below(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return (B, 1, T, width)."""
        parts = self._parts(self._boundary.below(input_ids, position_ids))
        return torch.cat([part.flatten(2) for part in parts], dim=2).unsqueeze(1)

    def unpack(self, packed: Tensor) -> Read:
        """Return what `below` was made of."""
        parts = packed.squeeze(1).split([shape.numel() for shape in self._shapes], dim=2)
        states, keys, values, *rest = (
            part.unflatten(2, shape) for part, shape in zip(parts, self._shapes, strict=True)
        )
        return Read(
            rearrange(states, "b t k d -> b k t d"),
            rearrange(keys, "b t l h e -> l b h t e"),
            rearrange(values, "b t l h e -> l b h t e"),
            rest[0] if rest else None,
        )

    def _parts(self, read: Read) -> list[Tensor]:
        parts = [
            rearrange(read.states, "b k t d -> b t k d"),
            rearrange(read.keys, "l b h t e -> b t l h e"),
            rearrange(read.values, "l b h t e -> b t l h e"),
        ]
        return parts if read.embeddings is None else [*parts, read.embeddings]


def whole_model_sources(model: PreTrainedModel, compile: bool = False) -> HiddenSources:
    """Return sources that run the whole model; only the one for training rows is compiled."""
    return HiddenSources(WholeModel(model, compile), WholeModel(model))


def make_source(cascade: Cascade, stage: str | None) -> HiddenSource:
    """Return what a stage (None: the base) computes for rows with labels, as `generate` would after their prompts.

    A stage that is active on the answer acts on the tokens with labels, every other one on all tokens.
    """
    model = cascade.model(stage).eval()
    if stage is None or cascade.stages[stage].config.active != "answer":
        return WholeModel(model)
    boundary = AnswerBoundary(cascade.base, cascade.stages[stage])
    return AnswerTokens(model, boundary, partial(_read_rows, boundary), cached=False)


def stage_sources(
    cascade: Cascade, plan: Recipe, train: PackedRows, val: PackedRows, num_steps: int, progress: Progress
) -> HiddenSources:
    """Return the sources of stage `plan.name`, and fill the cache on disk if the recipe has one.

    Of a run that compiles, only training rows run compiled, and a cache is filled without: other runs read it too.

    Raises `OutputError` when the cache does not fit on the disk. With `cache_hidden` raises `TrainingError` for a base
    with upper layers that read more than the hidden state below them, or with states that depend on more than the row.
    """
    model, base, stage = cascade.model(plan.name), cascade.base, cascade.stages[plan.name]
    compiled = choose_compile(plan.compile, device_of(base.get_input_embeddings()))
    if stage.config.active == "answer":
        return _answer_sources(cascade, plan, train, val, num_steps, progress, compiled)
    if not stage.reads_prompt:
        silent = next(link.name for link in stage.chain if link.config.active == "answer")
        raise TrainingError(
            f"Stage {stage.name!r} would act on every token, and the stage {silent!r} below it acts on the answer "
            "alone: train a fork with active: answer, or stand on a stage with active: all."
        )
    sources = whole_model_sources(model, compiled)
    if stage.below == 0:  # a fork of every layer has no boundary
        return sources
    boundary = Boundary(base, stage)
    if is_prefix_lm(base.config):
        if plan.cache_hidden:
            raise TrainingError(
                "cache_hidden: this base reads prompts in both directions (prefix_lm), so its hidden states depend on "
                "which tokens of a row are learned, and the cache is keyed by tokens alone. Remove the option."
            )
        return sources
    if not _boundary_matches_model(boundary, sources.val, train.batch(0, 1)):
        if plan.cache_hidden:
            raise TrainingError(
                f"cache_hidden: in a base of model type {base.config.model_type!r} the layers of a stage read more "
                "than the hidden state below them, so it cannot be cached. Remove the option."
            )
        return sources
    if not plan.cache_hidden:
        return sources._replace(val=AboveBoundary(model, boundary, MemoryCache(boundary)))
    train_cache, val_cache = _fill_caches(cascade, plan, boundary, train, val, num_steps, progress)
    above = boundary
    if compiled:
        above = Boundary(base, stage)
        compile_boundary(above, below=False)
    return HiddenSources(AboveBoundary(model, above, train_cache), AboveBoundary(model, boundary, val_cache))


def _answer_sources(
    cascade: Cascade,
    plan: Recipe,
    train: PackedRows,
    val: PackedRows,
    num_steps: int,
    progress: Progress,
    compiled: bool,
) -> HiddenSources:
    """Return the sources of a fork that is active on the answer."""
    model, base = cascade.model(plan.name), cascade.base
    if is_prefix_lm(base.config):
        raise TrainingError(
            "active: answer needs a base that reads its prompt from left to right, and this one reads it in both "
            "directions (prefix_lm). Use active: all."
        )
    above = boundary = AnswerBoundary(base, cascade.stages[plan.name])
    if compiled:
        above = AnswerBoundary(base, cascade.stages[plan.name])
        compile_boundary(above, below=not plan.cache_hidden)
    packed = PackedReads(boundary, train.batch(0, 1))
    if plan.cache_hidden:
        train_cache, val_cache = _fill_caches(cascade, plan, packed, train, val, num_steps, progress)
        return HiddenSources(
            AnswerTokens(model, above, partial(_read_cache, packed, train_cache), cached=True),
            AnswerTokens(model, boundary, partial(_read_cache, packed, val_cache), cached=True),
        )
    return HiddenSources(
        AnswerTokens(model, above, partial(_read_rows, above), cached=False),
        AnswerTokens(model, boundary, partial(_read_cache, packed, MemoryCache(packed)), cached=True),
    )


def _read_rows(boundary: AnswerBoundary, batch: Batch) -> Read:
    return boundary.below(batch.input_ids, batch.position_ids)


def _read_cache(packed: PackedReads, cache: BoundaryStates, batch: Batch) -> Read:
    return packed.unpack(cache(batch))


def _fill_caches(
    cascade: Cascade,
    plan: Recipe,
    boundary: RowReader,
    train: PackedRows,
    val: PackedRows,
    num_steps: int,
    progress: Progress,
) -> tuple[DiskCache, DiskCache]:
    """Return the caches on disk for training rows (in bf16) and validation rows (in the base's dtype), filled."""
    rows_per_step = plan.tokens_per_step // plan.seq_len
    rows_per_pass = max(1, plan.max_tokens_per_batch // plan.seq_len)
    used_rows = min(train.num_rows, num_steps * rows_per_step)
    if num_steps * rows_per_step <= train.num_rows:
        progress.note(
            "every row is used once, so this run gains nothing from the cache; further stages, heads and sweeps on the "
            "same rows do. For several passes over the same rows give --max-steps."
        )
    facts = boundary_facts(cascade, plan.name, boundary)
    train_cache = DiskCache(boundary, facts, torch.bfloat16, train, used_rows, min(rows_per_pass, rows_per_step))
    val_cache = DiskCache(boundary, facts, cascade.base.dtype, val, val.num_rows, rows_per_pass)
    train_cache.fill("training", progress)
    val_cache.fill("validation", progress)
    return train_cache, val_cache


@torch.no_grad()
def _boundary_matches_model(boundary: Boundary, whole_model: HiddenSource, batch: Batch) -> bool:
    """Check on a few tokens that running from the boundary gives what the whole model gives."""
    part = Batch(*(t[:, :_CHECKED_TOKENS].to(boundary.device) for t in batch))
    inputs = part.input_ids, part.position_ids
    try:
        replayed: Any = boundary.above(boundary.below(*inputs), *inputs)
    except (AttributeError, TypeError, RuntimeError):
        return False
    return torch.allclose(replayed.float(), whole_model(part).float(), rtol=1e-2, atol=1e-3)
