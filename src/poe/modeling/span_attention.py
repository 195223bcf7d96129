"""Attention of packed rows on a CPU, one document or one answer at a time.

In a packed row most pairs of tokens belong to different documents. Attention with a mask computes them all and throws
them away, which took a third of a fork's step. Inside `attend_by_span` the "sdpa" attention of the layers gets each
`Span` of a row in a call of its own, with the keys that it sees. A mask without spans is used as it is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "poe_spans"
_BLOCK = 64  # tokens: torch keeps a kernel for every new shape. For fewer than 16 it also turns nan into zeros


class Span(NamedTuple):
    """The queries `start:stop` of a row, and the `keys` that they see: a few (start, stop) of the row's keys.

    If `causal`, there are as many keys as queries, and each query sees those up to its own. Else the mask decides.
    """

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]
    causal: bool = False


Spans = Sequence[Sequence[Span]]  # of each row, in rising order; queries between them are not used


def attach_spans(mask: Tensor, spans: Spans | None) -> Tensor:
    """Return a bool mask (B, 1, Q, S) that carries spans."""
    mask.spans = spans  # type: ignore[attr-defined]  # an attribute: a model hands its mask on to every layer
    return mask


def find_documents(mask: Tensor) -> Spans | None:
    """Return the documents of a mask (B, 1, T, T) as spans; None if its rows are anything but causal documents."""
    seen, order = mask[:, 0], torch.arange(mask.shape[-1])
    first = seen.to(torch.uint8).argmax(-1)  # (B, T): the first key that a token sees
    begins = first == order
    starts = torch.where(begins, order, 0).cummax(1).values
    if not (torch.equal(first, starts) and torch.equal(seen.sum(-1), order - first + 1) and not seen.triu(1).any()):
        return None
    rows = [[*row.nonzero().squeeze(1).tolist(), mask.shape[-1]] for row in begins]
    return [[Span(a, b, ((a, b),), causal=True) for a, b in pairwise(row)] for row in rows]


def find_layers_config(module: nn.Module) -> PreTrainedConfig | None:
    """Return the config that the attention layers in a model or a layer share; None without such a layer."""
    configs = (getattr(each, "config", None) for each in module.modules() if hasattr(each, "layer_idx"))
    return next((config for config in configs if isinstance(config, PreTrainedConfig)), None)


def has_spans(config: PreTrainedConfig | None) -> bool:
    """Return whether layers with this config attend by spans now."""
    return config is not None and config._attn_implementation == NAME


@contextmanager
def attend_by_span(config: PreTrainedConfig | None, device: torch.device) -> Iterator[None]:
    """Inside the `with` block, layers that share `config` attend by spans, if they have "sdpa" attention on a CPU."""
    if config is None or config._attn_implementation != "sdpa" or device.type != "cpu":
        yield
        return
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = "sdpa"


def attend_again(layer: nn.Module) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Return `context_fn` of torch.utils.checkpoint: what is computed again attends as it did before."""
    config = find_layers_config(layer)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), attend_by_span(config if has_spans(config) else None, torch.device("cpu"))

    return contexts


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
                    seen = _join([attention_mask[own, :, queries, a:b] for a, b in span.keys], dim=3)
                    mask = _fill(_fill(seen, 3), 2)
                    mask[:, :, span.stop - span.start :, 0] = True  # what fills a block has to see something
                q, keys, values = (_fill(x, 2) for x in (query[own, :, queries], keys, values))
                output = sdpa_attention_forward(module, q, keys, values, mask, **kwargs)[0]
                pieces.append(output[:, : span.stop - span.start])
            done = span.stop
        outputs.append(_join(pieces, dim=1))
    return _join(outputs, dim=0), None


def _fill(x: Tensor, dim: int) -> Tensor:
    """Fill the last block of one dimension with zeros."""
    missing = -x.shape[dim] % _BLOCK
    return functional.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing)) if missing else x


def _join(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _span_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return the mask that transformers makes for "sdpa", with its documents."""
    mask = sdpa_mask(*args, **kwargs)
    return mask if mask is None or mask.shape[2] != mask.shape[3] else attach_spans(mask, find_documents(mask))


AttentionInterface.register(NAME, _span_attention)
AttentionMaskInterface.register(NAME, _span_mask)
