"""The boundary as a value: what the layers below a stage compute, on its own, and a model that starts from it.

Both halves are the base's native class, so masks, rotary positions, layer types, the first hidden state, embeddings of
values and the final norm are the family's own affair: the lower half is the model that ends where the stage begins, the
upper half is the grown model with the layers below the stage passed over and the last of them handing out a hidden
state that is given. Neither changes a module of the base.
"""

from typing import Any

import torch
from torch import nn

from .families import family_of
from .growth import shell, sync_attention
from .placement import device_of
from .stage import Stage
from .standins import FixedOutputLayer, RecordedLayer, SkippedLayer, boundary_layers


class Boundary:
    """A grown model cut below `stage`: `above(below(x), x)` is what the model's backbone makes of x, to the last bit.

    Both halves share every tensor with the base and its stages. Dropout of the base, if it has any, is off. `layers`
    are the indices of the layers whose outputs are the boundary's `states`, `width` is their size, and token ids belong
    on `device`.
    """

    def __init__(self, base: Any, stage: Stage) -> None:
        family = family_of(base)
        chain = stage.chain
        parents = [layer for link in chain[:-1] for layer in link.layers]
        head, depth = family.head_of(base), chain[0].below
        lower = shell(base, parents, head, below=depth)
        upper = shell(base, [*parents, *stage.layers], head, below=depth)
        for model in (lower, upper):
            sync_attention(base, model)
        self._lower, self._upper = family.backbone_of(lower), family.backbone_of(upper)
        self._stage_layer = stage.layers[0]
        beneath, above = family.layers_of(lower), family.layers_of(upper)
        taps = boundary_layers(base.config, len(beneath))
        self._taken = {index: RecordedLayer(beneath[index]) for index in taps}
        self._given = {index: FixedOutputLayer(beneath[index]) for index in taps}
        for index in range(len(beneath)):
            above[index] = self._given.get(index) or SkippedLayer(beneath[index])
            beneath[index] = self._taken.get(index) or beneath[index]
        if family.recurrent:
            for name, child in list(self._upper.named_children()):
                if type(child) is type(family.backbone_of(base).get_submodule(family.layers.partition(".")[0])):
                    setattr(self._upper, name, SkippedLayer(child))
        self.states = len(taps)
        self.width = int(base.config.hidden_size)
        self.layers = taps
        self.device = device_of(base.get_input_embeddings())

    @torch.no_grad()
    def below(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Token ids and positions (B, T) -> the states at the boundary (B, K, T, D), before any norm, without a graph.

        K is `states`: 1, or 2 where a layer further down is read above the stage too. The last is the stage's input.
        """
        _set_mode(self._lower, False)
        self._lower(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return torch.stack([tapped.take() for tapped in self._taken.values()], dim=1)

    def above(self, states: torch.Tensor, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """States (B, K, T, D), token ids and positions (B, T) -> normalized hidden states (B, T, D), with a graph."""
        _set_mode(self._upper, self._stage_layer.training)
        for given, state in zip(self._given.values(), states.unbind(1), strict=True):
            given.state = state
        try:
            output: torch.Tensor = self._upper(
                input_ids=input_ids, position_ids=position_ids, use_cache=False
            ).last_hidden_state
        finally:
            for given in self._given.values():
                given.state = None
        return output


def _set_mode(backbone: nn.Module, training: bool) -> None:
    if backbone.training != training:
        backbone.train(training)
