"""PrefixLM bases, which read a prompt in both directions: the attention of packed rows while a stage is trained.

The prompt of a document is what comes before the first token that is learned. transformers' `token_type_ids` would join
the prompts of all documents in a row into one block, so the mask is made here, by transformers' own maker.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from poe.data.packing import IGNORED, Batch


def prompt_positions(batch: Batch) -> Tensor:
    """(B, T) bool: the tokens of each document up to the one whose label is the first that is learned."""
    learned = (batch.labels != IGNORED).long()
    before = learned.cumsum(1) - learned  # labels learned before each position
    begins = torch.where(batch.position_ids == 0, before, 0).cummax(1).values  # ... before each document
    return before == begins


def prompt_attention(model: PreTrainedModel, batch: Batch) -> Any:
    """The mask, as `model`'s attention wants it: causal within a document, and every prompt sees all of itself."""
    prompt = prompt_positions(batch)
    document = (batch.position_ids == 0).cumsum(1)

    def both_in_prompt(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return prompt[row, query] & prompt[row, key]

    def same_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return document[row, query] == document[row, key]

    return create_causal_mask(
        config=model.config,
        inputs_embeds=torch.empty(*batch.input_ids.shape, 1, dtype=model.dtype, device=batch.input_ids.device),
        attention_mask=None,
        past_key_values=None,
        position_ids=None,  # with those of a packed row it would count places from each document's beginning
        or_mask_function=both_in_prompt,
        and_mask_function=same_document,
    )
