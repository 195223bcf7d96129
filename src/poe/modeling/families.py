"""Families of base models: the names of their parts, and the config of a deeper model.

A flat family is a causal language model with an embedding, a list of decoder layers that run one after the other, a
final norm and an output head. More layers of its own class make it a deeper model of the same kind, so a new family
needs one line in `FAMILIES`. A family that is not declared is recognized by its structure (recognition.py).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .failures import FamilyError


@dataclass(frozen=True)
class Family:
    """The names of the parts of one `model_type`.

    `backbone` and `head` are children of the model, `layers` and `norm` of the backbone. `outputs` are paths in a
    decoder layer to the modules that write into the residual stream; they write zero in a new stage. They are
    projections, or the norms after them: below a norm a zero projection would be the identity only until its first
    step, because the norm scales the smallest change to full size. New layers continue the pattern of the base's layers
    (layer_pattern.py); where they do not, they are like its last layer of type `layer_type`. `per_layer` has entries
    that every new layer takes, by the names of the config's lists with one entry per layer. A `recurrent` base runs its
    layers in every cycle, and new ones once above the last cycle (recurrent.py); `layers` is then the list of the stack
    that ends a cycle, and the config's `num_hidden_layers` counts runs of layers. A fork changes every linear layer
    of a decoder layer except those at the paths `unforked`; norms and embeddings it shares with the base.
    """

    model_type: str
    backbone: str = "model"
    layers: str = "layers"
    norm: str = "norm"
    head: str = "lm_head"
    outputs: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    layer_type: str = "full_attention"
    per_layer: Mapping[str, Any] = field(default_factory=dict)
    recurrent: bool = False
    unforked: tuple[str, ...] = ()

    def backbone_of(self, model: PreTrainedModel) -> nn.Module:
        """Return the module that holds the embedding, the layers and the final norm."""
        return model.get_submodule(self.backbone)

    def layers_of(self, model: PreTrainedModel) -> nn.ModuleList:
        """Return the model's list of decoder layers."""
        layers = self.backbone_of(model).get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def head_of(self, model: PreTrainedModel) -> nn.Module:
        """Return the module that maps hidden states (..., width) to logits (..., vocabulary)."""
        return model.get_submodule(self.head)

    def template_layer(self, config: PreTrainedConfig) -> int:
        """Return the index of the base's layer that new layers are like where no pattern is continued."""
        types = list(getattr(config, "layer_types", None) or ())[: config.num_hidden_layers]
        alike = [index for index, kind in enumerate(types) if kind == self.layer_type]
        return alike[-1] if alike else config.num_hidden_layers - 1


_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("gemma2", outputs=_POST_NORMS),
        Family("gemma3_text", outputs=_POST_NORMS),
        Family("granite"),
        Family("hrm_text", layers="H_module.layers", norm="H_module.final_norm", recurrent=True),
        Family("llama"),
        Family("mistral"),
        Family("nanochat", outputs=("self_attn.o_proj", "mlp.fc2")),
        Family("olmo2", outputs=_POST_NORMS),
        Family("phi3"),
        Family("poe", unforked=("self_attn.value_gate",), per_layer={"layer_types": "full_attention"}),
        Family("qwen2"),
        Family("qwen3"),
        Family("smollm3"),
    )
}


def family_of(base: PreTrainedModel) -> Family:
    """Return a base's family, declared or recognized. Raises `FamilyError` if there is none."""
    family = FAMILIES.get(base.config.model_type) or vars(base).get("_poe_family")
    if family is None:
        raise FamilyError(
            f"A base of model type {base.config.model_type!r} belongs to no known family: expected one of "
            f"{', '.join(sorted(FAMILIES))}, or a base that recognize_family() has accepted."
        )
    return family


def grown_config(
    config: PreTrainedConfig, family: Family, below: int, above: Sequence[int | Mapping[str, Any]]
) -> PreTrainedConfig:
    """Return a copy of a base's config for `below` layers and those of `above` on top, with an untied head.

    `above` describes each layer on top: the index of the base's layer that it is a fork of, or the entries of a new
    layer in the config's lists (layer_pattern.py). A smaller `below` than the base's depth skips layers; a larger one
    means layers of other stages in between, which are written as the first one on top.
    """
    grown = copy.deepcopy(config)
    depth, total = config.num_hidden_layers, below + len(above)
    for name, values in lists_per_layer(config, family).items():
        kept = list(values[: min(below, depth)])
        entries = [values[layer] if isinstance(layer, int) else layer[name] for layer in above]
        setattr(grown, name, type(values)([*kept, *entries[:1] * (below - len(kept)), *entries]))
    for name, value in window_layers(config, total).items():
        setattr(grown, name, value)
    if getattr(grown, "stage_layers", None):
        # A grown PoE base predicts only at its top. The head below the new layers is folded into theirs.
        grown.stage_layers, grown.stage_heads, grown.combiner = None, False, "last"
    backout = getattr(grown, "backout_layer", None) or 0
    if backout >= below and list(above)[backout - below : backout - below + 1] != [backout]:
        grown.backout_layer = None  # that layer is skipped, and no fork replaces it
    grown.num_hidden_layers = total
    grown.tie_word_embeddings = False
    return grown


def is_prefix_lm(config: PreTrainedConfig) -> bool:
    """Return whether a model attends in both directions within the prompt (tokens with `token_type_ids` of 1)."""
    return bool(getattr(config, "prefix_lm", False))


@dataclass(frozen=True)
class Logits:
    """Scale and cap a head's output x: `softcap * tanh(scale * x / softcap)`, or `scale * x` without a cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, outputs: torch.Tensor) -> torch.Tensor:
        """Map a head's output (..., vocabulary) to logits of the same shape."""
        outputs = outputs if self.scale == 1.0 else outputs * self.scale
        return outputs if self.softcap is None else self.softcap * torch.tanh(outputs / self.softcap)


def logits_of(config: PreTrainedConfig) -> Logits:
    """Return the scale and cap of a model's logits, from the names of transformers.

    `final_logit_softcapping` caps, `logit_scale` multiplies (Cohere), `logits_scaling` divides (Granite).
    """
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return Logits(scale / divisor, getattr(config, "final_logit_softcapping", None))


def window_layers(config: PreTrainedConfig, total: int) -> dict[str, int]:
    """Return the field `max_window_layers` for `total` layers, if no layer of the base has a window.

    With more layers the same number would give one to the new layers.
    """
    first = getattr(config, "max_window_layers", None) or 0
    return {"max_window_layers": max(first, total)} if first >= config.num_hidden_layers else {}


def lists_per_layer(config: PreTrainedConfig, family: Family) -> dict[str, Any]:
    """Return the config's lists that have one entry per layer, by name."""
    depth = config.num_hidden_layers
    named = {"layer_types", *family.per_layer}
    lists = {}
    for name, value in vars(config).items():
        if not isinstance(value, (list, tuple)) or hasattr(PreTrainedConfig, name) or name.endswith("token_id"):
            continue
        if len(value) == depth or (name in named and len(value) > depth):
            lists[name] = value
    return lists
