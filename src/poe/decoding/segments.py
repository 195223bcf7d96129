"""A model in parts: each runs some of its layers on given states, with a key-value cache at its own position.

A part is the base's native class with the layers below it passed over (as the halves of a `Boundary`), so masks, rotary
positions, layer types, value embeddings and the final norm are the family's own affair. What the parts of one path
compute one after the other is what the whole model computes; a lower part may be many tokens ahead of an upper one.
Shape letters: B batch, T tokens of a call, S tokens seen so far, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from poe.decoding.strategy import Expert
from poe.errors import DecodingError, FamilyError
from poe.modeling.exits import exit_refusal, exits_of, head_below
from poe.modeling.families import family_of, logits_of
from poe.modeling.growth import shell, sync_attention
from poe.modeling.stage import Stage
from poe.modeling.standins import FixedOutputLayer, RecordedLayer, SkippedLayer, recorded_layers

States = tuple[torch.Tensor, ...]
"""What one part hands to the next, each (B, T, D): the residual stream last, before it what is read again above."""


class Part:
    """Layers `start` to `end` of the path that ends in `stage` (None: in the base), counted from the embedding.

    The layers are those of the base up to where the stage's chain attaches, then the chain's. A part shares every
    tensor with the base and its stages, and changes none of their modules. Raises `FamilyError` for a recurrent base,
    whose layers run again in every cycle, `DecodingError` for depths that the path does not have.
    """

    def __init__(self, base: PreTrainedModel, stage: Stage | None, start: int, end: int) -> None:
        family = family_of(base)
        if family.recurrent:
            raise FamilyError(
                f"A base of model type {base.config.model_type!r} is recurrent: its layers run again in every cycle, "
                "so it cannot be run in parts. Expected a base whose layers run once each; decode it plainly."
            )
        attached, above = _list_layers(base, stage)
        depth = attached + len(above)
        if not 0 <= start < end <= depth:
            raise DecodingError(f"There is no part from layer {start} to {end} of {depth}: expected a range of them.")
        model = shell(base, above[: max(0, end - attached)], family.head_of(base), below=min(end, attached))
        sync_attention(base, model)
        self.start, self.end = start, end
        self._config, self._backbone = model.config, family.backbone_of(model)
        layers = family.layers_of(model)
        taken = recorded_layers(base.config, end)
        given = recorded_layers(base.config, start) if start else []
        self._given = {index: FixedOutputLayer(layers[index]) for index in given}
        self._tapped = {index: RecordedLayer(layers[index]) for index in taken if index >= start}
        self._taken = taken
        for index in range(start):
            layers[index] = self._given.get(index) or SkippedLayer(layers[index])
        for index, tapped in self._tapped.items():
            layers[index] = tapped

    def __call__(
        self,
        states: States,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[States, torch.Tensor]:
        """Run the layers; return the states for the part above and the normalized ones (B, T, D) that a head reads.

        `states` are what the part below returned, `()` for the first part. `input_ids` (B, T) and `position_ids`
        (B or 1, T) are of the same tokens; `attention_mask` (B, S) covers all tokens seen with these, None if none is
        padding. `cache` is this part's own (`new_cache`), to which the tokens are appended.
        """
        for stand_in, state in zip(self._given.values(), states, strict=True):
            stand_in.state = state
        normalized: torch.Tensor = self._backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        taken = {**dict(zip(self._given, states, strict=True)), **{i: t.take() for i, t in self._tapped.items()}}
        return tuple(taken[index] for index in self._taken), normalized

    def new_cache(self) -> Cache:
        """Return an empty cache for this part's layers, in their own slots.

        Masks are sized after the first slot of a kind, so in the slots of the layers below stand this part's own.
        """
        cache = DynamicCache(config=self._config)
        own = cache.layers[self.start : self.end]
        for index, below in enumerate(cache.layers[: self.start]):
            alike = (layer for layer in own if layer.is_sliding == below.is_sliding)  # type: ignore[union-attr]
            cache.layers[index] = next(alike, own[0])
        return cache


class PartsCache(Cache):
    """The caches of several parts as one object: `of[i]` is that of `parts[i]`, and the whole handles like any cache.

    `get_seq_length()` is that of the lowest layer, which is the furthest ahead.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.of = [part.new_cache() for part in parts]
        self._starts = [part.start for part in parts]
        self.layer_class_to_replicate = None
        self.offloading = False

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]
        """Every slot once (a part may add slots of its own after its layers': what a PoE base's smear remembers)."""
        return [layer for cache, start in zip(self.of, self._starts, strict=True) for layer in cache.layers[start:]]


class SegmentedModel:
    """An expert's model, cut into parts after the layers in `cuts` (rising depths).

    `depths` are the depths at which the parts end; the last is full depth. Raises `DecodingError` for cuts outside the
    model, and for a base whose prediction combines all its stages.
    """

    def __init__(self, expert: Expert, cuts: Sequence[int]) -> None:
        base, stage = expert.base, expert.stage
        attached, above = _list_layers(base, stage)
        full = attached + len(above)
        if list(cuts) != sorted(set(cuts)) or not all(0 < cut < full for cut in cuts):
            raise DecodingError(f"A model of {full} layers cannot be cut after {list(cuts)}: expected rising depths.")
        if stage is None and getattr(base.config, "combiner", "last") != "last":
            raise DecodingError(
                f"This base predicts by the vote of all its stages (combiner {base.config.combiner!r}), so nothing is "
                "saved by leaving it early: expected combiner 'last', or a stage of yours on it."
            )
        self.depths = [*cuts, full]
        self.parts = [Part(base, stage, a, b) for a, b in zip([0, *cuts], self.depths, strict=True)]
        self._read = logits_of(base.config)
        top = head_below(base, full) if stage is None else family_of(base).head_of(expert.model)
        readable = [cut <= attached and exit_refusal(base, cut) is None for cut in cuts]
        self._heads = [head_below(base, cut) if can else None for cut, can in zip(cuts, readable, strict=True)] + [top]

    def logits(self, index: int, normalized: torch.Tensor) -> torch.Tensor:
        """Return what is predicted after part `index`, from its normalized states (B, T, D): logits (B, T, V).

        Within the base that is the prediction of its exit there, at the top that of the whole model.
        """
        head = self._heads[index]
        assert head is not None, f"no prediction is read after {self.depths[index]} layers"
        return self._read(head(normalized))

    def new_cache(self) -> PartsCache:
        """Return an empty cache of all parts."""
        return PartsCache(self.parts)


def segment_model(expert: Expert, cuts: Sequence[int]) -> SegmentedModel:
    """Return the expert's model with these cuts. It is built once and cached on `expert.model`."""
    cached: dict[tuple[int, ...], SegmentedModel] = vars(expert.model).setdefault("_poe_segmented", {})
    if tuple(cuts) not in cached:
        cached[tuple(cuts)] = SegmentedModel(expert, cuts)
    return cached[tuple(cuts)]


def list_exits(expert: Expert) -> list[int]:
    """Return the depths below the top at which an expert can predict: the exits of the base that lie below it.

    Below a stage these exits give the base's prediction, not the stage's.
    """
    attached, above = _list_layers(expert.base, expert.stage)
    full = attached + len(above)
    return [depth for depth in exits_of(expert.base.config) if depth <= attached and depth < full]


def _list_layers(base: PreTrainedModel, stage: Stage | None) -> tuple[int, list[Any]]:
    """Return the number of the base's layers below a stage's chain, and the chain's layers."""
    if stage is None:
        return int(base.config.num_hidden_layers), []
    return stage.chain[0].below, [layer for link in stage.chain for layer in link.layers]
