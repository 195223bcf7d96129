"""All errors of this package. `PoEError` is their base class. None of them leaves a partly written file."""

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator

from poe.modeling.failures import (
    DeltaError,
    FamilyError,
    FingerprintError,
    LineageError,
    PoEError,
    SourceError,
    StageError,
    escape_controls,
    printable,
)

__all__ = [
    "DataError",
    "DecodingError",
    "DeltaError",
    "EvaluationError",
    "FamilyError",
    "FingerprintError",
    "LineageError",
    "MemoryLimitError",
    "MissingExtraError",
    "OutputError",
    "PoEError",
    "RecipeError",
    "RowError",
    "ServingError",
    "SourceError",
    "StageError",
    "TemplateError",
    "TokenizerError",
    "ToolError",
    "TrainingError",
    "escape_controls",
    "escape_markdown",
    "printable",
    "suggest",
]


class RecipeError(PoEError, ValueError):
    """A recipe or one of its fields is unknown or invalid."""


class DataError(PoEError, ValueError):
    """Rows cannot be read, none are left, or a data SPEC is malformed."""


class ServingError(PoEError):
    """A server cannot start."""


class RowError(DataError):
    """One row cannot become a `Conversation` or text without loss. Reports count rows by `reason`.

    `place` names the part of the row that is wrong, for a person: `tools[2] 'get_weather'`.
    """

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__(f"{place}: {reason}" if place else reason)
        self.reason = reason
        self.place = place


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


class EvaluationError(PoEError, ValueError):
    """An evaluation cannot go on or be compared: answers of another model or setting, or an edited file."""


class ToolError(PoEError, RuntimeError):
    """A tool failed twice, a plan cannot be run, or an MCP server cannot be started or has ended."""


class MemoryLimitError(PoEError, MemoryError):
    """The main memory or the memory of a device is exhausted. The message names the option to lower."""


class MissingExtraError(PoEError, ImportError):
    """An optional dependency is not installed. The message has the command that installs it."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'? Known: a, b, x.` for error messages about unknown names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(names) or 'none'}."


_ALLOCATORS = ("DefaultCPUAllocator", "out of memory", "not enough memory", "bad_alloc", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed: in Python, numpy, torch (host or device), or the operating system."""
    if isinstance(error, PoEError):
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATORS)


def memory_error(task: str, error: BaseException, advice: str) -> MemoryLimitError:
    """Return the error for a task that does not fit into memory, with the numbers and `advice`."""
    text = str(error).strip().partition("\n")[0]
    wanted = re.search(r"alloc\w* ([\d.]+ ?(?:[KMGTP]i?B|bytes))", text)
    if "GPU" in text or "CUDA" in text:
        numbers = text[:300].rstrip(". ")
    else:
        page, names = os.sysconf("SC_PAGE_SIZE"), set(os.sysconf_names)
        total, free = (
            f"{os.sysconf(name) * page / 2**30:,.1f} GiB" if name in names else "unknown"
            for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")
        )
        size = f"{_format_size(wanted[1])} more were needed, and " if wanted else ""
        numbers = f"{size}{free} of {total} of main memory are free"
    return MemoryLimitError(f"{task} does not fit into memory: {numbers}. {advice}")


def _format_size(text: str) -> str:
    number = text.removesuffix("bytes").strip()
    return f"{int(number) / 2**30:,.2f} GiB" if number.isdigit() else text


@contextlib.contextmanager
def explain_memory(task: str, advice: str) -> Iterator[None]:
    """Raise `memory_error` for an allocation that fails in the block."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise memory_error(task, error, advice) from error


def escape_markdown(text: str) -> str:
    """Return text as one line of Markdown that shows it: no markup, link, picture, HTML or table cell of its own."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", printable(text)).replace("&", "&amp;").replace("<", "&lt;")
