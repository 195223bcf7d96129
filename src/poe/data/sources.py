"""Read raw rows from files, folders, globs and the Hub, each with an id that gives its position.

Formats: JSON (a list, or an object with the list under `data` or `rows`; a `.json` file with one object per line is
read as JSON Lines), JSON Lines, and parquet, each also compressed as .gz or .zst. The encoding is UTF-8, with or
without a byte order mark. A line or list element that cannot be parsed is dropped and counted; the other rows are kept.
A truncated file gives its complete rows and one drop, "truncated file".
"""

import codecs
import glob
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import IO, Any, AnyStr, Generic

from poe.calls.json_text import DuplicateKeyError, parse_json
from poe.data.drops import DropReport
from poe.errors import DataError, MissingExtraError, SourceError

Row = tuple[str, Any]
"""An id for reports (`rows.jsonl:12`, counted from 1) and the raw value."""


class ColumnRow(dict[str, Any]):
    """A row of a columnar file or of `datasets`, where a member that other rows have and this one lacks is null."""


SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
COMPRESSED = (".gz", ".zst")
TRAIN_EXTRA = 'pip install "poe-cascade[train]"'
KEPT_TEXT = 20_000
"""The number of characters of an unreadable text that go to the drop report."""

MAX_ROW = 1 << 24
"""The maximum length of a row's text. Longer rows are dropped, because they could fill the memory."""

TOO_LONG = "row longer than 16 MiB"

MAX_WHOLE = 1 << 30
"""The maximum size of what is read at once: a file with one JSON object, or a compressed parquet file."""

_OUTSIDE = re.compile(r'["\[\]{},]')
_IN_STRING = re.compile(r'\\.|"', re.DOTALL)


def list_kinds(kinds: tuple[str, ...]) -> str:
    """Return file suffixes as words, for error messages."""
    names = [kind.removeprefix(".") for kind in kinds]
    return f"{', '.join(names[:-1])} or {names[-1]}, each also as .gz or .zst"


def expand(path: str, kinds: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Return the files of a path, sorted: a file, the files of these kinds in a folder, or the matches of a glob."""
    plain = Path(path).expanduser()
    if plain.is_file():
        return [plain]
    if plain.is_dir():
        files = [
            f for f in plain.rglob("*") if f.is_file() and kind_of(f) in kinds and not _is_hidden(f.relative_to(plain))
        ]
        if not files:
            raise DataError(f"The folder {path!r} has no data file ({list_kinds(kinds)}).")
        return sorted(files)
    if glob.has_magic(str(plain)):
        files = sorted(Path(f) for f in glob.glob(str(plain), recursive=True) if os.path.isfile(f))
        if not files:
            raise DataError(f"No file matches {path!r} (from the folder {Path.cwd()}).")
        return files
    raise DataError(f"No file or folder {path!r} exists (from the folder {Path.cwd()}).")


def kind_of(path: Path) -> str:
    """Return the suffix of a file's format in lower case, without the suffix of its compression."""
    suffixes = path.suffixes[:-1] if path.suffix.lower() in COMPRESSED else path.suffixes
    return suffixes[-1].lower() if suffixes else ""


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def file_rows(path: str, source: str, report: DropReport) -> Iterator[Row]:
    """Yield the rows of all files of a path. Rows that cannot be parsed are dropped and counted under `source`."""
    for file in expand(path):
        if kind_of(file) not in SUFFIXES:
            raise DataError(f"{str(file)!r} has an unknown format; expected {list_kinds(SUFFIXES)}.")
        try:
            if kind_of(file) == ".parquet":
                yield from _parquet_rows(file)
            else:
                yield from _text_rows(file, source, report)
        except OSError as error:
            if isinstance(error, SourceError | DataError):
                raise
            raise DataError(f"{str(file)!r} cannot be read: {error}.") from error


def _drop(source: str, report: DropReport, reason: str, text: str, row_id: str) -> None:
    report.read[source] += 1
    report.drop(source, reason, text[:KEPT_TEXT], row_id)


def _open(file: Path) -> IO[bytes]:
    if file.suffix.lower() == ".zst":
        pyarrow = _pyarrow(".zst")
        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd")
    return gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")  # type: ignore[return-value]


def _pyarrow(purpose: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise MissingExtraError(f"Reading {purpose} needs pyarrow: {TRAIN_EXTRA}") from None
    return pyarrow


def _check_whole(size: int, file: Path, advice: str) -> None:
    """Raise `DataError` for a file that must be in memory as a whole and is too large; a small archive can be."""
    if size > MAX_WHOLE:
        raise DataError(f"{str(file)!r} holds more than {MAX_WHOLE >> 30} GiB that must be read at once. {advice}")


class Blocks:
    """The decompressed blocks of a file. `truncated` becomes true if the compressed data is incomplete."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.truncated = False

    def __iter__(self) -> Iterator[bytes]:
        with _open(self._file) as stream:
            first = True
            while True:
                try:  # read1 returns the data before an error, and raises the error at the next call
                    block = stream.read1(1 << 16)  # type: ignore[attr-defined]
                except (EOFError, zlib.error) as error:
                    self.truncated = True
                    if first:
                        raise DataError(f"{str(self._file)!r} is not a gzip file that can be read: {error}.") from None
                    return
                except gzip.BadGzipFile as error:
                    if first:
                        raise DataError(f"{str(self._file)!r} is not a gzip file: {error}.") from None
                    self.truncated = True
                    return
                except OSError as error:
                    if error.errno is not None or self._file.suffix.lower() != ".zst":
                        raise  # an error of the disk, not of the file's content
                    if first:
                        raise DataError(f"{str(self._file)!r} is not a zstd file that can be read: {error}.") from None
                    self.truncated = True
                    return
                if not block:
                    return
                if first and block.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DataError(f"{str(self._file)!r} is UTF-16; save it as UTF-8.")
                yield block.removeprefix(b"\xef\xbb\xbf") if first else block
                first = False


def _text_rows(file: Path, source: str, report: DropReport) -> Iterator[Row]:
    blocks = Blocks(file)
    if kind_of(file) != ".json":
        yield from _lines(blocks, blocks, file, source, report)
        return
    chunks = _decoded(blocks, file)
    text = next((start for chunk in chunks if (start := chunk.lstrip())), "")
    if text.startswith("["):
        yield from _list(chain([text[1:]], chunks), file, source, report)
        return
    if not text.startswith("{"):
        kind = f"starts with {text[:20]!r}" if text else "is empty"
        raise DataError(f"{str(file)!r} {kind}; expected a JSON list of rows, or one JSON object per line.")
    parts, size = [text], len(text)
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        _check_whole(size, file, "Write one row per line, in a .jsonl file.")
    text = "".join(parts)
    try:
        whole = parse_json(text)
    except ValueError as error:
        if "\n" not in text.strip() and not str(error).startswith("Extra data"):
            raise DataError(f"{str(file)!r} is not JSON: {error}.") from None
        yield from _lines([text.encode()], blocks, file, source, report)
        return
    inner = [whole[key] for key in ("data", "rows") if isinstance(whole.get(key), list)]
    if len(inner) == 1:
        yield from ((f"{file.name}[{i}]", row) for i, row in enumerate(inner[0]))
        return
    raise DataError(
        f"{str(file)!r} is one JSON object with the keys {sorted(whole)[:8]}; expected a list of rows, an object "
        "with the list under 'data' or 'rows', or one row per line."
    )


def _decoded(blocks: Blocks, file: Path) -> Iterator[str]:
    """Yield the blocks as text. An incomplete character at the end of truncated data is left out."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    try:
        for block in blocks:
            yield decoder.decode(block)
            position += len(block)
        if not blocks.truncated:
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{str(file)!r} is not UTF-8: {error.reason} near byte {position + error.start}.") from None


def _lines(data: Iterable[bytes], blocks: Blocks, file: Path, source: str, report: DropReport) -> Iterator[Row]:
    """Yield one row per line. Only a line feed ends a line; other line breaks may occur inside a text."""

    def parse_line(line: _Bounded[bytes], number: int) -> Iterator[Row]:
        raw, row_id = b"".join(line.parts), f"{file.name}:{number}"
        if line.too_long:
            _drop(source, report, TOO_LONG, raw[:KEPT_TEXT].decode("utf-8", "replace"), row_id)
            return
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            _drop(source, report, "not UTF-8", raw.decode("utf-8", "replace"), row_id)
            return
        if not text.strip():
            return
        yield from _parse_row(text, row_id, source, report)

    number, line = 1, _Bounded[bytes]()
    for block in data:
        first, *others = block.split(b"\n")
        line.add(first)
        for raw in others:
            yield from parse_line(line, number)
            number, line = number + 1, _Bounded[bytes]()
            line.add(raw)
    if blocks.truncated:
        _drop(
            source, report, "truncated file", b"".join(line.parts).decode("utf-8", "replace"), f"{file.name}:{number}"
        )
    else:
        yield from parse_line(line, number)


def _parse_row(text: str, row_id: str, source: str, report: DropReport) -> Iterator[Row]:
    try:
        yield row_id, parse_json(text)
    except DuplicateKeyError:
        _drop(source, report, "one key twice", text, row_id)
    except ValueError:
        _drop(source, report, "not JSON", text, row_id)


def _list(chunks: Iterable[str], file: Path, source: str, report: DropReport) -> Iterator[Row]:
    """Yield the elements of a JSON list from after its opening bracket, without those that cannot be parsed."""
    index = 0
    for element, mark in _elements(chunks):
        text, row_id = "".join(element.parts).strip(), f"{file.name}[{index}]"
        if mark == "after" and text:
            _drop(source, report, "text after the end of the list", text, row_id)
        elif mark == "":
            _drop(source, report, "truncated file", text, row_id)
        elif element.too_long:
            _drop(source, report, TOO_LONG, text, row_id)
            index += 1
        elif text and mark != "after":
            yield from _parse_row(text, row_id, source, report)
            index += 1


def _elements(chunks: Iterable[str]) -> Iterator[tuple["_Bounded[str]", str]]:
    """Yield each element of a list with the mark that ends it.

    The mark is "" if the text is truncated. The last element is the text after the list, with the mark "after".
    """
    element = _Bounded[str]()
    depth, in_string, ended, carried = 0, False, False, ""
    for chunk in chunks:
        text, start, position = carried + chunk, 0, 0
        while not ended and (match := (_IN_STRING if in_string else _OUTSIDE).search(text, position)):
            position, mark = match.end(), match[0]
            if mark == '"':
                in_string = not in_string
            elif in_string:
                continue  # an escaped character
            elif mark in "[{":
                depth += 1
            elif depth == 0 and mark in ",]":
                element.add(text[start : match.start()])
                yield element, mark
                element, start, ended = _Bounded[str](), position, mark == "]"
            elif mark in "]}":
                depth = max(0, depth - 1)
        # A backslash at the end escapes the first character of the next chunk.
        carried = "\\" if in_string and text.endswith("\\", position) else ""
        element.add(text[start : len(text) - len(carried)])
    element.add(carried)
    yield element, "after" if ended else ""


class _Bounded(Generic[AnyStr]):
    """The parts of one row. Parts beyond the maximum length of a row are not kept."""

    def __init__(self) -> None:
        self.parts: list[AnyStr] = []
        self._size = 0

    @property
    def too_long(self) -> bool:
        return self._size > MAX_ROW

    def add(self, part: AnyStr) -> None:
        if self._size <= MAX_ROW:
            self.parts.append(part)
        self._size += len(part)


def _parquet_rows(file: Path) -> Iterator[Row]:
    pyarrow = _pyarrow("parquet")
    import pyarrow.parquet as parquet

    try:
        with _open(file) as stream:
            data: Any = stream
            if file.suffix.lower() in COMPRESSED:
                content = stream.read(MAX_WHOLE + 1)
                _check_whole(len(content), file, "Unpack it.")
                data = io.BytesIO(content)
            index = 0
            for batch in parquet.ParquetFile(data).iter_batches(batch_size=512):
                for row in batch.to_pylist():
                    yield f"{file.name}[{index}]", ColumnRow(row)
                    index += 1
    except (pyarrow.ArrowException, EOFError, zlib.error) as error:
        raise DataError(f"{str(file)!r} is not a parquet file that can be read: {error}.") from error


def hub_rows(
    dataset_id: str, name: str, split: str = "train", config: str | None = None, *, streaming: bool = False
) -> Iterator[Row]:
    """Yield every row of a public data set with `datasets`, from its cache when the Hub cannot be reached.

    With `streaming`, rows are fetched while they are read, at the current revision of the Hub, and nothing is stored.
    """
    place = dataset_id if config is None else f"{dataset_id}/{config}"
    rows = iter(_hub_dataset(dataset_id, name, split, config, streaming))
    for i in count():
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # any kind: the network, the file, the codec
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise SourceError(f"Reading the data set {place!r} failed at row {i}: {reason}.") from error
        yield f"{place}[{i}]", ColumnRow(row) if isinstance(row, dict) else row


def hub_fingerprint(dataset_id: str, name: str, split: str = "train", config: str | None = None) -> str:
    """Return the fingerprint that `datasets` gives to the rows of a public data set."""
    return str(getattr(_hub_dataset(dataset_id, name, split, config), "_fingerprint", ""))


def _hub_dataset(dataset_id: str, name: str, split: str, config: str | None, streaming: bool = False) -> Any:
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise MissingExtraError(
            f"Fetching {dataset_id!r} needs the package datasets: {TRAIN_EXTRA}. Without it, give a file: {name}=path."
        ) from None

    def failed(reason: str) -> SourceError:
        return SourceError(
            f"The data set {dataset_id!r} of the reader {name!r} could not be fetched: {reason}. "
            f"Give a local file instead: {name}=path/to/rows.jsonl."
        )

    # `datasets` retries an unreachable Hub for half a minute; one plain request fails at once.
    offline, options = False, {}
    try:
        info = huggingface_hub.HfApi().dataset_info(dataset_id, timeout=10)
        if streaming:
            options = {"streaming": True, "revision": getattr(info, "sha", None)}
    except huggingface_hub.errors.GatedRepoError:
        raise failed(
            f"it is gated; accept its terms at https://huggingface.co/datasets/{dataset_id} and run `hf auth login`"
        ) from None
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise failed("the Hub has no such data set, or this account cannot read it") from None
    except Exception:  # any kind: a cached copy may exist; if not, the error below is raised
        offline = True
    try:
        return _load(datasets, huggingface_hub, (dataset_id, config), {"split": split, **options}, offline)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise failed("the Hub cannot be reached and no copy is cached" if offline else first_line) from error


def _load(datasets: Any, hub: Any, name: tuple[str, str | None], options: dict[str, Any], offline: bool) -> Any:
    """Call `load_dataset`; when offline, use only the cache."""
    before = datasets.config.HF_HUB_OFFLINE, hub.constants.HF_HUB_OFFLINE
    if offline:
        datasets.config.HF_HUB_OFFLINE = hub.constants.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(*name, **options)
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.constants.HF_HUB_OFFLINE = before
