"""What stands where a decoder layer stood when only some of a model's layers run: it passes, gives or keeps a state."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig


class SkippedLayer(nn.Module):
    """Stands where a layer stood, looks like it, and does nothing."""

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
    """Stands where a layer stood and hands out its output, in the dtype and on the device of what comes in."""

    state: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self.state is not None
        return self.state.to(hidden_states)


class RecordedLayer(SkippedLayer):
    """A layer whose newest output is kept until it is taken: in a recurrent base that of the last cycle."""

    state: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.state = self._layer[0](hidden_states, *args, **kwargs)
        return self.state

    def take(self) -> torch.Tensor:
        """Return the output and forget it."""
        state, self.state = self.state, None
        assert state is not None
        return state


def boundary_layers(config: PreTrainedConfig, depth: int) -> list[int]:
    """Return which layers' outputs the layers above `depth` read: the last one's, in rising order with any other.

    A PoE base may subtract one layer's output before its final norm, which is above every stage.
    """
    subtracted = getattr(config, "backout_layer", None)
    lower = {subtracted} if subtracted is not None and subtracted < depth - 1 else set()
    return sorted(lower | {depth - 1})
