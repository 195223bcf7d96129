"""Attention of packed rows on a CPU, one document or one answer at a time.

In a packed row most pairs of tokens belong to different documents. Attention with a mask computes them all and throws
them away, which took a third of a fork's step. Inside `attend_by_span` the "sdpa" attention of the layers gets each
`Span` of a row in a call of its own, with the keys that it sees. A mask without spans is used as it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "poe_spans"


class Span(NamedTuple):
    """The queries `start:stop` of a row, and the `keys` that they see: a few (start, stop) of the row's keys.

    If `causal`, there are as many keys as queries, and each query sees those up to its own. Else the mask decides.
    """

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]
    causal: bool = False


def attach_spans(mask: Tensor, spans: Sequence[Sequence[Span]]) -> Tensor:
    """Return a bool mask (B, 1, Q, S) that carries the spans of its rows, in rising order; other queries get zeros."""
    mask.spans = spans  # type: ignore[attr-defined]  # an attribute: a model hands its mask on to every layer
    return mask


@contextmanager
def attend_by_span(config: PreTrainedConfig) -> Iterator[None]:
    """Inside the `with` block, layers that share `config` and have "sdpa" attention attend by the spans of a mask."""
    if config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = "sdpa"


def _span_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Map queries (B, H, Q, E), keys and values (B, G, S, E) to (B, Q, H, E), as transformers' attention does."""
    rows = getattr(attention_mask, "spans", None)
    if attention_mask is None or rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for row, spans in enumerate(rows):
        own = slice(row, row + 1)
        pieces, done = [], 0
        for span in [*spans, Span(query.shape[2], query.shape[2], ())]:
            if span.start > done:
                pieces.append(value.new_zeros(1, span.start - done, query.shape[1], value.shape[-1]))
            if span.keys:
                queries = slice(span.start, span.stop)
                keys, values = (_join([x[own, :, a:b] for a, b in span.keys], dim=2) for x in (key, value))
                mask = None
                if not span.causal:
                    mask = _join([attention_mask[own, :, queries, a:b] for a, b in span.keys], dim=3)
                pieces.append(sdpa_attention_forward(module, query[own, :, queries], keys, values, mask, **kwargs)[0])
            done = span.stop
        outputs.append(_join(pieces, dim=1))
    return _join(outputs, dim=0), None


def _join(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


AttentionInterface.register(NAME, _span_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
