"""Several paths through one base and its stages as one native model: a single pass through the trunk for all of them.

The model is a shell of the base's class: the trunk's layers, then a place for every layer of every stage. At a stage's
first place all of its layers run, on the state where it attaches; its other places are passed over. So masks, rotary
positions and the key-value cache (a slot for each place) are the family's own affair, `generate` is its own, and
siblings, chains and stages that attach below the top share all that lies beneath them.
Shape letters: B batch, T tokens of a call, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from poe.decoding.strategy import Expert
from poe.errors import FamilyError
from poe.modeling.exits import head_below
from poe.modeling.families import Family, family_of, logits_of
from poe.modeling.growth import shell, sync_attention
from poe.modeling.stage import Stage
from poe.modeling.standins import RecordedLayer, SkippedLayer

State = tuple[Tensor, Tensor | None]
"""A hidden state (rows, T, D) and the indices of its rows in the batch, None for all of them."""


class Branched(nn.Module):
    """What a model with several experts has beside its family's own class; `build_branched_model` makes one."""

    config: Any
    experts: Sequence[Expert]
    _family: Family
    _branches: "dict[Stage, _Branch]"
    _taps: dict[int, RecordedLayer]

    def expert_states(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        rows: Sequence[Tensor | None] | None = None,
        logits_to_keep: int | Tensor = 0,
        **inputs: Any,
    ) -> tuple[list[Tensor], Cache | None]:
        """Token ids (B, T) -> each expert's normalized states (its rows, kept positions, D), and the cache.

        `rows` has each expert's row indices in rising order (default: all rows). A stage runs on the rows of the
        experts above it alone. `inputs` are those of the backbone.
        """
        rows = rows or [None] * len(self.experts)
        for branch in self._branches.values():
            branch.rows = _union([rows[index] for index in branch.experts])
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        try:
            output = self._backbone(input_ids=input_ids, past_key_values=past_key_values, **inputs)
            states = []
            for expert, own in zip(self.experts, rows, strict=True):
                if expert.stage is None:
                    states.append(_take((output.last_hidden_state, None), own)[:, kept])
                else:
                    states.append(self._normalized(expert.stage, own, kept))
            return states, output.past_key_values
        finally:
            for branch in self._branches.values():
                branch.state = None
            for tap in self._taps.values():
                tap.state = None

    def read(self, expert: int, states: Tensor) -> Tensor:
        """Return what the head of that expert says of states (..., D): logits (..., V), scaled and capped."""
        heads: Any = self._family.head_of(self)  # type: ignore[arg-type]
        return logits_of(self.config)(heads[expert](states))

    @property
    def _backbone(self) -> Any:
        return self._family.backbone_of(self)  # type: ignore[arg-type]

    def _normalized(self, stage: Stage, rows: Tensor | None, kept: Any) -> Tensor:
        """The states that a stage's head reads: through the family's final norm, and what precedes it in a PoE base."""
        states = _take(self._branches[stage].out(), rows)[:, kept]
        subtracted = getattr(self.config, "backout_layer", None)
        if subtracted is not None and subtracted < stage.chain[0].below:
            middle = _take((self._taps[subtracted].state, None), rows)[:, kept]  # type: ignore[arg-type]
            states = states - self._backbone.backout_scale.to(middle.dtype) * middle
        normalized: Tensor = self._backbone.get_submodule(self._family.norm)(states)
        return normalized

    def _reorder_cache(self, cache: Cache, beam_idx: Tensor) -> Cache:
        """Let a beam search go on: `beam_idx` (B) says from which row, of the same prompt, every row does."""
        rows = {slot: branch.rows for branch in self._branches.values() for slot in branch.slots}
        for slot, layer in enumerate(cache.layers):
            own = rows.get(slot)
            index: Any = beam_idx if own is None else torch.searchsorted(own, beam_idx[own])
            layer.reorder_cache(index)
        return cache

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Raise `FamilyError`: no checkpoint of the family holds several paths."""
        raise FamilyError(
            f"A {type(self).__name__} has several paths on one trunk, which no checkpoint can express: save its stages "
            "(Cascade.save_stage), and put them together again after loading."
        )


def build_branched_model(base: PreTrainedModel, experts: Sequence[Expert], kind: type[Branched]) -> Any:
    """Return a model of the base's own class and of `kind` that computes all experts on one trunk.

    It shares every tensor with the base and the stages. The trunk is no deeper than the experts need.
    """
    family = family_of(base)
    chains = [[] if expert.stage is None else expert.stage.chain for expert in experts]
    depth = max(chain[0].below if chain else base.config.num_hidden_layers for chain in chains)
    branches: dict[Stage, _Branch] = {}
    places: list[nn.Module] = []
    for stage in dict.fromkeys(link for chain in chains for link in chain):
        users = [index for index, chain in enumerate(chains) if stage in chain]
        branches[stage] = _Branch(stage, users, depth + len(places))
        places += [branches[stage], *(SkippedLayer(layer) for layer in stage.layers[1:])]
    if None in [expert.stage for expert in experts] and getattr(base.config, "combiner", "last") != "last":
        raise FamilyError(
            "This base's prediction is a vote of all its stages (combiner='log_op'), so no state at its top stands for "
            "it: leave the base (None) out, or open it with combiner='last'."
        )
    heads = [head_below(base, depth) if expert.stage is None else family.head_of(expert.model) for expert in experts]
    model = shell(base, places, nn.ModuleList(heads), below=depth)
    sync_attention(base, model)
    layers = family.layers_of(model)
    subtracted = getattr(model.config, "backout_layer", None)
    lower = {chain[0].below - 1 for chain in chains if chain} - {depth - 1}
    taps: dict[int, RecordedLayer] = {}
    for index in sorted(lower if subtracted is None else lower | {subtracted}):
        taps[index] = RecordedLayer(layers[index])
        layers[index] = taps[index]
    for stage, branch in branches.items():
        if stage.parent is not None:
            branch.source = branches[stage.parent].out
        elif stage.below < depth:
            branch.source = partial(_tapped_state, taps[stage.below - 1])
    model.__class__ = type(kind.__name__, (kind, type(model)), {})
    branched: Any = model
    branched.experts, branched._branches, branched._taps = list(experts), branches, taps
    branched._family = family
    return branched


class _Branch(SkippedLayer):
    """Stands at a stage's first place, runs all of its layers on its own rows and slots, and hands on what came in.

    `experts` are the indices of the experts above it. `source` is where its input is, None if it is what comes in.
    """

    source: Callable[[], State] | None = None
    rows: Tensor | None = None
    state: Tensor | None = None

    def __init__(self, stage: Stage, experts: list[int], slot: int) -> None:
        super().__init__(stage.layers[0])
        self.experts, self.slots = experts, range(slot, slot + len(stage.layers))
        self._run = tuple(stage.layers)
        self._shift = slot - stage.below  # the layers know the slots that they have in a model of this stage alone

    def out(self) -> State:
        """Return what the last layer made, and of which rows."""
        assert self.state is not None
        return self.state, self.rows

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = _take((hidden_states, None) if self.source is None else self.source(), self.rows)
        if self.rows is not None:
            batch = len(hidden_states)
            args, kwargs = _of_rows(args, self.rows, batch), _of_rows(kwargs, self.rows, batch)
        cache = kwargs.get("past_key_values")
        if cache is not None and self._shift:
            kwargs["past_key_values"] = _ShiftedCache(cache, self._shift)
        for layer in self._run:
            state = layer(state, *args, **kwargs)
        self.state = state
        return hidden_states


class _ShiftedCache:
    """A cache to whose slots one adds a number."""

    def __init__(self, cache: Cache, shift: int) -> None:
        self._cache, self._shift = cache, shift

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._cache.update(keys, values, layer_idx + self._shift, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _tapped_state(tap: RecordedLayer) -> State:
    assert tap.state is not None
    return tap.state, None


def _union(rows: Sequence[Tensor | None]) -> Tensor | None:
    """The rising indices that occur in any of these, None (all) if one of them is."""
    known = [indices for indices in rows if indices is not None]
    if len(known) < len(rows):
        return None
    return known[0] if len(known) == 1 else torch.cat(known).unique()


def _take(state: State, rows: Tensor | None) -> Tensor:
    """Those rows of a state, which has them."""
    states, present = state
    if rows is None or (present is not None and len(present) == len(rows)):
        return states
    return states[rows if present is None else torch.searchsorted(present, rows)]


def _of_rows(value: Any, rows: Tensor, batch: int) -> Any:
    """The same arguments of a layer for some rows of a batch: every tensor (batch, ...) in them loses the others."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 1 and len(value) == batch else value
    if isinstance(value, dict):
        return {name: _of_rows(item, rows, batch) for name, item in value.items()}
    return type(value)(_of_rows(item, rows, batch) for item in value) if type(value) in (tuple, list) else value


def positions(attention_mask: Tensor | None) -> Tensor | None:
    """Return the positions (B, T) of tokens in rows that may be padded, counted as `generate` does; None without."""
    return None if attention_mask is None else (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
