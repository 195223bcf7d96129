"""The boundary of a stage that is active on the answer: the layers below read whole rows, the stage reads the answers.

`below` runs the model without the stage over packed rows, without a graph, and keeps two things: the states at the
boundary, and the keys and values of every layer above it. `above` runs the stage on the answers' tokens alone, packed
densely; they attend to the keys and values of their prompt and to one another. That is the stage's own function
(`answering.py`), at the cost of the answers' tokens.
Shape letters: B rows, T tokens of a row, M answer tokens of a row, K states, L layers above the boundary, H key-value
heads, E their width, D width.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from .failures import FamilyError
from .families import family_of
from .growth import build_shell, sync_attention
from .placement import device_of
from .span_attention import Span, Spans, attach_spans, attend_by_span, find_documents, find_layers_config, has_spans
from .stage import Stage
from .standins import FixedOutputLayer, RecordedLayer, SkippedLayer, boundary_layers

FULL, SLIDING = "full_attention", "sliding_attention"
BLOCK = 64  # tokens: oneDNN prepares a kernel for every new shape, and keeps its memory


class Read(NamedTuple):
    """What the layers below a stage leave of packed rows.

    `states` (B, K, T, D) are what `Boundary.below` returns; `keys` and `values` (L, B, H, T, E) are those that the
    layers from the boundary upwards have without the stage. `embeddings` (B, T, D) are there on a PoE base that reads
    the embedding of the token before.
    """

    states: Tensor
    keys: Tensor
    values: Tensor
    embeddings: Tensor | None = None


class AnswerBoundary:
    """A model cut below `stage`, a fork that is active on the answer.

    `above(below(x), x)` gives, at every token of an answer, the normalized hidden state that the model has there when
    that answer is the current turn. Raises `FamilyError` for a base whose layers do not all attend to the whole row.
    """

    def __init__(self, base: Any, stage: Stage) -> None:
        family = family_of(base)
        self._kinds = attention_kinds(base.config)
        if family.recurrent or not set(self._kinds) <= {FULL, SLIDING}:
            raise FamilyError(
                f"A stage that is active on the answer is trained on bases whose layers run once each, with full or "
                f"sliding attention: got model type {base.config.model_type!r}. Use active='all'."
            )
        self._window = getattr(base.config, "sliding_window", None) or 0
        head, foot, parent = family.head_of(base), stage.foot, stage.parent
        below = stage.below
        under = [] if parent is None else parent.stack
        lower = build_shell(base, under, head, below=base.config.num_hidden_layers if parent is None else parent.foot)
        upper = build_shell(base, stage.stack, head, below=foot)
        for model in (lower, upper):
            sync_attention(base, model)
        self._lower, self._upper = family.backbone_of(lower), family.backbone_of(upper)
        beneath, above = family.layers_of(lower), family.layers_of(upper)
        taps = boundary_layers(base.config, below) if below else []
        self._taken = {index: RecordedLayer(beneath[index]) for index in taps}
        self._given = {index: FixedOutputLayer(beneath[index]) for index in taps}
        for index in range(below):
            above[index] = self._given.get(index) or SkippedLayer(beneath[index])
        for index, layer in self._taken.items():
            beneath[index] = layer
        self.layers = taps
        parents = [link for link in stage.chain[:-1] if link.config.active == "answer"]
        if any(link.below < below for link in parents):
            raise FamilyError(
                f"Stage {stage.name!r} begins at layer {below}, above layer {min(link.below for link in parents)} of a "
                "parent that is active on the answer, and what the parent leaves there differs between prompt and "
                "answer: begin at the parent's layer or below it."
            )
        self._parents = [link.activity for link in parents]
        self._stage_layer, self._below, self._depth = stage.layers[0], below, stage.depth
        self._config, self._layers_config, self._dtype = base.config, find_layers_config(self._upper), base.dtype
        self._lower_depth = int(lower.config.num_hidden_layers)
        self.device = device_of(base.get_input_embeddings())

    def compile(self, *, below: bool = True, **options: Any) -> None:
        """Compile the layers above the boundary with torch.compile, with `below` also those under it; at first use.

        The number of answer tokens differs from batch to batch, so `above` is compiled twice: for the first number,
        then for any.
        """
        self._layers_config = None  # what is compiled keeps its one call of attention with a mask
        for half in (self._lower, self._upper) if below else (self._upper,):
            half.compile(**options)

    @torch.no_grad()
    def below(self, input_ids: Tensor, position_ids: Tensor) -> Read:
        """Token ids and positions (B, T) -> what the layers below leave, without a graph.

        A parent that is active on the answer reads no prompt either.
        """
        self._lower.eval()
        cache = DynamicCache()  # without a config it keeps every token, in sliding layers too
        for activity in self._parents:
            activity.tokens = input_ids.shape[1]
        try:
            with attend_by_span(self._layers_config, self.device):
                self._lower(
                    input_ids=input_ids,
                    position_ids=position_ids,
                    attention_mask=self._masks(*_row_mask(position_ids), find_documents),
                    past_key_values=cache,
                    use_cache=True,
                )
        finally:
            for activity in self._parents:
                activity.tokens = None
        layers: list[Any] = cache.layers[self._below : self._depth]
        taken = [recorded.take() for recorded in self._taken.values()]
        states = (
            torch.stack(taken, dim=1) if taken else layers[0].keys.new_empty(len(input_ids), 0, input_ids.shape[1], 0)
        )
        smeared: Any = cache.layers[self._lower_depth] if len(cache.layers) > self._lower_depth else None
        keys, values = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("keys", "values"))
        return Read(states, keys, values, None if smeared is None else smeared.keys[:, 0])

    def above(self, read: Read, input_ids: Tensor, position_ids: Tensor, active: Tensor) -> Tensor:
        """What was read, token ids, positions and `active` (B, T) -> normalized hidden states (B, T, D), with a graph.

        `active` is True at the tokens that predict an answer's tokens. All other places of the result are zero.
        """
        self._upper.train(self._stage_layer.training)  # `below` has put what both halves share into evaluation mode
        turn = _turns(active, position_ids)
        places = _dense_places(active)  # (B, M), past a row's own tokens any place
        real = torch.arange(places.shape[1], device=places.device) < active.sum(1, keepdim=True)
        for given, state in zip(self._given.values(), read.states.unbind(1), strict=True):
            given.state = state.gather(1, places.unsqueeze(-1).expand(-1, -1, state.shape[-1]))
        try:
            with attend_by_span(self._layers_config, self.device):
                mask = _answer_mask(turn, position_ids, places, real)
                spans = _answer_spans(turn, position_ids, places, real) if has_spans(self._layers_config) else None
                output = self._upper(
                    input_ids=input_ids.gather(1, places),
                    position_ids=position_ids.gather(1, places),
                    attention_mask=self._masks(*mask, lambda mask: spans),
                    past_key_values=_PromptCache(read, self._below, places),
                    use_cache=True,
                ).last_hidden_state
        finally:
            for given in self._given.values():
                given.state = None
        whole = output.new_zeros(*input_ids.shape, output.shape[-1])
        rows = torch.arange(len(places), device=places.device).unsqueeze(1).expand_as(places)
        return whole.index_put((rows[real], places[real]), output[real])

    def _masks(
        self, seen: Tensor, distance: Tensor, find_spans: Callable[[Tensor], Spans | None]
    ) -> Tensor | dict[str, Tensor]:
        """Which keys each query sees (B, Q, S) and how far back they are -> what the backbone takes as its mask."""
        masks = {kind: seen if kind == FULL else seen & (distance < self._window) for kind in set(self._kinds)}
        made = {kind: self._as_attention_wants(mask.unsqueeze(1)) for kind, mask in masks.items()}
        if has_spans(self._layers_config):
            made = {kind: attach_spans(mask, find_spans(mask)) for kind, mask in made.items()}
        return made if len(made) > 1 else made.popitem()[1]

    def _as_attention_wants(self, mask: Tensor) -> Tensor:
        """A bool mask (B, 1, Q, S), True where a key is seen -> the mask that the base's attention reads."""
        kind = self._config._attn_implementation
        if kind == "sdpa" or has_spans(self._config):
            return mask
        if kind == "eager":
            hidden = torch.finfo(self._dtype).min
            return torch.zeros(mask.shape, dtype=self._dtype, device=mask.device).masked_fill(~mask, hidden)
        raise FamilyError(
            f"A stage that is active on the answer is trained with attn_implementation 'sdpa' or 'eager', got {kind!r}."
        )


class _PromptCache(DynamicCache):
    """A cache whose layers above the boundary begin with what the base left; what a pass adds is not kept."""

    def __init__(self, read: Read, first: int, places: Tensor) -> None:
        super().__init__()
        self._read, self._first, self._places = read, first, places

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._read.keys.shape[3]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx - self._first == len(self._read.keys):  # a PoE base's slot for embeddings, as keys of one head
            assert self._read.embeddings is not None
            before = (self._places - 1).clamp_min(0).unsqueeze(-1).expand(-1, -1, key_states.shape[-1])
            previous = self._read.embeddings.gather(1, before).unsqueeze(1).to(key_states.dtype)
            return torch.cat([previous, key_states[:, :, -1:]], dim=2), value_states
        keys, values = self._read.keys[layer_idx - self._first], self._read.values[layer_idx - self._first]
        keys, values = keys.to(key_states.dtype), values.to(value_states.dtype)  # a cache on disk is in bf16
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


def attention_kinds(config: PreTrainedConfig) -> list[str]:
    """Return the kind of attention of every layer, by transformers' names."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [SLIDING if getattr(config, "sliding_window", None) else FULL] * config.num_hidden_layers
    return list(kinds)


def _documents(position_ids: Tensor) -> Tensor:
    """Positions (B, T) -> the number of its document at every token: positions begin again with each."""
    return (position_ids == 0).cumsum(1)


def _row_mask(position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, T): whether a token sees another, causally within its document, and how many tokens back that is."""
    document = _documents(position_ids)
    back = position_ids.unsqueeze(2) - position_ids.unsqueeze(1)
    return (document.unsqueeze(2) == document.unsqueeze(1)) & (back >= 0), back


def _answer_spans(turn: Tensor, position_ids: Tensor, places: Tensor, real: Tensor) -> Spans | None:
    """The turns among the answers' tokens (B, M) of every row, as spans: they see their prompt, and themselves.

    None without an answer: its gradients are zeros then, not missing.
    """
    length = position_ids.shape[1]
    order = torch.arange(length, device=position_ids.device).expand_as(position_ids)
    begins = torch.where(position_ids == 0, order, 0).cummax(1).values
    own_begin, own_turn = (x.gather(1, places).tolist() for x in (begins, turn))
    rows = []
    for begin, first, count in zip(own_begin, own_turn, real.sum(1).tolist(), strict=True):
        starts = [place for place in range(count) if place == 0 or first[place] != first[place - 1]]
        spans = []
        for a, b in pairwise([*starts, count]):
            prompt, answer = (begin[a], first[a]), (length + a, length + b)
            spans.append(Span(a, b, (prompt, answer) if begin[a] < first[a] else (answer,)))
        rows.append(spans)
    return rows if any(rows) else None


def _turns(active: Tensor, position_ids: Tensor) -> Tensor:
    """(B, T): at an active token the place where its turn begins; elsewhere any place."""
    places = torch.arange(active.shape[1], device=active.device).expand_as(active)
    goes_on = nn.functional.pad(active[:, :-1], (1, 0)) & (position_ids != 0)
    return torch.where(goes_on, 0, places).cummax(1).values


def _dense_places(active: Tensor) -> Tensor:
    """(B, M): the places of the active tokens in order, then others; M is the most of a row, in whole blocks."""
    most = max(int(active.sum(1).max()), 1)
    return torch.argsort(~active, dim=1, stable=True)[:, : most + -most % BLOCK]


def _answer_mask(turn: Tensor, position_ids: Tensor, places: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """(B, M, T + M): whether an answer's token sees a key, and how many tokens back that is.

    It sees its document before the turn, as the layers below left it, and the turn up to itself.
    """
    document = _documents(position_ids)
    own_document, own_turn, own_position = (x.gather(1, places) for x in (document, turn, position_ids))
    everything = torch.arange(document.shape[1], device=document.device)
    prompt = (own_document.unsqueeze(2) == document.unsqueeze(1)) & (everything < own_turn.unsqueeze(2))
    order = torch.arange(places.shape[1], device=places.device)
    answer = (own_turn.unsqueeze(2) == own_turn.unsqueeze(1)) & (order.unsqueeze(1) >= order.unsqueeze(0))
    answer = answer & real.unsqueeze(1) | torch.eye(len(order), dtype=torch.bool, device=places.device)
    positions = torch.cat([position_ids, own_position], dim=1)
    return torch.cat([prompt, answer], dim=2), own_position.unsqueeze(2) - positions.unsqueeze(1)
