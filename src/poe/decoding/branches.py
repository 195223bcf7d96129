"""Several experts on one base as one native model: all of them share one pass through the base's layers.

The model is an instance of the base's class. Its layer list holds the trunk (the base's layers), then one slot for each
layer of each stage. The slot of a stage's lowest layer reads the hidden states at its attachment, every other slot the
output of the layer below it. The family's own code computes masks, rotary positions and the key-value cache (one slot
per layer) and has its own `generate`. Siblings, chains and stages below the top share everything below them.
Shape letters: B batch, T tokens of a call, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from poe.decoding.strategy import Expert
from poe.errors import FamilyError, StageError
from poe.modeling.answering import acting_on_labels, limit_to_answer
from poe.modeling.exits import head_below
from poe.modeling.families import Family, family_of, logits_of
from poe.modeling.fork import Activity
from poe.modeling.growth import build_shell, sync_attention
from poe.modeling.stage import Stage
from poe.modeling.standins import RecordedLayer, SkippedLayer

State = tuple[Tensor, Tensor | None]
"""Hidden states (rows, T, D), and the indices of their rows in the batch, None for all rows."""


class BranchedModel(nn.Module):
    """The part of a model with several experts that its family's class does not have; see `build_branched_model`."""

    config: Any
    experts: Sequence[Expert]
    _family: Family
    _branches: "dict[nn.Module, _Branch]"  # by layer, in the order of the slots
    _recorded: dict[int, RecordedLayer]
    _activities: Sequence[Activity]  # of the stages that are active on the answer

    def expert_states(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        rows: Sequence[Tensor | None] | None = None,
        logits_to_keep: int | Tensor = 0,
        **inputs: Any,
    ) -> tuple[list[Tensor], Cache | None]:
        """Token ids (B, T) -> each expert's normalized states (its rows, kept positions, D), and the cache.

        `rows` has each expert's row indices in rising order (default: all rows). A stage runs only on the rows of the
        experts above it. `inputs` are those of the backbone. Outside of a forward pass of the whole model, stages that
        are active on the answer need `acting_on_labels`.
        """
        rows = rows or [None] * len(self.experts)
        for branch in self._branches.values():
            branch.rows = _union_rows([rows[index] for index in branch.experts])
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        try:
            output = self._backbone(input_ids=input_ids, past_key_values=past_key_values, **inputs)
            states = []
            for expert, expert_rows in zip(self.experts, rows, strict=True):
                if expert.stage is None:
                    states.append(_select_rows((output.last_hidden_state, None), expert_rows)[:, positions])
                else:
                    states.append(self._normalized(expert.stage, expert_rows, positions))
            return states, output.past_key_values
        finally:
            for branch in self._branches.values():
                branch.state = None
            for layer in self._recorded.values():
                layer.state = None

    def rows_of_slots(self, branch: Tensor) -> dict[int, Tensor]:
        """Return the rows in each slot of the cache that has not all of them; `branch` (B) has each row's expert."""
        first = self.config.num_hidden_layers - len(self._branches)
        return {
            slot: torch.isin(branch, torch.tensor(layer.experts)).nonzero()[:, 0]
            for slot, layer in enumerate(self._branches.values(), start=first)
        }

    def acting_on_labels(self, labels: Tensor) -> AbstractContextManager[None]:
        """Let stages that are active on the answer act where `labels` (B, T) are predicted, in a `with` block."""
        return acting_on_labels(self._activities, labels)

    def expert_logits(self, expert: int, states: Tensor) -> Tensor:
        """Return the logits (..., V) of one expert's head for states (..., D), scaled and capped."""
        heads: Any = self._family.head_of(self)  # type: ignore[arg-type]
        return logits_of(self.config)(heads[expert](states))

    @property
    def _backbone(self) -> Any:
        return self._family.backbone_of(self)  # type: ignore[arg-type]

    def _normalized(self, stage: Stage, rows: Tensor | None, positions: Any) -> Tensor:
        """Return the input of a stage's head: the states after the family's final norm (and a PoE base's backout)."""
        states = _select_rows(self._branches[stage.stack[-1]].output(), rows)[:, positions]
        subtracted = getattr(self.config, "backout_layer", None)
        if subtracted is not None and subtracted < stage.foot:
            middle = _select_rows((self._recorded[subtracted].state, None), rows)[:, positions]  # type: ignore[arg-type]
            states = states - self._backbone.backout_scale.to(middle.dtype) * middle
        normalized: Tensor = self._backbone.get_submodule(self._family.norm)(states)
        return normalized

    def _reorder_cache(self, cache: Cache, beam_idx: Tensor) -> Cache:
        """Reorder the cache for a beam search: row i continues row `beam_idx[i]`, of the same prompt."""
        first = self.config.num_hidden_layers - len(self._branches)
        rows = {slot: branch.rows for slot, branch in enumerate(self._branches.values(), start=first)}
        for slot, layer in enumerate(cache.layers):
            slot_rows = rows.get(slot)
            index: Any = beam_idx if slot_rows is None else torch.searchsorted(slot_rows, beam_idx[slot_rows])
            layer.reorder_cache(index)
        return cache

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Raise `FamilyError`: no checkpoint of the family can hold several experts."""
        raise FamilyError(
            f"A {type(self).__name__} has several experts on one trunk, which no checkpoint can hold: save its stages "
            "(Cascade.save_stage), and combine them again after loading."
        )


def build_branched_model(base: PreTrainedModel, experts: Sequence[Expert], kind: type[BranchedModel]) -> Any:
    """Return a model of the base's class and of `kind` that computes all experts on one trunk.

    It shares every tensor with the base and the stages. The trunk has only the layers that the experts need.
    """
    family = family_of(base)
    if None in [expert.stage for expert in experts] and getattr(base.config, "combiner", "last") != "last":
        raise FamilyError(
            "This base combines the predictions of all its stages (combiner='log_op'), so its last layer alone does "
            "not predict: leave the base (None) out, or open it with combiner='last'."
        )
    stages = [expert.stage for expert in experts if expert.stage is not None]
    depths = [base.config.num_hidden_layers if expert.stage is None else expert.stage.foot for expert in experts]
    if 0 in depths:
        raise StageError("A fork with attach_at=0 has no layer in common with other stages: use it alone.")
    depth = max(depths)
    branches: dict[nn.Module, _Branch] = {}
    for stage in stages:
        for index, layer in enumerate(stage.stack, start=stage.foot):
            if layer not in branches:
                users = [i for i, e in enumerate(experts) if e.stage is not None and layer in e.stage.stack]
                branches[layer] = _Branch(layer, users, depth + len(branches) - index)
    heads = [head_below(base, depth) if expert.stage is None else family.head_of(expert.model) for expert in experts]
    model = build_shell(base, list(branches.values()), nn.ModuleList(heads), below=depth)
    sync_attention(base, model)
    layers = family.layers_of(model)
    subtracted = getattr(model.config, "backout_layer", None)
    lower = {stage.foot - 1 for stage in stages} - {depth - 1}
    recorded: dict[int, RecordedLayer] = {}
    for index in sorted(lower if subtracted is None else lower | {subtracted}):
        recorded[index] = RecordedLayer(layers[index])
        layers[index] = recorded[index]
    for stage in stages:
        if stage.foot < depth:
            branches[stage.stack[0]].source = partial(_recorded_state, recorded[stage.foot - 1])
        for below, layer in pairwise(stage.stack):
            branches[layer].source = branches[below].output
    model.__class__ = type(kind.__name__, (kind, type(model)), {})
    branched: Any = model
    branched.experts, branched._branches, branched._recorded = list(experts), branches, recorded
    branched._family = family
    answering = {link.activity for stage in stages for link in stage.chain if link.config.active == "answer"}
    branched._activities = list(answering)
    if answering:
        limit_to_answer(branched, branched._activities)
    return branched


class _Branch(SkippedLayer):
    """The slot of one layer of a stage: runs the layer on its rows, and returns its own input unchanged.

    `experts` are the indices of the experts that use the layer. `source` returns the layer's input; None means the
    input of the slot. `shift` is the distance to the slot that the layer has in a model with its stage alone.
    """

    source: Callable[[], State] | None = None
    rows: Tensor | None = None
    state: Tensor | None = None

    def __init__(self, layer: nn.Module, experts: list[int], shift: int) -> None:
        super().__init__(layer)
        self.experts, self._shift = experts, shift

    def output(self) -> State:
        """Return the output of the layer, and its rows."""
        assert self.state is not None
        return self.state, self.rows

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = _select_rows((hidden_states, None) if self.source is None else self.source(), self.rows)
        if self.rows is not None and not len(self.rows):
            self.state = state
            return hidden_states
        if self.rows is not None:
            batch = len(hidden_states)
            args, kwargs = _select_arguments(args, self.rows, batch), _select_arguments(kwargs, self.rows, batch)
        cache = kwargs.get("past_key_values")
        if cache is not None and self._shift:
            kwargs["past_key_values"] = _ShiftedCache(cache, self._shift)
        self.state = self._layer[0](state, *args, **kwargs)
        return hidden_states


class _ShiftedCache:
    """A cache that adds a number to the slots of its layers."""

    def __init__(self, cache: Cache, shift: int) -> None:
        self._cache, self._shift = cache, shift

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._cache.update(keys, values, layer_idx + self._shift, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _recorded_state(layer: RecordedLayer) -> State:
    assert layer.state is not None
    return layer.state, None


def _union_rows(rows: Sequence[Tensor | None]) -> Tensor | None:
    """Return the rising indices that occur in any of these, None (all rows) if one of them is None."""
    subsets = [indices for indices in rows if indices is not None]
    if len(subsets) < len(rows):
        return None
    return subsets[0] if len(subsets) == 1 else torch.cat(subsets).unique()


def _select_rows(state: State, rows: Tensor | None) -> Tensor:
    """Return some rows of a state that has them."""
    states, present = state
    if rows is None or (present is not None and len(present) == len(rows)):
        return states
    return states[rows if present is None else torch.searchsorted(present, rows)]


def _select_arguments(value: Any, rows: Tensor, batch: int) -> Any:
    """Return a layer's arguments for some rows of a batch: every tensor (batch, ...) in them keeps those rows."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 1 and len(value) == batch else value
    if isinstance(value, dict):
        return {name: _select_arguments(item, rows, batch) for name, item in value.items()}
    return (
        type(value)(_select_arguments(item, rows, batch) for item in value) if type(value) in (tuple, list) else value
    )


def count_positions(attention_mask: Tensor | None) -> Tensor | None:
    """Return the positions (B, T) of tokens in padded rows, as `generate` counts them; None without a mask."""
    return None if attention_mask is None else (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
