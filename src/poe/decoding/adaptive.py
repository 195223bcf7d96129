"""Adaptive depth: each token leaves at the first exit that is confident enough.

A token that left early has no keys and values above its exit yet. Its states are queued there. When a later token goes
further, the upper layers first run over all queued tokens in one pass. Every key and value therefore equals that of
plain decoding, and a token that reaches the top gets the plain prediction. One pass over many queued tokens reads the
weights once, which saves the time. (CALM, arXiv 2207.07061, copies the states instead, which changes them.)
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from poe.decoding.segments import Segment, SegmentedCache, SegmentedModel, States
from poe.errors import DecodingError

Confidence = Literal["margin", "probability", "agreement"]
CONFIDENCES: tuple[Confidence, ...] = get_args(Confidence)


class ConfidenceMeter:
    """Measures the confidence of the exits of one forward pass, called from the lowest exit upwards.

    "probability" is the probability of the most likely token. "margin" is its lead over the second one. "agreement" is
    the number of consecutive exits, up to this one, with the same most likely token.
    """

    def __init__(self, kind: Confidence) -> None:
        if kind not in CONFIDENCES:
            raise DecodingError(f"confidence must be one of {', '.join(CONFIDENCES)}, got {kind!r}.")
        self._kind = kind
        self._previous: tuple[torch.Tensor, torch.Tensor] | None = None  # most likely tokens, and their counts

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Map the logits (..., V) of the next exit to its confidence (...), in fp32."""
        if self._kind == "agreement":
            tokens = logits.argmax(-1)
            count = torch.ones_like(tokens, dtype=torch.float32)
            if self._previous is not None:
                count = torch.where(tokens == self._previous[0], self._previous[1] + 1, count)
            self._previous = tokens, count
            return count
        best = logits.float().softmax(-1).topk(2, dim=-1).values
        return best[..., 0] - best[..., 1] if self._kind == "margin" else best[..., 0]


class QueueingCache(SegmentedCache):
    """The caches of the segments, and for each segment a queue of the tokens that have not run through it yet."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__(segments)
        self._queues: list[list[tuple[States, torch.Tensor, torch.Tensor]]] = [[] for _ in segments]

    def enqueue(self, index: int, states: States, input_ids: torch.Tensor, position_ids: torch.Tensor) -> None:
        """Add tokens to the queue of segment `index`: their states and ids (B, T), and positions (B or 1, T)."""
        self._queues[index].append((states, input_ids, position_ids))

    def dequeue(self, index: int) -> tuple[States, torch.Tensor, torch.Tensor]:
        """Return and remove all queued tokens of segment `index`, in order."""
        queue, self._queues[index] = self._queues[index], []
        if len(queue) == 1:
            return queue[0]
        states, ids, positions = zip(*queue, strict=True)
        joined = tuple(torch.cat(tensors, dim=1) for tensors in zip(*states, strict=True))
        return joined, torch.cat(ids, dim=1), torch.cat(positions, dim=1)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows of the caches and of the queues."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._queues = [
            [(tuple(s[beam_idx] for s in states), ids[beam_idx], _select(at, beam_idx)) for states, ids, at in queue]
            for queue in self._queues
        ]

    def crop(self, tokens_to_remove: int) -> None:
        """Raise `DecodingError`: queued tokens cannot be removed."""
        raise DecodingError("Adaptive depth cannot remove tokens from its cache: expected plain decoding.")


class AdaptiveForward:
    """A forward pass with adaptive depth: `thresholds[i]` belongs to the exit at the end of segment `i`.

    Each position of each row gets the logits of the first exit that is confident enough, or those of the top. An upper
    segment runs when any row needs it.
    """

    def __init__(self, segmented: SegmentedModel, thresholds: Sequence[float], confidence: Confidence) -> None:
        self._segmented, self._thresholds, self._confidence = segmented, [*thresholds], confidence

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Map token ids (B, T) to logits (B, T or `logits_to_keep`, V), like the native forward pass."""
        cache = past_key_values
        if not isinstance(cache, QueueingCache):
            if cache is not None and (not isinstance(cache, DynamicCache) or cache.get_seq_length()):
                raise DecodingError(
                    f"Adaptive depth needs a dynamic cache of its own, got a {type(cache).__name__}: pass all tokens, "
                    "without past_key_values and cache_implementation."
                )
            cache = QueueingCache(self._segmented.segments)
        count = input_ids.shape[1]
        if position_ids is None:
            past = cache.get_seq_length()
            position_ids = torch.arange(past, past + count, device=input_ids.device)[None]
        if position_ids.shape[0] != input_ids.shape[0]:
            position_ids = position_ids.expand(input_ids.shape[0], -1)
        kept = min(logits_to_keep or count, count)
        logits = self._logits(input_ids, position_ids, attention_mask, cache, kept)
        return CausalLMOutputWithPast(logits=logits, past_key_values=None if use_cache is False else cache)

    def _logits(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: QueueingCache,
        kept: int,
    ) -> torch.Tensor:
        segments, measure = self._segmented.segments, ConfidenceMeter(self._confidence)
        has_left = chosen = torch.empty(0)
        cache.enqueue(0, (), input_ids, position_ids)
        for index, segment in enumerate(segments):
            states, ids, positions = cache.dequeue(index)
            states, hidden = segment(states, ids, positions, attention_mask, cache.of[index])
            logits = self._segmented.logits(index, hidden[:, -kept:])
            chosen = torch.where(has_left[..., None], chosen, logits) if index else logits
            if index == len(segments) - 1:
                break
            cache.enqueue(index + 1, states, ids, positions)
            confident = measure(logits) >= self._thresholds[index]
            has_left = has_left | confident if index else confident
            if has_left.all():
                break
        return chosen


def with_adaptive_depth(
    model: PreTrainedModel, segmented: SegmentedModel, thresholds: Sequence[float], confidence: Confidence
) -> PreTrainedModel:
    """Return a shallow copy of `model` with an adaptive forward pass and the native `generate`."""
    adaptive = copy.copy(model)
    adaptive.forward = AdaptiveForward(segmented, thresholds, confidence).forward
    return adaptive


def _select(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    selected: torch.Tensor = tensor[index]
    return selected
