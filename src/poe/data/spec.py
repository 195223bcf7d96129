"""The `--data` SPEC: the sources of a run, with the epochs and the weight of each.

A SPEC is a comma-separated list of `name[=path][*epochs][:weight]`:

    glaive,xlam                          two public data sets, from the Hub
    glaive=rows.jsonl*4,xlam*3           a local file four times, a public data set three times
    messages=data/*.jsonl.gz:0.5         every file that matches a glob, at half weight
    demo                                 generated rows
    rows.jsonl                           a file, whose reader is found from its rows

`name` is a reader. `epochs` is the number of passes through the rows, a whole number; the default is the recipe's, or
1. `weight` is the source's share in the mixture, a positive number; the default is 1. Both are read only at the end of
the item, so a path may contain `:`, `*` and `=`. For a path that ends in `*8` or `:8`, write both in full:
`glaive=rows/*8*1:1`, `glaive=host:8*1:1`. A path with a comma is read as one path if it exists.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from poe.errors import DataError, suggest

MAX_EPOCHS = 10_000
_GRAMMAR = "name[=path][*epochs][:weight], as in glaive=rows.jsonl*4:0.5"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_PATH = re.compile(r"[./\\~]")
_WEIGHT = re.compile(r":([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)$")
_EPOCHS = re.compile(r"\*([0-9]+)$")


@dataclass(frozen=True, slots=True)
class DataSource:
    """One item of a SPEC. `path` is None for the reader's public data set or its generator."""

    name: str
    path: str | None = None
    epochs: int | None = None
    weight: float = 1.0

    def __str__(self) -> str:
        """Return the shortest item that parses to this source."""
        path = "" if self.path is None else f"={self.path}"
        ambiguous = bool(_EPOCHS.search(path) or _WEIGHT.search(path))
        epochs = f"*{self.epochs or 1}" if self.epochs is not None or ambiguous else ""
        weight = f":{self.weight!r}" if self.weight != 1 or ambiguous else ""
        return f"{self.name}{path}{epochs}{weight}"


def parse_spec(
    text: str, known: Iterable[str] | None = None, find_reader: Callable[[str], str] | None = None
) -> list[DataSource]:
    """Parse a SPEC. With `known` (reader names), an unknown name raises `DataError` with a suggestion.

    `find_reader` returns the reader's name for an item that is a path alone.
    """
    if not text.strip():
        raise DataError(f"The data SPEC is empty; expected a comma-separated list of {_GRAMMAR}.")
    names = None if known is None else list(known)
    return [_parse_item(item.strip(), text, names, find_reader) for item in _split_items(text)]


def _split_items(text: str) -> list[str]:
    """Split a SPEC at its commas, except at those of a path that exists."""
    items, parts = [], text.split(",")
    while parts:
        sizes = range(len(parts), 1, -1)
        size = next((n for n in sizes if "," in _existing_path(",".join(parts[:n]))), 1)
        items.append(",".join(parts[:size]))
        parts = parts[size:]
    return items


def _existing_path(item: str) -> str:
    """Return the path of an item if it exists, else nothing."""
    text = _EPOCHS.sub("", _WEIGHT.sub("", item.strip()))
    paths = (text, text.partition("=")[2])
    return next((path for path in paths if path and Path(path).expanduser().exists()), "")


def _parse_item(item: str, text: str, known: list[str] | None, find_reader: Callable[[str], str] | None) -> DataSource:
    def invalid(problem: str) -> DataError:
        return DataError(f"{problem} in the data SPEC {text!r}; expected {_GRAMMAR}.")

    if not item:
        raise invalid("Empty item (two commas in a row, or one at an end)")
    rest, weight, epochs = item, 1.0, None
    if match := _WEIGHT.search(rest):
        rest, weight = rest[: match.start()], float(match[1])
        if not (weight > 0 and math.isfinite(weight)):
            raise invalid(f"Weight {match[1]} of {item!r} is not a positive number")
    has_weight = rest != item
    if match := _EPOCHS.search(rest):
        rest = rest[: match.start()]
        if len(match[1]) > 6 or not 1 <= int(match[1]) <= MAX_EPOCHS:
            raise invalid(f"Epochs {match[1]} of {item!r} are not a whole number from 1 to {MAX_EPOCHS}")
        epochs = int(match[1])
        if not has_weight and _WEIGHT.search(rest):
            raise invalid(f"The weight of {item!r} comes before its epochs")
    name, equals, path = (part.strip() for part in rest.partition("="))
    if find_reader is not None and _PATH.search(rest) and not _NAME.fullmatch(name):
        return DataSource(find_reader(rest), rest, epochs, weight)
    if not _NAME.fullmatch(name):
        raise invalid(f"{name!r} (of {item!r}) cannot be the name of a reader")
    if known is not None and name not in known:
        hint = " A file is given as reader=path." if not equals and re.search(r"[./\\]", item) else ""
        raise DataError(f"Unknown data reader {name!r} in {text!r}.{suggest(name, known)}{hint}")
    if equals and not path:
        raise invalid(f"{item!r} has no path after '='")
    return DataSource(name, path or None, epochs, weight)
