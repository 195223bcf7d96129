"""New layers below those of a PoE base: an early stage for a base that was trained without one."""

import re
from typing import Any

import torch

from .modeling_poe import PoEConfig, PoEForCausalLM

LOWER_SHARE = 0.02  # of the new layers' output in what the old ones read at first; the rest is the embedding

_LAYER = re.compile(r"(?<=^model\.layers\.)\d+")
_HEAD = re.compile(r"(?<=^lm_head_stages\.)\d+")


@torch.no_grad()
def with_early_layers(base: PoEForCausalLM, **changes: Any) -> PoEForCausalLM:
    """Return the base over new layers, as many as `changes` to its config add, which at first compute the identity.

    The old layers read the embedding again: `layer_scalars` must be among the changes or on already. A residual stream
    that was taught to predict after few layers is forty times as large as the embedding and drowns it, so layers that
    only saw the stream would have to unlearn what they know (docs/log has the measurement). The prediction is that
    of `base`, up to rounding. Raises `ValueError` for a config that does not hold the base, or without scalars.
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
    kept = {key: value for key, value in old.to_dict().items() if key in PoEConfig.__annotations__}
    config = PoEConfig(**{**kept, "stage_layers": None, **shifted, **changes})
    if not config.layer_scalars:
        raise ValueError("layers below those of a base need layer_scalars: the old layers read the embedding again")
    new_stages = len(config.boundaries) - len(old.boundaries)

    model: Any = PoEForCausalLM(config)
    model.to(base.dtype)
    state = model.state_dict()
    for name, tensor in base.state_dict().items():
        moved = _LAYER.sub(lambda found: str(int(found[0]) + new_layers), name)
        place = state.get(_HEAD.sub(lambda found: str(int(found[0]) + new_stages), moved))
        if place is None or place.shape != tensor.shape:
            raise ValueError(f"the base has {name} {tuple(tensor.shape)}, for which the changed network has no place")
        place.copy_(tensor)
    joint = model.model.layers[new_layers]  # both of its inputs were the embedding
    whole = joint.resid_scale + joint.first_scale
    joint.resid_scale.copy_(LOWER_SHARE * whole)
    joint.first_scale.copy_((1 - LOWER_SHARE) * whole)
    return model
