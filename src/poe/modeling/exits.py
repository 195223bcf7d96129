"""Where a model can be left before its top: the depths at which a prediction can be read, and what reads it.

A depth is a number of layers. The final norm and the head of a model read the residual stream after any of its layers;
on a PoE base trained by local learning what they read at a boundary is a complete prediction.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .failures import FamilyError
from .families import family_of
from .growth import shell, sync_attention
from .heads import FoldedHead, HeadDelta


def exits_of(config: PreTrainedConfig) -> list[int]:
    """Return the depths at which a base can be left, its top the last: a PoE base's boundaries, or any layer."""
    boundaries = getattr(config, "boundaries", None) if getattr(config, "stage_layers", None) else None
    return list(boundaries or range(1, config.num_hidden_layers + 1))


def exit_refusal(base: PreTrainedModel, depth: int) -> str | None:
    """Return why a base cannot be left after `depth` layers, or None if it can."""
    exits = exits_of(base.config)
    if family_of(base).recurrent and depth != exits[-1]:
        return (
            f"a base of model type {base.config.model_type!r} is recurrent, its layers run again in every cycle: "
            "there is no depth at which it could be left"
        )
    if isinstance(depth, bool) or depth not in exits:
        known = ", ".join(map(str, exits)) if len(exits) <= 12 else f"1 to {exits[-1]}"
        kind = "its stages" if getattr(base.config, "stage_layers", None) else "its layers"
        return f"this base can be left after any of {kind}: expected {known} (layers)"
    return None


class _StageHead(HeadDelta):
    """A PoE base's own head of one stage, as a delta of the shared head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def delta(self) -> torch.Tensor:
        weight: torch.Tensor = self.head.weight  # type: ignore[assignment]
        return weight.float()


def head_below(base: PreTrainedModel, depth: int) -> nn.Module:
    """Return the module, with `weight` (V, D), that reads a base's normalized state after `depth` layers.

    That is the base's head; where every stage of a PoE base has its own, the sum of the two.
    """
    head = family_of(base).head_of(base)
    own = getattr(base, "lm_head_stages", None)
    if not getattr(base.config, "stage_heads", False) or own is None:
        return head
    return FoldedHead(head, [_StageHead(own[base.config.boundaries.index(depth)])])


def exit_at(base: PreTrainedModel, depth: int) -> PreTrainedModel:
    """Return the base as a model of its own class that ends after `depth` layers; it shares every tensor.

    Raises `FamilyError` where the base cannot be left.
    """
    if reason := exit_refusal(base, depth):
        raise FamilyError(f"exit is {depth!r}, but {reason}.")
    model = shell(base, [], head_below(base, depth), below=depth)
    sync_attention(base, model)
    return model
