"""Activation checkpointing: layers that keep only their input for the backward pass, and compute the rest again."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Recompute what is inside each of `layers` during the backward pass, within a `with` block.

    Non-reentrant (torch.utils.checkpoint), so gradients are exactly those without. Of a layer only its `forward` is
    wrapped: hooks run once. It trades about a third more compute in these layers for memory; a frozen layer keeps
    nothing anyway.
    """
    wrapped = list(layers)
    for layer in wrapped:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in wrapped:
            del layer.forward  # the class's own is in sight again
