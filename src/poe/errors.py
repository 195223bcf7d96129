"""All errors of this package. `PoEError` is their base class. None of them leaves a partly written file."""

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
    "TokenizerError",
    "TrainingError",
    "suggest",
]


class RecipeError(PoEError, ValueError):
    """A recipe or one of its fields is unknown or invalid."""


class DataError(PoEError, ValueError):
    """Rows cannot be read, none are left, or a data SPEC is malformed."""


class RowError(DataError):
    """One row cannot become a `Conversation` or text without loss. Reports count rows by `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TemplateError(PoEError, ValueError):
    """The tokenizer's chat template is missing, or does not show which tokens are the assistant's."""


class TokenizerError(PoEError, ValueError):
    """The tokenizer is missing, its files are broken, or it does not fit the base."""


class OutputError(PoEError, OSError):
    """The output folder is not empty or not writable, or the disk is full."""


class TrainingError(PoEError, RuntimeError):
    """Training cannot continue: NaN losses, a checkpoint of another recipe, or nothing to resume."""


class DecodingError(PoEError, ValueError):
    """A strategy or combination cannot be used: no such exit, an unsupported option, or no gain in speed."""


class MissingExtraError(PoEError, ImportError):
    """An optional dependency is not installed. The message has the command that installs it."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'? Known: a, b, x.` for error messages about unknown names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(names) or 'none'}."
