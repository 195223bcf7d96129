"""Adaptive depth: every token leaves at the first exit that is sure enough, and nothing below it is approximated.

A token that left early is still missing in the caches above its exit. Its states wait there, and the upper part runs
over all that wait, in one pass, when a later token has to go further: so every key and value is what the plain path
computes, and a token that does go to the top gets the plain path's prediction. What is saved is that a pass over many
waiting tokens reads the weights once (CALM, arXiv 2207.07061, copies the states instead, which changes them).
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from poe.decoding.segments import Part, PartsCache, SegmentedModel, States
from poe.errors import DecodingError

Confidence = Literal["margin", "probability", "agreement"]
CONFIDENCES: tuple[Confidence, ...] = get_args(Confidence)


class Confidences:
    """How sure the exits of one call are, asked from the lowest exit upwards.

    "probability" is that of the likeliest token, "margin" its lead over the second, "agreement" how many exits in
    a row, this one included, find the same token the likeliest.
    """

    def __init__(self, kind: Confidence) -> None:
        if kind not in CONFIDENCES:
            raise DecodingError(f"confidence must be one of {', '.join(CONFIDENCES)}, got {kind!r}.")
        self._kind = kind
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None  # what the last exit said, and how many had

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of the next exit -> its confidence (...), in fp32."""
        if self._kind == "agreement":
            said = logits.argmax(-1)
            count = torch.ones_like(said, dtype=torch.float32)
            if self._before is not None:
                count = torch.where(said == self._before[0], self._before[1] + 1, count)
            self._before = said, count
            return count
        likeliest = logits.float().softmax(-1).topk(2, dim=-1).values
        return likeliest[..., 0] - likeliest[..., 1] if self._kind == "margin" else likeliest[..., 0]


class WaitingCache(PartsCache):
    """The caches of the parts, and for every part the states of the tokens that have not come so far yet."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(parts)
        self._waiting: list[list[tuple[States, torch.Tensor, torch.Tensor]]] = [[] for _ in parts]

    def wait(self, index: int, states: States, input_ids: torch.Tensor, position_ids: torch.Tensor) -> None:
        """Let tokens (their states and ids (B, T), positions (B or 1, T)) wait below part `index`."""
        self._waiting[index].append((states, input_ids, position_ids))

    def take(self, index: int) -> tuple[States, torch.Tensor, torch.Tensor]:
        """Return all tokens that wait below part `index`, in order, and forget them."""
        waiting, self._waiting[index] = self._waiting[index], []
        if len(waiting) == 1:
            return waiting[0]
        states, ids, positions = zip(*waiting, strict=True)
        together = tuple(torch.cat(tensors, dim=1) for tensors in zip(*states, strict=True))
        return together, torch.cat(ids, dim=1), torch.cat(positions, dim=1)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows, those that wait too."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._waiting = [
            [(tuple(s[beam_idx] for s in states), ids[beam_idx], _rows(at, beam_idx)) for states, ids, at in waiting]
            for waiting in self._waiting
        ]

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: no way of decoding takes back tokens of a model that leaves early."""
        raise DecodingError("Tokens cannot be taken back from a model that leaves early: expected plain decoding.")


class LeavesEarly:
    """The forward pass of a model that leaves early: `thresholds[i]` is for the exit at the end of part `i`.

    Each position of each row gets the logits of the first exit that is sure of it, or those of the top. The parts above
    run when any row needs them.
    """

    def __init__(self, path: SegmentedModel, thresholds: Sequence[float], confidence: Confidence) -> None:
        self._path, self._thresholds, self._confidence = path, [*thresholds], confidence

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
        """Token ids (B, T) -> logits (B, T or `logits_to_keep`, V), as the native forward passes do."""
        cache = past_key_values
        if not isinstance(cache, WaitingCache):
            if cache is not None and (not isinstance(cache, DynamicCache) or cache.get_seq_length()):
                raise DecodingError(
                    f"A model that leaves early keeps a dynamic cache of its own, got a {type(cache).__name__}: pass "
                    "all tokens, and neither past_key_values nor cache_implementation."
                )
            cache = WaitingCache(self._path.parts)
        count = input_ids.shape[1]
        if position_ids is None:
            seen = cache.get_seq_length()
            position_ids = torch.arange(seen, seen + count, device=input_ids.device)[None]
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
        cache: WaitingCache,
        kept: int,
    ) -> torch.Tensor:
        parts, confidence = self._path.parts, Confidences(self._confidence)
        settled = chosen = torch.empty(0)
        cache.wait(0, (), input_ids, position_ids)
        for index, part in enumerate(parts):
            states, ids, where = cache.take(index)
            states, hidden = part(states, ids, where, attention_mask, cache.of[index])
            logits = self._path.logits(index, hidden[:, -kept:])
            chosen = torch.where(settled[..., None], chosen, logits) if index else logits
            if index == len(parts) - 1:
                break
            cache.wait(index + 1, states, ids, where)
            sure = confidence(logits) >= self._thresholds[index]
            settled = settled | sure if index else sure
            if settled.all():
                break
        return chosen


def leaves_early(
    model: PreTrainedModel, path: SegmentedModel, thresholds: Sequence[float], confidence: Confidence
) -> PreTrainedModel:
    """Return `model` with a forward pass that leaves early; its `generate` is the native one. `model` stays."""
    early = copy.copy(model)
    early.forward = LeavesEarly(path, thresholds, confidence).forward
    return early


def _rows(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    selected: torch.Tensor = tensor[index]
    return selected
