"""PoE local learning: every stage of a base learns by its own prediction, and no gradient crosses a boundary.

The shared head (and the stage's own, where there is one) reads the residual stream after every stage; the cross-entropy
there is the only thing that the stage's layers learn from, because the stream is detached before the next stage. So
every boundary becomes a complete predictor, and only one stage's graph is in memory at a time (Cognica PoE; the idea of
greedy layer-wise training goes back to arXiv 1812.11446).
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from poe.data.packing import Batch
from poe.modeling.modeling_poe import PoEForCausalLM


class Prediction(NamedTuple):
    """What a loss is computed from: normalized states (B, T, D), and the head's weight (V, D) and bias (V,) or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


class Stagewise:
    """A PoE base as the predictions of its stages, each learned by itself if `local`, else the last one alone.

    Called like any source of hidden states it gives the last one's (B, T, D).
    """

    def __init__(self, model: PoEForCausalLM, local: bool) -> None:
        self._model, self._local = model, local
        self.boundaries = model.config.boundaries

    def predictions(self, batch: Batch, learning: bool = False) -> Iterator[Prediction]:
        """Yield those that are learned from, or all; the layers below the next one run when it is asked for."""
        count = len(self.boundaries)
        chosen = range(count) if self._local or not learning else range(count - 1, count)
        states = self._model.model.stages(
            batch.input_ids,
            position_ids=batch.position_ids,
            boundaries=[self.boundaries[stage] for stage in chosen],
            detach=self._local and learning,
        )
        for stage, hidden in zip(chosen, states, strict=True):
            yield Prediction(hidden, self._model.head_weight(stage))

    def __call__(self, batch: Batch) -> Tensor:
        *_, last = self.predictions(batch)
        return last.hidden
