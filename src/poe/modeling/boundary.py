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
from .growth import keep_in_step, shell
from .placement import device_of
from .stage import Stage


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
            keep_in_step(base, model)
        self._lower, self._upper = family.backbone_of(lower), family.backbone_of(upper)
        self._stage_layer = stage.layers[0]
        beneath, above = family.layers_of(lower), family.layers_of(upper)
        last = len(beneath) - 1
        # A PoE base may subtract one layer's output before its final norm, which is above every stage.
        subtracted = getattr(base.config, "backout_layer", None)
        taps = sorted({last} | ({subtracted} if subtracted is not None and subtracted < last else set()))
        self._taken = {index: _Tapped(beneath[index]) for index in taps}
        self._given = {index: _Given(beneath[index]) for index in taps}
        for index in range(len(beneath)):
            above[index] = self._given.get(index) or _Passed(beneath[index])
            beneath[index] = self._taken.get(index) or beneath[index]
        if family.recurrent:
            for name, child in list(self._upper.named_children()):
                if type(child) is type(family.backbone_of(base).get_submodule(family.layers.partition(".")[0])):
                    setattr(self._upper, name, _Passed(child))
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
        """States (B, K, T, D), token ids and positions (B, T) -> normalised hidden states (B, T, D), with a graph."""
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


class _Passed(nn.Module):
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


class _Given(_Passed):
    """Stands where a layer stood and hands out its output, in the dtype and on the device of what comes in."""

    state: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self.state is not None
        return self.state.to(hidden_states)


class _Tapped(_Passed):
    """A layer whose newest output is kept until it is taken: in a recurrent base that of the last cycle."""

    state: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.state = self._layer[0](hidden_states, *args, **kwargs)
        return self.state

    def take(self) -> torch.Tensor:
        state, self.state = self.state, None
        assert state is not None
        return state


def _set_mode(backbone: nn.Module, training: bool) -> None:
    if backbone.training != training:
        backbone.train(training)
