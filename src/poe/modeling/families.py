"""What a base must declare so that it can be grown: where its parts are, and how its config becomes a deeper one.

A flat family is a causal language model whose backbone is an embedding, a list of decoder layers that it runs one
after the other, a final norm and an output head. Appending layers of its own class to such a model gives a deeper
model of the same kind, so a declaration is all that a new family needs: one line in `FAMILIES`.
"""

import copy
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .failures import FamilyError


@dataclass(frozen=True)
class Family:
    """Where the parts of one `model_type` are, as attribute paths.

    `backbone`, `head` count from the model, `layers`, `norm` from the backbone, `outputs` from one decoder layer:
    these are the projections that write into the residual stream, zero in a new stage. `layer_type` is the entry of
    `config.layer_types` that a new layer gets, where the config has that list.
    """

    model_type: str
    backbone: str = "model"
    layers: str = "layers"
    norm: str = "norm"
    head: str = "lm_head"
    outputs: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    layer_type: str = "full_attention"

    def backbone_of(self, model: PreTrainedModel) -> nn.Module:
        """Return the module that holds the embedding, the layers and the final norm."""
        return model.get_submodule(self.backbone)

    def layers_of(self, model: PreTrainedModel) -> nn.ModuleList:
        """Return the model's list of decoder layers."""
        layers = self.backbone_of(model).get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def head_of(self, model: PreTrainedModel) -> nn.Module:
        """Return the module that turns hidden states (..., width) into logits (..., vocabulary)."""
        return model.get_submodule(self.head)


FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (Family("llama"), Family("poe"), Family("qwen2"), Family("qwen3"))
}


def family_of(config: PreTrainedConfig) -> Family:
    """Return the declaration for a config's `model_type`; raises `FamilyError` naming the known ones."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise FamilyError(
            f"A base of model type {config.model_type!r} cannot be grown: expected "
            f"{', '.join(sorted(FAMILIES))}. "
            "If its decoder layers run one after the other, declare it in poe/modeling/families.py."
        )
    return family


def grown_config(config: PreTrainedConfig, below: int, count: int) -> PreTrainedConfig:
    """Return a copy of a base's config for a model of `below` layers and `count` new ones on top, head untied.

    `below` may be smaller than the base's depth (the layers above it are skipped) or larger (other stages' layers
    lie in between, which are of the family's full-attention type, as the new ones are).
    """
    family = family_of(config)
    grown = copy.deepcopy(config)
    types = getattr(config, "layer_types", None)
    grown.num_hidden_layers = below + count
    if types is not None:
        padding = [family.layer_type] * max(0, below + count - len(types[:below]))
        grown.layer_types = list(types[:below]) + padding
    grown.tie_word_embeddings = False
    return grown
