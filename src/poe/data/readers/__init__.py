"""The data readers by name. They convert the rows of a source to conversations.

To add a reader, write one module with `NAME`, `HUB_ID` (or None), `LICENSE` and `read(rows, report)`, which takes
`(id, row)` pairs and yields `Conversation`s, and add its name to `_FILE_READERS`. It also has `HUB_CONFIGS` if the Hub
has several configurations of the set, and `files(path)` and `read_path(path, report)` if rows need more files than the
path names (for example a pool of tools beside them). A generator has `read(path, report)` and reads no file. `READERS`
gives all readers the same interface.
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
    """A data reader. `read(path, report)` reads a file, folder or glob; None is the public data set.

    `generated`: the rows are generated, and `path` is an option of the generator, not a file. `files(path)`: all files
    that decide the rows of a path. `hub_configs`: the configurations of the public data set, which are read one after
    another (None: the only one).
    """

    name: str
    hub_id: str | None
    license: str
    read: Callable[[str | None, DropReport], Iterator[Conversation]]
    generated: bool = False
    hub_configs: tuple[str | None, ...] = (None,)
    files: Callable[[str], list[Path]] = expand


def _file_reader(module: ModuleType) -> Reader:
    name, hub_id, hub_configs = module.NAME, module.HUB_ID, getattr(module, "HUB_CONFIGS", (None,))

    def read_files(path: str, report: DropReport) -> Iterator[Conversation]:
        return module.read(file_rows(path, name, report), report)

    read_path = getattr(module, "read_path", read_files)

    def read(path: str | None, report: DropReport) -> Iterator[Conversation]:
        if path is not None:
            return read_path(path, report)
        if hub_id is None:
            raise DataError(f"The reader {name!r} has no public data set; give a file: {name}=rows.jsonl.")
        return module.read(chain.from_iterable(hub_rows(hub_id, name, config=c) for c in hub_configs), report)

    files = getattr(module, "files", expand)
    return Reader(name, hub_id, module.LICENSE, read, hub_configs=hub_configs, files=files)


def _read_demo(path: str | None, report: DropReport) -> Iterator[Conversation]:
    # The import builds a world of tools, so it happens only when the rows are read.
    return import_module("poe.data.readers.demo").read(path, report)


_FILE_READERS = (
    "alpaca apibank codealpaca droidcall glaive gpteacher_toolformer gsm8k hammer hermes magicoder mathinstruct mbpp "
    "messages nexusraven rotbench sealtools toolalpaca toolbench toolrl xlam"
).split()

READERS: dict[str, Reader] = {
    "demo": Reader("demo", None, "Apache-2.0", _read_demo, generated=True),
    **{name: _file_reader(import_module(f"poe.data.readers.{name}")) for name in _FILE_READERS},
}


def get_reader(name: str) -> Reader:
    """Return the reader of that name. Raises `DataError` with a suggestion for an unknown name."""
    if name not in READERS:
        raise DataError(f"Unknown data reader {name!r}.{suggest(name, READERS)}")
    return READERS[name]


def read_source(source: DataSource, report: DropReport) -> Iterator[Conversation]:
    """Yield the conversations of one source. Raises `DataError` if it has no usable row."""
    dropped_before = sum(report.dropped.get(source.name, {}).values())
    empty = True
    for conversation in get_reader(source.name).read(source.path, report):
        empty = False
        yield conversation
    if empty:
        reasons = report.dropped.get(source.name)
        problem = "it has no rows"
        if reasons and sum(reasons.values()) > dropped_before:
            problem = "every row was dropped: " + ", ".join(f"{r} ({n})" for r, n in reasons.most_common(3))
        raise DataError(f"No row of the data source '{source}' can be used; {problem}.")
