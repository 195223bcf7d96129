"""The model "auto" of a server: the stage whose training prompts are most like the prompt of a request answers it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from poe.cascade import Cascade
from poe.decoding.prompt_center import PromptCenter, find_centers, read_directions
from poe.serving.models import ServedModel
from poe.serving.openai_api import ApiError, ChatRequest
from poe.serving.replies import write_prompt

AUTO = "auto"


class Router:
    """Chooses among the base and its stages, as `Cascade.route` does, with the prompt that each of them would get."""

    def __init__(
        self, cascade: Cascade, models: Mapping[str, ServedModel], centers: Mapping[str, PromptCenter], max_context: int
    ) -> None:
        self._base, self._centers, self._max_context = cascade.base, centers, max_context
        self._stages = [model for model in models.values() if model.stage is not None]
        (self._otherwise,) = (model for model in models.values() if model.stage is None)

    def choose(self, request: ChatRequest) -> ServedModel:
        """Return the model that answers a request; the base for a prompt that is unlike those of all stages.

        The base reads the prompt, once if all stages write it alike. A stage that cannot use the messages is left out.
        """
        read: dict[tuple[int, ...], Tensor] = {}
        best, best_score = self._otherwise, 0.0
        for model in self._stages:
            try:
                prompt = tuple(write_prompt(model, request)[0])
            except ApiError:
                continue
            if len(prompt) >= self._max_context:
                continue
            if prompt not in read:
                read[prompt] = read_directions(self._base, torch.tensor([prompt]))
            score = float(self._centers[str(model.stage)].score(read[prompt]))
            if score > best_score:
                best, best_score = model, score
        return best


def make_router(cascade: Cascade, models: Mapping[str, ServedModel], max_context: int) -> Router | None:
    """Return a server's router; None if a stage does not know its training prompts, or a model is called "auto"."""
    if AUTO in models:
        return None
    experts = [cascade.expert(model.stage) for model in models.values()]
    centers = find_centers(experts, cascade.base.config.hidden_size)
    return Router(cascade, models, centers, max_context) if centers else None
