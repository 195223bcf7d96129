"""The data readers, by name, and the way from a `--data` SPEC to conversations.

A reader of files is a module with `NAME`, `HUB_ID` (or None), `LICENSE` and `read(rows, report)`, which gets
`(id, row)` pairs and yields `Conversation`s. It has `HUB_CONFIGS` where the Hub holds the set in several
configurations, and `files(path)` and `read_path(path, report)` where rows need more than the files that a path names (a
pool of tools beside them). A generator has `read(path, report)` and needs no file. `READERS` holds both behind one
interface.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import ModuleType

from poe.calls.conversation import Conversation
from poe.data.drops import DropReport
from poe.data.sources import expand, file_rows, hub_rows
from poe.data.spec import DataSource
from poe.errors import DataError, suggest

__all__ = ["READERS", "Reader", "get_reader", "read_source"]


@dataclass(frozen=True, slots=True)
class Reader:
    """One way to get conversations. `read(path, report)`: a file, folder or glob, or None for the public data set.

    `generated`: the rows come from code, and `path` is no file but says which. `files`: every file that decides the
    rows of a path. `hub_configs`: the public data set's configurations, read one after another (None: its only one).
    """

    name: str
    hub_id: str | None
    license: str
    read: Callable[[str | None, DropReport], Iterator[Conversation]]
    generated: bool = False
    hub_configs: tuple[str | None, ...] = (None,)
    files: Callable[[str], list[Path]] = expand


def _of_rows(module: ModuleType) -> Reader:
    name, hub_id, hub_configs = module.NAME, module.HUB_ID, getattr(module, "HUB_CONFIGS", (None,))

    def rows_of_path(path: str, report: DropReport) -> Iterator[Conversation]:
        return module.read(file_rows(path, name, report), report)

    read_path = getattr(module, "read_path", rows_of_path)

    def read(path: str | None, report: DropReport) -> Iterator[Conversation]:
        if path is not None:
            return read_path(path, report)
        if hub_id is None:
            raise DataError(f"The reader {name!r} has no public data set of its own; give a file: {name}=rows.jsonl.")
        return module.read(chain.from_iterable(hub_rows(hub_id, name, config=c) for c in hub_configs), report)

    files = getattr(module, "files", expand)
    return Reader(name, hub_id, module.LICENSE, read, hub_configs=hub_configs, files=files)


def _generated(path: str | None, report: DropReport) -> Iterator[Conversation]:
    # It builds a world of tools when it is imported: only when asked for.
    return import_module("poe.data.readers.demo").read(path, report)


_OF_FILES = (
    "alpaca apibank codealpaca droidcall glaive gpteacher_toolformer gsm8k hammer hermes magicoder mathinstruct mbpp "
    "messages nexusraven rotbench sealtools toolalpaca toolbench toolrl xlam"
).split()

READERS: dict[str, Reader] = {
    "demo": Reader("demo", None, "Apache-2.0", _generated, generated=True),
    **{name: _of_rows(import_module(f"poe.data.readers.{name}")) for name in _OF_FILES},
}


def get_reader(name: str) -> Reader:
    """The reader of that name; an unknown one is a DataError with a suggestion."""
    if name not in READERS:
        raise DataError(f"Unknown data reader {name!r}.{suggest(name, READERS)}")
    return READERS[name]


def read_source(source: DataSource, report: DropReport) -> Iterator[Conversation]:
    """The conversations of one source, one at a time, each once. A source of which nothing is left is a DataError."""
    dropped = sum(report.dropped.get(source.name, {}).values())
    empty = True
    for conversation in get_reader(source.name).read(source.path, report):
        empty = False
        yield conversation
    if empty:
        reasons = report.dropped.get(source.name)
        why = "it holds no rows"
        if reasons and sum(reasons.values()) > dropped:
            why = "every row was dropped: " + ", ".join(f"{r} ({n})" for r, n in reasons.most_common(3))
        raise DataError(f"No row of the data source '{source}' can be used; {why}.")
