"""Recurrent bases run their layers in every cycle. A stage's layers run once, above the base's, in the last cycle.

The hierarchical reasoning model (arXiv 2506.21734; `hrm_text` in transformers) has two stacks of `num_layers_per_stack`
layers. A cycle runs the low stack `L_cycles` times and the high one once, and there are `H_cycles` cycles. Each run of
a layer has its own slot in the key-value cache, and the config's `num_hidden_layers` counts these slots. Here that
number is the depth of the base: a stage stands above that many layers, and its slots come after theirs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .failures import FamilyError


class GrownStack(nn.Module):
    """The high stack of a grown model: the base's layers in each cycle, new layers in the last one, then the norm.

    It replaces the base's stack in the grown model and shares its modules. The base's own stack does not change.
    """

    def __init__(self, stack: nn.Module, layers: Sequence[nn.Module], config: PreTrainedConfig) -> None:
        super().__init__()
        assert isinstance(stack.layers, nn.ModuleList)
        self.layers = nn.ModuleList([*stack.layers, *layers])
        self.final_norm = stack.get_submodule("final_norm")
        self.recurring = len(stack.layers)
        # The base's last cache slots belong to the last run of this stack.
        self.last_offset = config.num_hidden_layers - self.recurring

    def forward(self, hidden_states: torch.Tensor, cycle_offset: int = 0, **kwargs: Any) -> torch.Tensor:
        """Map hidden states (batch, tokens, width) to normalized ones; `cycle_offset` is the run's first cache slot."""
        for layer in self.layers[: self.recurring]:
            hidden_states = layer(hidden_states, cycle_offset=cycle_offset, **kwargs)
        if cycle_offset == self.last_offset:
            for layer in self.layers[self.recurring :]:
                hidden_states = layer(hidden_states, cycle_offset=0, **kwargs)  # the layer's index is its slot
        normalized: torch.Tensor = self.final_norm(hidden_states)
        return normalized


def raise_no_checkpoint(model_type: str, *args: Any, **kwargs: Any) -> NoReturn:
    """Raise `FamilyError`: no checkpoint of a recurrent family can hold a stage."""
    raise FamilyError(
        f"A base of model type {model_type!r} is recurrent, and a stage on it runs once, after the last cycle. An "
        "ordinary checkpoint of the family cannot hold that and would lose the stage's layers. Save the stage instead "
        "(Cascade.save_stage, push_to_hub); its folder opens with Cascade, and with AutoModelForCausalLM and "
        "trust_remote_code=True."
    )


def disable_save_pretrained(model: PreTrainedModel) -> None:
    """Make `save_pretrained` of a grown recurrent model raise, because its checkpoint would lose the stage."""
    model.save_pretrained = partial(raise_no_checkpoint, model.config.model_type)  # type: ignore[method-assign]
