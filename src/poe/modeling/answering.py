"""Stages that are active on the answer: the base reads the prompt, the stage speaks (Activated LoRA, arXiv 2504.12397).

Every token before the answer goes through the layers below the stage alone, so their keys and values do not depend on
the stage: several stages answer over one prefilled cache. The stage acts from the last token of the prompt on, which
is the one that predicts the answer's first token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from .failures import FamilyError
from .fork import Activity


def limit_to_answer(model: PreTrainedModel, activities: Sequence[Activity]) -> None:
    """Make the stages of `activities`, on which `model` stands, act on the answer alone.

    In `generate` the answer begins at the last token of `input_ids`, with or without a prefilled cache. In a plain
    forward pass it is where the labels are; without labels it is the last token of each row.
    """
    positions = _Positions(activities)
    model.register_forward_pre_hook(positions.before_forward, with_kwargs=True)
    model.register_forward_hook(positions.after_forward, always_call=True)
    generate: Any = model.generate

    @wraps(generate)
    def generate_answer(inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        given = next((x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None)
        with positions.beginning(0 if given is None else given.shape[1] - 1):
            return generate(inputs, *args, **kwargs)

    setattr(model, "generate", generate_answer)  # noqa: B010
    model.save_pretrained = raise_no_checkpoint  # type: ignore[method-assign]


@contextmanager
def acting_on_labels(activities: Sequence[Activity], labels: torch.Tensor) -> Iterator[None]:
    """Let stages act on the tokens that predict `labels` (B, T), not shifted, in a `with` block. -100 is no label."""
    for activity in activities:
        activity.tokens = _predict_labels(labels)
    try:
        yield
    finally:
        for activity in activities:
            activity.tokens = None


def _predict_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return which tokens (B, T) predict a label."""
    return torch.cat([labels[:, 1:], labels[:, -1:]], dim=1) != -100


def raise_no_checkpoint(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise `FamilyError`: an ordinary checkpoint has one weight for all tokens."""
    raise FamilyError(
        "The stage is active on the answer alone, and an ordinary checkpoint has one weight for all tokens: save the "
        "stage (Cascade.save_stage), or export it for all tokens on purpose (export_native(..., all_tokens=True))."
    )


class _Positions:
    """Where the answer begins, and what that means for the tokens of one forward pass."""

    def __init__(self, activities: Sequence[Activity]) -> None:
        self._activities = activities
        self._start: int | None = None

    @contextmanager
    def beginning(self, start: int) -> Iterator[None]:
        """Let the answer begin at a token's index in the whole sequence, cached tokens included."""
        before, self._start = self._start, start
        try:
            yield
        finally:
            self._start = before

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next(x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
        cache, labels = kwargs.get("past_key_values"), kwargs.get("labels")
        cached, length = 0 if cache is None else int(cache.get_seq_length()), given.shape[1]
        tokens: torch.Tensor | int
        if self._start is None and labels is not None:
            tokens = _predict_labels(labels)
        else:
            start = cached + length - 1 if self._start is None else self._start
            tokens = min(max(start - cached, 0), length)
        for activity in self._activities:
            activity.tokens = tokens

    def after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        for activity in self._activities:
            activity.tokens = None
