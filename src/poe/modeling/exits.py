"""Exits: the depths at which a model can predict before its last layer, and the head that reads each of them.

A depth is a number of layers. A model's final norm and head can read the residual stream after any layer. On a PoE base
trained by local learning, a boundary between stages has a complete prediction.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .failures import FamilyError
from .families import family_of
from .growth import build_shell, sync_attention
from .heads import FoldedHead, HeadDelta


def exits_of(config: PreTrainedConfig) -> list[int]:
    """Return the exits of a base, full depth last: the boundaries of a PoE base, or every layer."""
    boundaries = getattr(config, "boundaries", None) if getattr(config, "stage_layers", None) else None
    return list(boundaries or range(1, config.num_hidden_layers + 1))


def no_exit_reason(base: PreTrainedModel, depth: int) -> str | None:
    """Return why a base has no exit after `depth` layers, or None if it has one."""
    exits = exits_of(base.config)
    if family_of(base).recurrent and depth != exits[-1]:
        return (
            f"a base of model type {base.config.model_type!r} is recurrent: its layers run in every cycle, so it has "
            "no exit"
        )
    if isinstance(depth, bool) or depth not in exits:
        depths = ", ".join(map(str, exits)) if len(exits) <= 12 else f"1 to {exits[-1]}"
        kind = "stages" if getattr(base.config, "stage_layers", None) else "layers"
        return f"this base has exits after its {kind}: expected {depths} (layers)"
    return None


class _StageHead(HeadDelta):
    """The head of one stage of a PoE base, as a delta of the shared head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def delta(self) -> torch.Tensor:
        weight: torch.Tensor = self.head.weight  # type: ignore[assignment]
        return weight.float()


def head_below(base: PreTrainedModel, depth: int) -> nn.Module:
    """Return the module, with `weight` (V, D), that reads a base's normalized states after `depth` layers.

    It is the base's head. If each stage of a PoE base has a head, it is the sum of the shared head and the stage's.
    """
    head = family_of(base).head_of(base)
    stage_heads = getattr(base, "lm_head_stages", None)
    if not getattr(base.config, "stage_heads", False) or stage_heads is None:
        return head
    return FoldedHead(head, [_StageHead(stage_heads[base.config.boundaries.index(depth)])])


def exit_at(base: PreTrainedModel, depth: int) -> PreTrainedModel:
    """Return the first `depth` layers of a base as a model of its class. It shares every tensor.

    Raises `FamilyError` if the base has no exit there.
    """
    if reason := no_exit_reason(base, depth):
        raise FamilyError(f"The exit is after {depth!r} layers, but {reason}.")
    model = build_shell(base, [], head_below(base, depth), below=depth)
    sync_attention(base, model)
    return model
