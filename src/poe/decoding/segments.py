"""A model cut into segments: each runs some of the layers on given states, with a key-value cache of its own.

A segment is the base's native class with its lower layers skipped (like the halves of a `Boundary`), so the family's
own code computes masks, rotary positions, layer types, value embeddings and the final norm. The segments one after the
other compute what the whole model computes. A lower segment can be many tokens ahead of an upper one.
Shape letters: B batch, T tokens of a call, S tokens so far, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from poe.decoding.strategy import Expert
from poe.errors import DecodingError, FamilyError
from poe.modeling.exits import exits_of, head_below, no_exit_reason
from poe.modeling.families import family_of, logits_of
from poe.modeling.growth import build_shell, sync_attention
from poe.modeling.stage import Stage
from poe.modeling.standins import FixedOutputLayer, RecordedLayer, SkippedLayer, boundary_layers

States = tuple[torch.Tensor, ...]
"""The states that one segment passes to the next, each (B, T, D): the residual stream last.

The states before it are outputs of lower layers that upper layers read again.
"""


class Segment:
    """Layers `start` to `end` of the model that ends in `stage` (None: in the base), counted from the embedding.

    The layers are the base's up to the attachment of the stage's chain, then the chain's. A segment shares every tensor
    with the base and its stages and changes none of their modules. Raises `FamilyError` for a recurrent base, because
    its layers run several times, and `DecodingError` for depths outside the model.
    """

    def __init__(self, base: PreTrainedModel, stage: Stage | None, start: int, end: int) -> None:
        family = family_of(base)
        if family.recurrent:
            raise FamilyError(
                f"A base of model type {base.config.model_type!r} is recurrent: its layers run in every cycle, so it "
                "cannot be cut into segments. Expected a base that runs each layer once: leave out strategy=."
            )
        if stage is not None and not stage.reads_prompt:
            raise DecodingError(
                f"Stage {stage.name!r} is active on the answer alone, and the parts of a cut model cannot follow that: "
                "leave out strategy=."
            )
        attached, above = _list_layers(base, stage)
        depth = attached + len(above)
        if not 0 <= start < end <= depth:
            raise DecodingError(f"Expected a range of the {depth} layers, got layers {start} to {end}.")
        model = build_shell(base, above[: max(0, end - attached)], family.head_of(base), below=min(end, attached))
        sync_attention(base, model)
        self.start, self.end = start, end
        self._config, self._backbone = model.config, family.backbone_of(model)
        layers = family.layers_of(model)
        self._output_layers = boundary_layers(base.config, end)
        input_layers = boundary_layers(base.config, start) if start else []
        self._inputs = {index: FixedOutputLayer(layers[index]) for index in input_layers}
        self._recorded = {index: RecordedLayer(layers[index]) for index in self._output_layers if index >= start}
        for index in range(start):
            layers[index] = self._inputs.get(index) or SkippedLayer(layers[index])
        for index, recorded in self._recorded.items():
            layers[index] = recorded

    def __call__(
        self,
        states: States,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[States, torch.Tensor]:
        """Run the layers; return the states for the next segment and the normalized hidden states (B, T, D).

        `states` are those of the segment below, `()` for the first one. `input_ids` (B, T) and `position_ids`
        (B or 1, T) are of the same tokens. `attention_mask` (B, S) covers all tokens so far, including these; None if
        there is no padding. `cache` is this segment's own (`new_cache`); the tokens are appended to it.
        """
        for layer, state in zip(self._inputs.values(), states, strict=True):
            layer.state = state
        normalized: torch.Tensor = self._backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        outputs = dict(zip(self._inputs, states, strict=True))
        outputs |= {index: layer.take() for index, layer in self._recorded.items()}
        return tuple(outputs[index] for index in self._output_layers), normalized

    def new_cache(self) -> Cache:
        """Return an empty cache for this segment's layers, in their usual slots.

        The slots of the skipped layers hold this segment's own cache layers, because transformers takes the size of a
        mask from the first slot of a kind.
        """
        cache = DynamicCache(config=self._config)
        own_layers = cache.layers[self.start : self.end]
        for index, below in enumerate(cache.layers[: self.start]):
            alike = (layer for layer in own_layers if layer.is_sliding == below.is_sliding)  # type: ignore[union-attr]
            cache.layers[index] = next(alike, own_layers[0])
        return cache


class SegmentedCache(Cache):
    """The caches of several segments as one cache: `of[i]` belongs to `segments[i]`.

    `get_seq_length()` is that of the lowest layer, which has the most tokens.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.of = [segment.new_cache() for segment in segments]
        self._starts = [segment.start for segment in segments]
        self.layer_class_to_replicate = None
        self.offloading = False

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]
        """Each slot once, with the extra slots after the layers' (the smear of a PoE base has one)."""
        return [layer for cache, start in zip(self.of, self._starts, strict=True) for layer in cache.layers[start:]]


class SegmentedModel:
    """An expert's model, cut into segments after the layers in `cuts` (rising depths).

    `depths` are the depths at which the segments end; the last is full depth. Raises `DecodingError` for cuts outside
    the model, and for a base that combines the predictions of all its stages.
    """

    def __init__(self, expert: Expert, cuts: Sequence[int]) -> None:
        base, stage = expert.base, expert.stage
        attached, above = _list_layers(base, stage)
        full = attached + len(above)
        if list(cuts) != sorted(set(cuts)) or not all(0 < cut < full for cut in cuts):
            raise DecodingError(
                f"A model of {full} layers cannot be cut after {list(cuts)}: expected rising depths below {full}."
            )
        if stage is None and getattr(base.config, "combiner", "last") != "last":
            raise DecodingError(
                f"This base combines the predictions of all its stages (combiner {base.config.combiner!r}), so leaving "
                "early saves nothing: expected combiner 'last', or an added stage."
            )
        self.depths = [*cuts, full]
        self.segments = [Segment(base, stage, a, b) for a, b in zip([0, *cuts], self.depths, strict=True)]
        self._scale_logits = logits_of(base.config)
        top = head_below(base, full) if stage is None else family_of(base).head_of(expert.model)
        readable = [cut <= attached and no_exit_reason(base, cut) is None for cut in cuts]
        self._heads = [head_below(base, cut) if can else None for cut, can in zip(cuts, readable, strict=True)] + [top]

    def logits(self, index: int, normalized: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, T, V) after segment `index`, from its normalized hidden states (B, T, D).

        After the last segment they are the model's, before it those of the base's exit at that depth.
        """
        head = self._heads[index]
        assert head is not None, f"there is no exit after {self.depths[index]} layers"
        return self._scale_logits(head(normalized))

    def new_cache(self) -> SegmentedCache:
        """Return an empty cache of all segments."""
        return SegmentedCache(self.segments)


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
    return stage.foot, stage.stack
