"""Every error a user can meet. Catch `PoEError` to catch them all; none of them leaves half a file behind."""

import difflib
from collections.abc import Iterable

from poe.modeling.failures import (
    DeltaError,
    FamilyError,
    FingerprintError,
    LineageError,
    PoEError,
    SourceError,
    StageError,
)

__all__ = [
    "DataError",
    "DecodingError",
    "DeltaError",
    "FamilyError",
    "FingerprintError",
    "LineageError",
    "MissingExtraError",
    "OutputError",
    "PoEError",
    "RecipeError",
    "RowError",
    "SourceError",
    "StageError",
    "TemplateError",
    "TrainingError",
    "suggest",
]


class RecipeError(PoEError, ValueError):
    """A recipe is unknown, or one of its fields is."""


class DataError(PoEError, ValueError):
    """Rows cannot be read, none are left, or a data SPEC is malformed."""


class RowError(DataError):
    """One row has no faithful `Conversation`, or no text in its form. `reason` is what reports count."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TemplateError(PoEError, ValueError):
    """The tokenizer's chat template is missing or cannot show which tokens are the assistant's."""


class OutputError(PoEError, OSError):
    """The output folder is not usable: not empty, not writable, or the disk is full."""


class TrainingError(PoEError, RuntimeError):
    """Training cannot go on: not-a-number losses, a checkpoint of another recipe, nothing to resume."""


class DecodingError(PoEError, ValueError):
    """A way of decoding cannot be used here: no such exit, or an option that it does not know, or it would not pay."""


class MissingExtraError(PoEError, ImportError):
    """An optional dependency is not installed; the message holds the line that installs it."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'? Known: a, b, x.` for error messages about unknown names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(names) or 'none'}."
