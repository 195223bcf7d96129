"""Errors of loading a model from files.

They are defined here and re-exported by `poe.errors`, because the files of this folder are published with every delta
and import nothing of ours. Loading through `trust_remote_code` therefore raises the same errors as the package.
"""

import json
import unicodedata

LONGEST_MESSAGE = 2_000  # characters


class PoEError(Exception):
    """Base class of every error of this project. Messages contain what was expected, what came, and what to do.

    A message may quote a stranger's file, so it is one line of bounded length without control characters.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), LONGEST_MESSAGE)


def printable(text: str, longest: int | None = None) -> str:
    """Return text as one line that is safe to print: runs of white space become one space, the rest is escaped.

    Text of more than `longest` characters loses its middle.
    """
    if longest is not None and len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} ... ({len(text):,} characters) ... {text[-half:]}"
    return escape_controls(" ".join(text.split()))


def escape_controls(text: str) -> str:
    """Return text in which characters that a terminal obeys or does not show are escaped as in JSON (`\\u001b`).

    They are control characters except newline and tab, formats (text direction, zero width), surrogates, and line and
    paragraph separators.
    """
    if text.isprintable():
        return text
    return "".join(_escape(character) for character in text)


def _escape(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    return json.dumps(character)[1:-1] if character != "\x7f" else "\\u007f"


class FamilyError(PoEError, ValueError):
    """The base is not of a family to which stages can be added."""


class StageError(PoEError, ValueError):
    """A stage is unknown, exists already, or cannot be used in this way."""


class DeltaError(PoEError, ValueError):
    """A file of a stage or base is missing, truncated, changed, or does not fit."""


class FingerprintError(PoEError, ValueError):
    """The weights are not those that the fingerprint names."""


class LineageError(PoEError, ValueError):
    """The chain of a stage, its parents and its base is broken, cyclic or too long."""


class SourceError(PoEError, OSError):
    """A repository or folder cannot be reached: no network, no permission, or no such name."""
