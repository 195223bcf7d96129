"""Rows that are decoded together and come and go between the passes.

All rows of a batch have one cache, padded on the left to the longest row. A row joins by a pass over its prompt alone;
its keys and values are then appended as one more row. A row leaves by an index. Padded keys are masked, so a row
computes what it computes alone, up to the rounding of larger matrix products.
Shape letters: B rows, T tokens of a pass, S columns of the cache, V vocabulary.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from poe.decoding.branches import BranchedModel
from poe.modeling.families import is_prefix_lm
from poe.modeling.placement import device_of


class RowCache(DynamicCache):
    """A cache of full length in every slot, also those with a sliding window: the masks of the model apply windows.

    Transformers' layer for windows counts positions for the whole batch, and here each row has its own.
    """


class Batch:
    """The rows that one model decodes. `branches` has the index of each row's expert (always 0 in a plain model)."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()
        self._is_routed = isinstance(model, BranchedModel)
        self._device = device_of(model.get_input_embeddings())
        self._cache = RowCache()
        self.branches: list[int] = []
        self.lengths: list[int] = []

    def __len__(self) -> int:
        return len(self.branches)

    @torch.no_grad()
    def join(self, prompts: Sequence[Sequence[int]], branches: Sequence[int]) -> Tensor:
        """Append rows for prompts (token ids) and return the logits (rows, V) of their first tokens."""
        cache, lengths = RowCache(), [len(prompt) for prompt in prompts]
        width = max(lengths)
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        logits = self._run(ids, cache, branches, lengths)
        self._append(cache, branches, lengths)
        return logits

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row and return the logits (B, V) of the next ones."""
        lengths = [length + 1 for length in self.lengths]
        logits = self._run(torch.tensor(tokens)[:, None], self._cache, self.branches, lengths)
        self.lengths = lengths
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the rows at these rising indices and remove all others."""
        if len(rows) == len(self):
            return
        slots = self._rows_of_slots()
        width, kept = max(self.lengths), torch.tensor(rows, dtype=torch.long)
        self.branches, self.lengths = [self.branches[i] for i in rows], [self.lengths[i] for i in rows]
        if not rows:
            self._cache = RowCache()
            return
        unused = width - max(self.lengths)  # columns that are padding in all rows now
        cached: Any = self._cache.layers
        for slot, layer in enumerate(cached):
            if layer.keys is None:
                continue
            present = slots.get(slot)
            index = kept if present is None else torch.isin(present, kept).nonzero()[:, 0]
            if len(index):
                index = index.to(layer.keys.device)
                layer.keys, layer.values = layer.keys[index, :, unused:], layer.values[index, :, unused:]
            else:
                layer.reset()

    def clear(self) -> None:
        """Remove all rows."""
        self._cache, self.branches, self.lengths = RowCache(), [], []

    def _run(self, ids: Tensor, cache: RowCache, branches: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Run the model on the last tokens (B, T) of rows of these lengths; return the next logits (B, V)."""
        width = max(lengths)
        starts = width - torch.tensor(lengths)[:, None]
        columns = torch.arange(width)
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": (columns >= starts).long(),
            "position_ids": (columns - starts).clamp_min(0)[:, -ids.shape[1] :],
        }
        if is_prefix_lm(self._model.config) and not cache.get_seq_length():
            inputs["token_type_ids"] = inputs["attention_mask"]
        if self._is_routed:
            inputs["branch"] = torch.tensor(branches)
        inputs = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        logits: Tensor = self._model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].float()

    def _append(self, cache: RowCache, branches: Sequence[int], lengths: Sequence[int]) -> None:
        """Append the rows of another cache. If memory is short, nothing has changed."""
        width = max([*self.lengths, *lengths])
        layers: list[Any] = []
        pairs: Any = zip_longest(self._cache.layers, cache.layers)
        for pair in pairs:
            filled = [layer for layer in pair if layer is not None and layer.keys is not None]
            layers.append(_join_layers(filled, width) if filled else DynamicLayer())
        self._cache.layers = layers
        self.branches, self.lengths = [*self.branches, *branches], [*self.lengths, *lengths]

    def _rows_of_slots(self) -> dict[int, Tensor]:
        """Return the rows in each slot of the cache that has not all of them."""
        return self._model.rows_of_slots(torch.tensor(self.branches)) if self._is_routed else {}


def _join_layers(layers: Sequence[Any], width: int) -> DynamicLayer:
    """Return a layer with the rows of all these, padded on the left to `width` columns."""
    joined = DynamicLayer()
    joined.lazy_initialization(layers[0].keys, layers[0].values)
    joined.keys = torch.cat([_pad(layer.keys, width) for layer in layers])
    joined.values = torch.cat([_pad(layer.values, width) for layer in layers])
    return joined


def _pad(states: Tensor, width: int) -> Tensor:
    """Pad keys or values (B, heads, S, width of a head) on the left to `width` columns."""
    return F.pad(states, (0, 0, width - states.shape[2], 0))
