"""Add layers below those of a PoE base: an early stage for a base that was trained without one."""

import re
from typing import Any

import torch

from .modeling_poe import PoEConfig, PoEForCausalLM

LOWER_SHARE = 0.02  # the new layers' initial share of the old layers' input; the rest is the embedding

_LAYER = re.compile(r"(?<=^model\.layers\.)\d+")
_HEAD = re.compile(r"(?<=^lm_head_stages\.)\d+")


@torch.no_grad()
def with_early_layers(base: PoEForCausalLM, **changes: Any) -> PoEForCausalLM:
    """Return a copy of the base with new layers below its own, which at first compute the identity.

    `changes` to the config set the number of layers. The old layers read the embedding again, so `layer_scalars` must
    be on or among the changes. The reason: the residual stream of a base that predicts after few layers is forty times
    as large as the embedding, and layers that read only the stream would have to unlearn (docs/log has the
    numbers). The prediction equals the base's up to rounding. Raises `ValueError` for a config that does not contain
    the base, or without scalars.
    """
    old = base.config
    new_layers = changes["num_hidden_layers"] - old.num_hidden_layers
    if new_layers < 1:
        raise ValueError(f"the base has {old.num_hidden_layers} layers, more than {changes['num_hidden_layers']}")
    shifted: dict[str, Any] = {}
    if old.layer_types is not None:
        shifted["layer_types"] = ["full_attention"] * new_layers + old.layer_types
    if old.value_embedding_layers is not None:
        shifted["value_embedding_layers"] = [layer + new_layers for layer in old.value_embedding_layers]
    if old.backout_layer is not None:
        shifted["backout_layer"] = old.backout_layer + new_layers
    fields = {key: value for key, value in old.to_dict().items() if key in PoEConfig.__annotations__}
    config = PoEConfig(**{**fields, "stage_layers": None, **shifted, **changes})
    if not config.layer_scalars:
        raise ValueError("layers below those of a base need layer_scalars: the old layers read the embedding again")
    new_stages = len(config.boundaries) - len(old.boundaries)

    model: Any = PoEForCausalLM(config)
    model.to(base.dtype)
    state = model.state_dict()
    for name, tensor in base.state_dict().items():
        moved = _LAYER.sub(lambda match: str(int(match[0]) + new_layers), name)
        target = state.get(_HEAD.sub(lambda match: str(int(match[0]) + new_stages), moved))
        if target is None or target.shape != tensor.shape:
            raise ValueError(f"the base has {name} {tuple(tensor.shape)}, but the changed network has no such tensor")
        target.copy_(tensor)
    first_old = model.model.layers[new_layers]  # both of its inputs were the embedding
    total = first_old.resid_scale + first_old.first_scale
    first_old.resid_scale.copy_(LOWER_SHARE * total)
    first_old.first_scale.copy_((1 - LOWER_SHARE) * total)
    return model
