"""The augmentations in order, and the ratios that a recipe gives them."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.forms.calls import CALL_FORMS
from poe.calls.forms.tools import TOOL_FORMS
from poe.data.augment.case import change_case
from poe.data.augment.contrast import make_pair
from poe.data.augment.distractors import ToolPool, add_distractors
from poe.data.augment.formats import with_random_form
from poe.data.augment.irrelevance import make_irrelevant
from poe.data.augment.masking import mask, rename
from poe.data.augment.paraphrase import paraphrase
from poe.data.augment.rows import row_digest, row_rng
from poe.errors import RecipeError, suggest


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Shares of the rows, each from 0 (none) to 1 (all); of those rows to which the augmentation can be done at all.

    All zero, the default, changes nothing. A larger share takes in every row that a smaller one does; no share moves
    the rows of another, save that `contrast` takes the rows next to those of `irrelevance`: they exclude each other and
    add up to at most 1. A row of `contrast` becomes two.
    """

    mask: float = 0.0
    irrelevance: float = 0.0
    contrast: float = 0.0
    distractors: float = 0.0
    max_distractors: int = 4  # a row gets one to so many
    shuffle: float = 0.0
    case: float = 0.0
    paraphrase: float = 0.0
    formats: float = 0.0
    tool_formats: tuple[str, ...] = ()  # none: all of them
    call_formats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float:
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if not number or not math.isfinite(value) or not 0 <= value <= 1:
                    raise RecipeError(f"augment.{field.name} should be a share from 0 to 1, got {value!r}.")
            elif field.type is int:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise RecipeError(f"augment.{field.name} should be a whole number of 1 or more, got {value!r}.")
            elif not isinstance(value, tuple) or not all(isinstance(name, str) for name in value):
                raise RecipeError(f"augment.{field.name} should be a list of names, got {value!r}.")
        for field_name, names, known in (
            ("tool_formats", self.tool_formats, TOOL_FORMS),
            ("call_formats", self.call_formats, CALL_FORMS),
        ):
            for name in names:
                if name not in known:
                    raise RecipeError(f"augment.{field_name} has an unknown form {name!r}.{suggest(name, known)}")
        if self.irrelevance + self.contrast > 1:
            raise RecipeError(
                "augment.irrelevance and augment.contrast are shares of the same rows and add up to at most 1, got "
                f"{self.irrelevance} + {self.contrast}."
            )

    @property
    def draws_tools(self) -> bool:
        """Whether tools of other rows are needed."""
        return bool(self.irrelevance or self.contrast or self.distractors)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any] | None) -> "Augmentation":
        """The `augment:` mapping of a recipe; unknown names and values out of range are a `RecipeError`."""
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise RecipeError(f"augment should be a mapping of names to shares, got {options!r}.")
        known = {field.name for field in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                raise RecipeError(f"There is no augmentation {name!r}.{suggest(str(name), known)}")
        fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in options.items()}
        return cls(**fields)


def augment(
    conversation: Conversation, options: Augmentation, *, epoch: int, seed: int, pool: ToolPool
) -> list[Conversation]:
    """What a row is in this epoch: one conversation, or a contrastive pair. Seed, epoch and row alone decide.

    In this order: paraphrase and case of the user's texts, while the calls still tell what is copied from them;
    irrelevance or contrast; distractors and shuffle of the tools that are left; mask, which renames what is there by
    then; formats. The two rows of a pair share all of it, new names as well.
    """
    digest = row_digest(conversation)

    def chosen(step: str) -> Random | None:
        """The step's randomness if the row is of its share."""
        share = getattr(options, step)
        rng = row_rng(digest, seed=seed, epoch=epoch, step=step) if share else None
        return rng if rng and rng.random() < share else None

    if rng := chosen("paraphrase"):
        conversation = paraphrase(conversation, rng)
    if rng := chosen("case"):
        conversation = change_case(conversation, rng)
    rows = _taken_away(conversation, options, row_rng(digest, seed=seed, epoch=epoch, step="taken away"), pool)
    if rng := chosen("distractors"):
        rows = add_distractors(rows, rng, pool, options.max_distractors, conversation)
    if chosen("shuffle"):
        rows = [_shuffled(row, row_rng(digest, seed=seed, epoch=epoch, step="order")) for row in rows]
    if rng := chosen("mask"):
        _, mapping = mask(rows[0], rng)  # it has every tool of the second row of a pair
        rows = [rename(row, mapping) for row in rows]
    if chosen("formats"):
        names = options.tool_formats, options.call_formats
        rows = [with_random_form(row, row_rng(digest, seed=seed, epoch=epoch, step="form"), *names) for row in rows]
    return rows


def _taken_away(conversation: Conversation, options: Augmentation, rng: Random, pool: ToolPool) -> list[Conversation]:
    """The row; the row with its tools taken away; or both."""
    at = rng.random()
    if at < options.irrelevance:
        row = make_irrelevant(conversation, rng, pool)
        return [conversation] if row is None else [row]
    if at < options.irrelevance + options.contrast:
        return list(make_pair(conversation, rng, pool) or [conversation])
    return [conversation]


def _shuffled(conversation: Conversation, rng: Random) -> Conversation:
    tools = rng.sample(conversation.tools, len(conversation.tools))
    return dataclasses.replace(conversation, tools=tools)
