"""Fold a chain of stages into one stage, so that its delta needs no parent."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from transformers import PreTrainedModel

from poe.errors import StageError
from poe.modeling.fork import ForkedLinear
from poe.modeling.heads import HeadDelta, LowRankHead, NoHead
from poe.modeling.stage import Stage, build_stage
from poe.modeling.stage_config import StageConfig


def fold_chain(base: PreTrainedModel, stage: Stage, name: str) -> Stage:
    """Return a new stage `name` on the base itself that computes what the chain ending in `stage` computes.

    A chain of new layers becomes exact copies of all of them, attached at the boundary of the first stage. A chain of
    forks becomes one fork with the sum of their changes: of low rank if all of them are and the ranks add up to less
    than the width, else of full rank. The heads become one head delta (see `fold_heads` for its error). The dtype is
    the widest of the chain. Raises `StageError` for a chain with new layers and forks, or with forks that are not
    active on the same tokens.
    """
    chain = stage.chain
    kinds = {(link.config.layers, link.config.active) for link in chain}
    if len(kinds) > 1:
        found = ", ".join(f"{layers} on {active}" for layers, active in sorted(kinds))
        raise StageError(
            f"Stage {stage.name!r} and its parents are of several kinds ({found}), and one stage has one: publish the "
            "chain, or write an ordinary checkpoint with export_native."
        )
    head, head_rank, tensors = fold_heads([link.head for link in chain])  # type: ignore[misc]
    dtype = reduce(torch.promote_types, (p.dtype for link in chain for p in link.parameters()))
    config = StageConfig(name, sum(len(link.layers) for link in chain), head, head_rank)
    if chain[0].config.layers == "fork":
        folded = _build_fork(base, chain, config, dtype)
        tensors |= sum_changes(chain, folded)
    else:
        pattern = [entries for link in chain for entries in link.pattern]
        folded = build_stage(base, replace(config, attach_at=chain[0].config.attach_at), dtype=dtype, pattern=pattern)
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


def _build_fork(base: PreTrainedModel, chain: Sequence[Stage], config: StageConfig, dtype: torch.dtype) -> Stage:
    """Return a new fork that can hold the changes of all forks of a chain."""
    ranks = [link.config.rank for link in chain]
    linear = [m for layer in chain[0].layers for m in layer.modules() if isinstance(m, ForkedLinear)]
    smallest = min(min(module.in_features, module.out_features) for module in linear)
    rank = None if None in ranks or sum(ranks) > smallest else sum(ranks)  # type: ignore[arg-type]
    below = min(link.below for link in chain)
    config = replace(config, layers="fork", attach_at=below, rank=rank, active=chain[0].config.active)
    return build_stage(base, config, dtype=dtype)


@torch.no_grad()
def sum_changes(chain: Sequence[Stage], folded: Stage) -> dict[str, torch.Tensor]:
    """Return the tensors of the fork `folded`: for every linear layer the sum of the changes of a chain of forks."""
    tensors: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(folded.layers, start=folded.below):
        for path, module in layer.named_modules():
            if not isinstance(module, ForkedLinear):
                continue
            parts: list[Any] = [
                link.layers[index - link.below].get_submodule(path) for link in chain if link.below <= index
            ]
            name = f"layers.{index - folded.below}.{path}"
            if module.is_full:
                tensors[f"{name}.delta"] = sum((part.change() for part in parts), torch.zeros_like(module.delta))
            else:
                a, b = torch.zeros_like(module.a), torch.zeros_like(module.b)
                done = 0
                for part in parts:
                    a[done : done + len(part.a)], b[:, done : done + len(part.a)] = part.a, part.b
                    done += len(part.a)
                tensors[f"{name}.a"], tensors[f"{name}.b"] = a, b
    return tensors


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
