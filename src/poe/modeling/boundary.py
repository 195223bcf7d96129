"""The boundary: the hidden states below a stage as a value, and a model that starts from them.

Both halves are models of the base's class, so the family's own code computes masks, rotary positions, embeddings and
the final norm. The lower half ends where the stage begins. The upper half is the grown model with the layers below the
stage skipped; the last of them returns given hidden states. No module of the base is changed.
"""

from typing import Any

import torch

from .families import family_of
from .growth import build_shell, sync_attention
from .placement import device_of
from .span_attention import attend_by_span, find_layers_config
from .stage import Stage
from .standins import FixedOutputLayer, RecordedLayer, SkippedLayer, boundary_layers


class Boundary:
    """A grown model cut below `stage`: `above(below(x), x)` equals the output of the model's backbone bit for bit.

    Both halves share every tensor with the base and its stages. Dropout of the base is off. `layers` are the indices of
    the layers that output the boundary's states, `states` is their number, `width` their size. Token ids must be
    on `device`.
    """

    def __init__(self, base: Any, stage: Stage) -> None:
        family = family_of(base)
        head, stack, foot = family.head_of(base), stage.stack, stage.foot
        lower = build_shell(base, stack[: stage.below - foot], head, below=foot)
        upper = build_shell(base, stack, head, below=foot)
        for model in (lower, upper):
            sync_attention(base, model)
        self._lower, self._upper = family.backbone_of(lower), family.backbone_of(upper)
        self._stage_layer = stage.layers[0]
        lower_layers, upper_layers = family.layers_of(lower), family.layers_of(upper)
        self.layers = boundary_layers(base.config, len(lower_layers))
        self._recorded = {index: RecordedLayer(lower_layers[index]) for index in self.layers}
        self._inputs = {index: FixedOutputLayer(lower_layers[index]) for index in self.layers}
        for index in range(len(lower_layers)):
            upper_layers[index] = self._inputs.get(index) or SkippedLayer(lower_layers[index])
            lower_layers[index] = self._recorded.get(index) or lower_layers[index]
        if family.recurrent:
            for name, child in list(self._upper.named_children()):
                if type(child) is type(family.backbone_of(base).get_submodule(family.layers.partition(".")[0])):
                    setattr(self._upper, name, SkippedLayer(child))
        self.states = len(self.layers)
        self.width = int(base.config.hidden_size)
        self.device = device_of(base.get_input_embeddings())
        self._layers_config = find_layers_config(self._upper)

    def compile(self, *, below: bool = True, **options: Any) -> None:
        """Compile the layers above the boundary with torch.compile, with `below` also those under it; at first use."""
        self._layers_config = None  # what is compiled keeps its one call of attention with a mask
        for half in (self._lower, self._upper) if below else (self._upper,):
            half.compile(**options)

    @torch.no_grad()
    def below(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Map token ids and positions (B, T) to the states at the boundary (B, K, T, D), before any norm.

        K is `states`: 1, or 2 if a lower layer's output is also used above the stage. The last is the stage's input.
        There is no autograd graph.
        """
        self._lower.eval()  # each time: `train` of the grown model reaches the layers that both share
        with attend_by_span(self._layers_config, self.device):
            self._lower(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return torch.stack([layer.take() for layer in self._recorded.values()], dim=1)

    def above(self, states: torch.Tensor, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Map states (B, K, T, D), token ids and positions (B, T) to normalized hidden states (B, T, D)."""
        self._upper.train(self._stage_layer.training)
        for layer, state in zip(self._inputs.values(), states.unbind(1), strict=True):
            layer.state = state
        try:
            with attend_by_span(self._layers_config, self.device):
                output: torch.Tensor = self._upper(
                    input_ids=input_ids, position_ids=position_ids, use_cache=False
                ).last_hidden_state
        finally:
            for layer in self._inputs.values():
                layer.state = None
        return output
