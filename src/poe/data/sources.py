"""Raw rows: from files, folders, globs and the Hub, each with an id that says where it stood.

Formats: JSON (a list, or an object with the list under `data` or `rows`; a `.json` file that holds lines is read as
lines), JSON Lines, parquet, and each of them as .gz or .zst. UTF-8, with or without a byte order mark. A line or list
element that cannot be parsed is dropped and counted, and the rows around it are kept; a file that breaks off gives the
rows before the break and one drop, "truncated file".
"""

import codecs
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import IO, Any, AnyStr, Generic

from poe.data.drops import DropReport
from poe.errors import DataError, MissingExtraError, SourceError

Row = tuple[str, Any]
"""An id for reports (`rows.jsonl:12`, counted from 1) and the raw value."""

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
COMPRESSED = (".gz", ".zst")
TRAIN_EXTRA = 'pip install "poe-cascade[train]"'
KEPT_TEXT = 20_000
"""How many characters of an unreadable text go to the drop report."""

MAX_ROW = 1 << 24
"""How long the text of one row may be: longer ones are no rows, and would fill the memory."""

TOO_LONG = "row longer than 16 MiB"

_OUTSIDE = re.compile(r'["\[\]{},]')
_INSIDE = re.compile(r'\\.|"', re.DOTALL)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse_json(text: str, *, strict: bool = True) -> Any:
    """`json.loads` without NaN and Infinity. Raises ValueError for whatever cannot be parsed, endless nesting too."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, strict=strict)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def kinds_text(kinds: tuple[str, ...]) -> str:
    names = [kind.removeprefix(".") for kind in kinds]
    return f"{', '.join(names[:-1])} or {names[-1]}, each also as .gz or .zst"


def expand(path: str, kinds: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The files that a path names: itself, every file of these kinds below a folder, or what a glob finds. Sorted."""
    plain = Path(path).expanduser()
    if plain.is_file():
        return [plain]
    if plain.is_dir():
        found = [
            f for f in plain.rglob("*") if f.is_file() and kind_of(f) in kinds and not _is_hidden(f.relative_to(plain))
        ]
        if not found:
            raise DataError(f"The folder {path!r} holds no data file ({kinds_text(kinds)}).")
        return sorted(found)
    if glob.has_magic(str(plain)):
        files = sorted(Path(f) for f in glob.glob(str(plain), recursive=True) if os.path.isfile(f))
        if not files:
            raise DataError(f"No file matches {path!r} (seen from {Path.cwd()}).")
        return files
    raise DataError(f"There is no file or folder {path!r} (seen from {Path.cwd()}).")


def kind_of(path: Path) -> str:
    """The suffix that tells a file's format, in lower case; that of its compression is looked through."""
    suffixes = path.suffixes[:-1] if path.suffix.lower() in COMPRESSED else path.suffixes
    return suffixes[-1].lower() if suffixes else ""


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def file_rows(path: str, source: str, report: DropReport) -> Iterator[Row]:
    """Every row of every file that `path` names. What cannot be parsed is read, dropped and counted under `source`."""
    for file in expand(path):
        if kind_of(file) not in SUFFIXES:
            raise DataError(f"{str(file)!r} is of no kind that can be read; expected {kinds_text(SUFFIXES)}.")
        try:
            if kind_of(file) == ".parquet":
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
    if file.suffix.lower() == ".zst":
        pyarrow = _pyarrow(".zst")
        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd")
    return gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")  # type: ignore[return-value]


def _pyarrow(what: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise MissingExtraError(f"Reading {what} needs pyarrow: {TRAIN_EXTRA}") from None
    return pyarrow


class Blocks:
    """The blocks of a file, decompressed; `broken` turns true where compressed data breaks off."""

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
                except OSError as error:
                    if error.errno is not None or self._file.suffix.lower() != ".zst":
                        raise  # the disk's failure, not that of what lies on it
                    if first:
                        raise DataError(f"{str(self._file)!r} is not a zstd file that can be read: {error}.") from None
                    self.broken = True
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
    text = ""
    for chunk in chunks:
        text += chunk
        if text.strip():
            break
    text = text.lstrip()
    if text.startswith("["):
        yield from _list(chain([text[1:]], chunks), file, source, report)
        return
    if not text.startswith("{"):
        kind = f"starts with {text[:20]!r}" if text else "is empty"
        raise DataError(f"{str(file)!r} {kind}; expected a JSON list of rows, or one JSON object per line.")
    text = "".join(chain([text], chunks))
    try:
        whole = json.loads(text)
    except RecursionError:
        raise DataError(f"{str(file)!r} is nested too deeply.") from None
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
    """The blocks as text. A character that compression breaks off in is left out."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    try:
        for block in blocks:
            yield decoder.decode(block)
            at += len(block)
        if not blocks.broken:
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{str(file)!r} is not UTF-8: {error.reason} near byte {at + error.start}.") from None


def _lines(data: Iterable[bytes], blocks: Blocks, file: Path, source: str, report: DropReport) -> Iterator[Row]:
    """One row per line; only the line feed separates, so other line breaks may stand inside a text."""

    def row(line: _Bounded[bytes], number: int) -> Iterator[Row]:
        raw, row_id = b"".join(line.parts), f"{file.name}:{number}"
        if line.too_long:
            _lost(source, report, TOO_LONG, raw[:KEPT_TEXT].decode("utf-8", "replace"), row_id)
            return
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

    number, line = 1, _Bounded[bytes]()
    for block in data:
        first, *others = block.split(b"\n")
        line.add(first)
        for raw in others:
            yield from row(line, number)
            number, line = number + 1, _Bounded[bytes]()
            line.add(raw)
    if blocks.broken:
        _lost(
            source, report, "truncated file", b"".join(line.parts).decode("utf-8", "replace"), f"{file.name}:{number}"
        )
    else:
        yield from row(line, number)


def _list(chunks: Iterable[str], file: Path, source: str, report: DropReport) -> Iterator[Row]:
    """The elements of a JSON list, from behind its bracket. After one that cannot be parsed, reading goes on."""
    index = 0
    for element, mark in _elements(chunks):
        text, row_id = "".join(element.parts).strip(), f"{file.name}[{index}]"
        if mark == "after" and text:
            _lost(source, report, "text after the end of the list", text, row_id)
        elif mark == "":
            _lost(source, report, "truncated file", text, row_id)
        elif element.too_long:
            _lost(source, report, TOO_LONG, text, row_id)
            index += 1
        elif text and mark != "after":
            try:
                yield row_id, parse_json(text)
            except ValueError:
                _lost(source, report, "not JSON", text, row_id)
            index += 1


def _elements(chunks: Iterable[str]) -> Iterator[tuple["_Bounded[str]", str]]:
    """Each element of a list and the mark that ends it, "" where the text breaks off; last, what comes "after"."""
    element = _Bounded[str]()
    depth, inside, over, carried = 0, False, False, ""
    for chunk in chunks:
        text, start, at = carried + chunk, 0, 0
        while not over and (found := (_INSIDE if inside else _OUTSIDE).search(text, at)):
            at, mark = found.end(), found[0]
            if mark == '"':
                inside = not inside
            elif inside:
                continue  # an escaped character
            elif mark in "[{":
                depth += 1
            elif depth == 0 and mark in ",]":
                element.add(text[start : found.start()])
                yield element, mark
                element, start, over = _Bounded[str](), at, mark == "]"
            elif mark in "]}":
                depth = max(0, depth - 1)
        # A backslash at the end belongs to the character that the next chunk begins with.
        carried = "\\" if inside and text.endswith("\\", at) else ""
        element.add(text[start : len(text) - len(carried)])
    element.add(carried)
    yield element, "after" if over else ""


class _Bounded(Generic[AnyStr]):
    """Pieces of one row, of which no more is kept than a row may have."""

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
            data = io.BytesIO(stream.read()) if file.suffix.lower() in COMPRESSED else stream
            index = 0
            for batch in parquet.ParquetFile(data).iter_batches(batch_size=512):
                for row in batch.to_pylist():
                    yield f"{file.name}[{index}]", row
                    index += 1
    except (pyarrow.ArrowException, EOFError, zlib.error) as error:
        raise DataError(f"{str(file)!r} is not a parquet file that can be read: {error}.") from error


def hub_rows(
    dataset_id: str, name: str, split: str = "train", config: str | None = None, *, streaming: bool = False
) -> Iterator[Row]:
    """Every row of a public data set, through `datasets` (its cache is used when the Hub cannot be reached).

    `streaming`: rows are fetched while they are read, at the revision that the Hub has now, and nothing is stored.
    """
    place = dataset_id if config is None else f"{dataset_id}/{config}"
    rows = iter(_hub_dataset(dataset_id, name, split, config, streaming))
    for i in count():
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # of whatever kind: the network, the file, the codec
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise SourceError(f"The data set {place!r} broke off at row {i}: {why}.") from error
        yield f"{place}[{i}]", row


def hub_fingerprint(dataset_id: str, name: str, split: str = "train", config: str | None = None) -> str:
    """What `datasets` knows a public data set's rows by."""
    return str(getattr(_hub_dataset(dataset_id, name, split, config), "_fingerprint", ""))


def _hub_dataset(dataset_id: str, name: str, split: str, config: str | None, streaming: bool = False) -> Any:
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
        raise failed("the Hub knows no such data set, or not for this account") from None
    except Exception:  # of whatever kind: a copy in the cache may still serve, and if not the message below says so
        offline = True
    try:
        return _load(datasets, huggingface_hub, (dataset_id, config), {"split": split, **options}, offline)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise failed("the Hub cannot be reached and no copy is cached" if offline else first_line) from error


def _load(datasets: Any, hub: Any, what: tuple[str, str | None], options: dict[str, Any], offline: bool) -> Any:
    """`load_dataset`, from the cache alone when offline."""
    before = datasets.config.HF_HUB_OFFLINE, hub.constants.HF_HUB_OFFLINE
    if offline:
        datasets.config.HF_HUB_OFFLINE = hub.constants.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(*what, **options)
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.constants.HF_HUB_OFFLINE = before
