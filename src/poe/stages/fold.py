"""Fold a chain of stages into one stage, so that its delta needs no parent."""

from collections.abc import Sequence
from functools import reduce

import torch
from transformers import PreTrainedModel

from poe.modeling.heads import HeadDelta, LowRankHead, NoHead
from poe.modeling.stage import Stage, build_stage
from poe.modeling.stage_config import StageConfig


def fold_chain(base: PreTrainedModel, stage: Stage, name: str) -> Stage:
    """Return a new stage `name` on the base itself that computes what the chain ending in `stage` computes.

    The new stage has exact copies of all layers of the chain, and one head delta (see `fold_heads` for its error). It
    attaches at the boundary of the first stage. Its dtype is the widest of the chain.
    """
    chain = stage.chain
    head, rank, tensors = fold_heads([link.head for link in chain])  # type: ignore[misc]
    config = StageConfig(name, sum(len(link.layers) for link in chain), head, rank, attach_at=chain[0].config.attach_at)
    dtype = reduce(torch.promote_types, (p.dtype for link in chain for p in link.parameters()))
    folded = build_stage(base, config, dtype=dtype)
    offset = 0
    for link in chain:
        for path, tensor in link.layers.state_dict().items():
            index, rest = path.split(".", 1)
            tensors[f"layers.{int(index) + offset}.{rest}"] = tensor
        offset += len(link.layers)
    folded.load_delta(tensors)
    folded.prompt, folded.generation_config = stage.prompt, stage.generation_config
    folded.saved_dtype = reduce(torch.promote_types, (s.saved_dtype or torch.bfloat16 for s in chain), torch.bfloat16)
    return folded


@torch.no_grad()
def fold_heads(heads: Sequence[HeadDelta]) -> tuple[str, int, dict[str, torch.Tensor]]:
    """Return the sum of head deltas as one: its kind, rank (1 for a kind without rank) and tensors (`head.*`).

    - Heads of kind "none" add nothing. A single other delta is returned unchanged, bit for bit.
    - Low-rank deltas are concatenated along the rank, `[b_1 b_2] @ [a_1; a_2]`, if that has fewer numbers than a
      dense delta.
    - Any other sum is dense, in fp32, in the order of the chain.

    The folded head W + (d_1 + ... + d_k) differs from that of the chain, (W + d_1) + ... + d_k, because the sums are
    rounded in another order: in each element by at most 2 n 2^-24 (|W| + |d_1| + ... + |d_k|), where n is the number
    of sums and ranks. A dense sum is also rounded to the dtype of the stage, and both heads to that of the base.
    """
    parts = [head for head in heads if not isinstance(head, NoHead)]
    if not parts:
        return "none", 1, {}
    low = [part for part in parts if isinstance(part, LowRankHead)]
    if len(low) == len(parts):
        rank = sum(len(part.a) for part in low)
        (vocabulary, _), (_, width) = low[0].b.shape, low[0].a.shape
        if len(low) == 1 or rank * (vocabulary + width) < vocabulary * width:
            a, b = torch.cat([part.a for part in low]), torch.cat([part.b for part in low], dim=1)
            return "low_rank", rank, {"head.a": a, "head.b": b}
    changes = [change for part in parts if (change := part.delta()) is not None]
    return "dense", 1, {"head.weight": sum(changes[1:], changes[0])}
