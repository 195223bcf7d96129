"""The `augment:` options of a recipe. `poe.data.augment` applies them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from poe.calls.forms.call_forms import CALL_FORMS
from poe.calls.forms.tool_forms import TOOL_FORMS
from poe.errors import RecipeError, suggest
from poe.stages.fields import PositiveInt, Ratio, check_fields


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How often each augmentation changes a row. By default none does.

    A share counts only the rows that the augmentation can change: a row without a call cannot become irrelevant. A
    larger share includes every row that a smaller one includes. The shares are drawn independently, except those of
    `irrelevance` and `contrast`: no row gets both, so they add up to at most 1.
    """

    mask: Ratio = 0.0
    """Share of rows that get random names for tools and parameters."""
    irrelevance: Ratio = 0.0
    """Share of rows that lose the tools they need and get an abstention as the answer."""
    contrast: Ratio = 0.0
    """Share of rows that become two, the row itself and the row without the tools it needs."""
    distractors: Ratio = 0.0
    """Share of rows that get tools of other rows added."""
    max_distractors: PositiveInt = 4
    """Largest number of tools that `distractors` adds to a row."""
    shuffle: Ratio = 0.0
    """Share of rows that get their tools in random order."""
    case: Ratio = 0.0
    """Share of rows that get the user's text in another letter case."""
    paraphrase: Ratio = 0.0
    """Share of rows that get the user's text in other words."""
    formats: Ratio = 0.0
    """Share of rows that get a prompt in the format of another model."""
    tool_formats: tuple[str, ...] = ()
    """Names of the tool formats that `formats` draws from; empty: all of them."""
    call_formats: tuple[str, ...] = ()
    """Names of the call formats that `formats` draws from; empty: all of them."""

    def __post_init__(self) -> None:
        check_fields(self, "augment.")
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
        """Whether a row can get tools of other rows."""
        return bool(self.irrelevance or self.contrast or self.distractors)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any] | None) -> "Augmentation":
        """Return the options of a mapping such as `{"mask": 0.3}`; None gives the defaults. Raises `RecipeError`."""
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

    def as_dict(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, as JSON values: the inverse of `from_dict`."""
        values = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        return {n: list(v) if isinstance(v, tuple) else v for n, (v, default) in values.items() if v != default}
