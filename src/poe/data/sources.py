"""Raw rows: from files, folders, globs and the Hub, each with an id that says where it stood.

Formats: JSON (a list, or an object with the list under `data` or `rows`; a `.json` file that holds lines is read as
lines), JSON Lines, parquet, and each of them gzipped. UTF-8, with or without a byte order mark. A line or list element
that cannot be parsed is dropped and counted, and the rows around it are kept; a file that breaks off gives the rows
before the break and one drop, "truncated file".
"""

import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from poe.data.drops import DropReport
from poe.errors import DataError, MissingExtraError, SourceError

Row = tuple[str, Any]
"""An id for reports (`rows.jsonl:12`, counted from 1) and the raw value."""

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
KINDS = "json, jsonl, ndjson or parquet, each also as .gz"
TRAIN_EXTRA = 'pip install "poe-cascade[train]"'
KEPT_TEXT = 20_000
"""How many characters of an unreadable text go to the drop report."""

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|"|[\[\]{},]', re.DOTALL)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse_json(text: str, *, strict: bool = True) -> Any:
    """`json.loads` without NaN and Infinity. Raises ValueError for whatever cannot be parsed, endless nesting too."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, strict=strict)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def expand(path: str) -> list[Path]:
    """The files that a path names: itself, every data file below a folder, or what a glob finds. Sorted."""
    plain = Path(path).expanduser()
    if plain.is_file():
        return [plain]
    if plain.is_dir():
        found = [f for f in plain.rglob("*") if f.is_file() and _is_data(f) and not _is_hidden(f.relative_to(plain))]
        if not found:
            raise DataError(f"The folder {path!r} holds no data file ({KINDS}).")
        return sorted(found)
    if glob.has_magic(str(plain)):
        files = sorted(Path(f) for f in glob.glob(str(plain), recursive=True) if os.path.isfile(f))
        if not files:
            raise DataError(f"No file matches {path!r} (seen from {Path.cwd()}).")
        return files
    raise DataError(f"There is no file or folder {path!r} (seen from {Path.cwd()}).")


def _kind(path: Path) -> str:
    suffixes = path.suffixes[:-1] if path.suffix.lower() == ".gz" else path.suffixes
    return suffixes[-1].lower() if suffixes else ""


def _is_data(path: Path) -> bool:
    return _kind(path) in SUFFIXES


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def file_rows(path: str, source: str, report: DropReport) -> Iterator[Row]:
    """Every row of every file that `path` names. What cannot be parsed is read, dropped and counted under `source`."""
    for file in expand(path):
        if not _is_data(file):
            raise DataError(f"{str(file)!r} is of no kind that can be read; expected {KINDS}.")
        try:
            if _kind(file) == ".parquet":
                yield from _parquet_rows(file)
            else:
                yield from _text_rows(file, source, report)
        except OSError as error:
            if isinstance(error, SourceError | DataError):
                raise
            raise DataError(f"{str(file)!r} cannot be read: {error}.") from error


def _lost(source: str, report: DropReport, reason: str, text: str, row_id: str) -> None:
    report.read[source] += 1
    report.drop(source, reason, text[:KEPT_TEXT], row_id)


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")  # type: ignore[return-value]


class _Blocks:
    """The blocks of a file; `broken` turns true where compressed data breaks off."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.broken = False

    def __iter__(self) -> Iterator[bytes]:
        with _open(self._file) as stream:
            first = True
            while True:
                try:  # read1: what came before a break is returned before the break raises
                    block = stream.read1(1 << 16)  # type: ignore[attr-defined]
                except (EOFError, zlib.error) as error:
                    self.broken = True
                    if first:
                        raise DataError(f"{str(self._file)!r} is not a gzip file that can be read: {error}.") from None
                    return
                except gzip.BadGzipFile as error:
                    if first:
                        raise DataError(f"{str(self._file)!r} is not a gzip file: {error}.") from None
                    self.broken = True
                    return
                if not block:
                    return
                if first and block.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DataError(f"{str(self._file)!r} is UTF-16; save it as UTF-8.")
                yield block.removeprefix(b"\xef\xbb\xbf") if first else block
                first = False


def _text_rows(file: Path, source: str, report: DropReport) -> Iterator[Row]:
    blocks = _Blocks(file)
    if _kind(file) != ".json":
        yield from _lines(blocks, blocks, file, source, report)
        return
    data = b"".join(blocks)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if not blocks.broken or error.end < len(data):
            raise DataError(f"{str(file)!r} is not UTF-8: {error.reason} at byte {error.start}.") from None
        text = data[: error.start].decode("utf-8")
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        yield from _list(text, start, file, source, report)
        return
    if text[start : start + 1] == "{":
        try:
            whole = json.loads(text)
        except RecursionError:
            raise DataError(f"{str(file)!r} is nested too deeply.") from None
        except ValueError as error:
            if "\n" not in text.strip() and not str(error).startswith("Extra data"):
                raise DataError(f"{str(file)!r} is not JSON: {error}.") from None
            yield from _lines([data], blocks, file, source, report)
            return
        inner = [whole[key] for key in ("data", "rows") if isinstance(whole.get(key), list)]
        if len(inner) == 1:
            yield from ((f"{file.name}[{i}]", row) for i, row in enumerate(inner[0]))
            return
        raise DataError(
            f"{str(file)!r} is one JSON object with the keys {sorted(whole)[:8]}; expected a list of rows, an object "
            "with the list under 'data' or 'rows', or one row per line."
        )
    kind = "is empty" if start == len(text) else f"starts with {text[start : start + 20]!r}"
    raise DataError(f"{str(file)!r} {kind}; expected a JSON list of rows, or one JSON object per line.")


def _lines(data: Iterable[bytes], blocks: _Blocks, file: Path, source: str, report: DropReport) -> Iterator[Row]:
    """One row per line; only the line feed separates, so other line breaks may stand inside a text."""
    number, part = 0, b""

    def row(raw: bytes) -> Iterator[Row]:
        row_id = f"{file.name}:{number}"
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            _lost(source, report, "not UTF-8", raw.decode("utf-8", "replace"), row_id)
            return
        if not text.strip():
            return
        try:
            yield row_id, parse_json(text)
        except ValueError:
            _lost(source, report, "not JSON", text, row_id)

    for block in data:
        *whole, last = block.split(b"\n")
        if whole:
            whole[0], part = part + whole[0], b""
        for raw in whole:
            number += 1
            yield from row(raw)
        part += last
    number += 1
    if blocks.broken:
        _lost(source, report, "truncated file", part.decode("utf-8", "replace"), f"{file.name}:{number}")
    elif part:
        yield from row(part)


def _list(text: str, start: int, file: Path, source: str, report: DropReport) -> Iterator[Row]:
    """The elements of a JSON list. After one that cannot be parsed, reading goes on behind it."""
    try:
        rows = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        yield from _list_by_element(text, start + 1, file, source, report)
        return
    yield from ((f"{file.name}[{i}]", row) for i, row in enumerate(rows))


def _list_by_element(text: str, at: int, file: Path, source: str, report: DropReport) -> Iterator[Row]:
    index = 0
    while True:
        end, mark = _element_end(text, at)
        element, row_id = text[at:end].strip(), f"{file.name}[{index}]"
        if not mark:
            _lost(source, report, "truncated file", element, row_id)
            return
        if element:
            try:
                yield row_id, parse_json(element)
            except ValueError:
                _lost(source, report, "not JSON", element, row_id)
            index += 1
        if mark == "]":
            if text[end + 1 :].strip():
                _lost(source, report, "text after the end of the list", text[end + 1 :], row_id)
            return
        at = end + 1


def _element_end(text: str, at: int) -> tuple[int, str]:
    """Where the list element that starts at `at` ends, and the comma or bracket there ("" when the text breaks off)."""
    depth = 0
    for token in _TOKEN.finditer(text, at):
        mark = token[0]
        if mark in ("[", "{"):
            depth += 1
        elif depth == 0 and mark in (",", "]"):
            return token.start(), mark
        elif mark in ("]", "}"):
            depth = max(0, depth - 1)
    return len(text), ""


def _parquet_rows(file: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtraError(f"Reading parquet needs pyarrow: {TRAIN_EXTRA}") from None
    try:
        with _open(file) as stream:
            data = io.BytesIO(stream.read()) if file.suffix.lower() == ".gz" else stream
            index = 0
            for batch in parquet.ParquetFile(data).iter_batches(batch_size=512):
                for row in batch.to_pylist():
                    yield f"{file.name}[{index}]", row
                    index += 1
    except (pyarrow.ArrowException, EOFError, zlib.error) as error:
        raise DataError(f"{str(file)!r} is not a parquet file that can be read: {error}.") from error


def hub_rows(dataset_id: str, name: str, split: str = "train", config: str | None = None) -> Iterator[Row]:
    """Every row of a public data set, through `datasets` (its cache is used when the Hub cannot be reached)."""
    place = dataset_id if config is None else f"{dataset_id}/{config}"
    yield from ((f"{place}[{i}]", row) for i, row in enumerate(_hub_dataset(dataset_id, name, split, config)))


def hub_fingerprint(dataset_id: str, name: str, split: str = "train", config: str | None = None) -> str:
    """What `datasets` knows a public data set's rows by."""
    return str(getattr(_hub_dataset(dataset_id, name, split, config), "_fingerprint", ""))


def _hub_dataset(dataset_id: str, name: str, split: str, config: str | None) -> Any:
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise MissingExtraError(
            f"Fetching {dataset_id!r} needs the package datasets: {TRAIN_EXTRA}. Without it, give a file: {name}=path."
        ) from None

    def failed(why: str) -> SourceError:
        return SourceError(
            f"The data set {dataset_id!r} of the reader {name!r} could not be fetched: {why}. "
            f"A local file can be given instead: {name}=path/to/rows.jsonl."
        )

    # `datasets` repeats an unreachable Hub for half a minute; one plain request tells at once.
    offline = False
    try:
        huggingface_hub.HfApi().dataset_info(dataset_id, timeout=10)
    except huggingface_hub.errors.GatedRepoError:
        raise failed(
            f"it is gated; accept its terms at https://huggingface.co/datasets/{dataset_id} and run `hf auth login`"
        ) from None
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise failed("the Hub knows no such data set, or not for this account") from None
    except Exception:  # of whatever kind: a copy in the cache may still serve, and if not the message below says so
        offline = True
    try:
        return _load(datasets, huggingface_hub, dataset_id, config, split, offline)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise failed("the Hub cannot be reached and no copy is cached" if offline else first_line) from error


def _load(datasets: Any, hub: Any, dataset_id: str, config: str | None, split: str, offline: bool) -> Any:
    """`load_dataset`, from the cache alone when offline."""
    before = datasets.config.HF_HUB_OFFLINE, hub.constants.HF_HUB_OFFLINE
    if offline:
        datasets.config.HF_HUB_OFFLINE = hub.constants.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(dataset_id, config, split=split)
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.constants.HF_HUB_OFFLINE = before
