"""Replacements of decoder layers for models of which only some layers run."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig


class SkippedLayer(nn.Module):
    """Replace a layer: return the input unchanged, with the attributes of the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple: not a child

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class FixedOutputLayer(SkippedLayer):
    """Replace a layer: return the given `state`, in the dtype and on the device of the input."""

    state: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self.state is not None
        return self.state.to(hidden_states)


class RecordedLayer(SkippedLayer):
    """Run a layer and keep its latest output in `state` (in a recurrent base, that of the last cycle)."""

    state: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.state = self._layer[0](hidden_states, *args, **kwargs)
        return self.state

    def train(self, mode: bool = True) -> "RecordedLayer":
        """Set the mode of the layer too, which is not a child of this module."""
        self._layer[0].train(mode)
        super().train(mode)
        return self

    def take(self) -> torch.Tensor:
        """Return the latest output and remove it."""
        state, self.state = self.state, None
        assert state is not None
        return state


def boundary_layers(config: PreTrainedConfig, depth: int) -> list[int]:
    """Return the indices of the layers that layers above `depth` read, in rising order; the last is `depth` - 1.

    A PoE base may use one more: it can subtract a lower layer's output before its final norm, above every stage.
    """
    subtracted = getattr(config, "backout_layer", None)
    lower = {subtracted} if subtracted is not None and subtracted < depth - 1 else set()
    return sorted(lower | {depth - 1})
