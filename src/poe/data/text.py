"""Read plain documents for pretraining a base: generated texts, local files, or a data set of the Hub.

Documents are streamed, not held in memory. Local files are .txt and .md, in which `<|endoftext|>` separates documents,
and json, jsonl and parquet files with one document per row, in one column; each also as .gz or .zst. Rows without text
and data that cannot be read are counted in the report.
"""

import codecs
import re
from collections.abc import Iterable, Iterator
from functools import partial
from heapq import heappop, heappush
from itertools import chain, count, islice
from pathlib import Path
from random import Random
from typing import Any

from poe.calls.conversation import Text
from poe.calls.values import check_value
from poe.data.drops import DropReport
from poe.data.sources import SUFFIXES, Blocks, Row, expand, file_rows, hub_rows, kind_of, list_kinds
from poe.data.spec import DataSource, parse_spec
from poe.demo.notations import make_notations
from poe.demo.text import make_text
from poe.errors import DataError

GENERATED = {"demo": make_text, "notations": make_notations}  # endless: a document depends only on its number
NAME = "text"
TEXT_READERS = (*GENERATED, NAME)
PLAIN = (".txt", ".md")
KINDS = (*PLAIN, *SUFFIXES)
COLUMNS = ("text", "content", "raw_content", "document", "article", "body", "code")  # in order of preference
PART_CHARACTERS = 20_000
OPEN_FILES = 16
END_OF_TEXT = "<|endoftext|>"

_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w.-]+))?")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # the error handler "surrogateescape" decodes invalid bytes to these


def documents(spec: str, *, seed: int = 0, easy: float = 0.0, report: DropReport | None = None) -> Iterator[Text]:
    """Yield the documents of a SPEC, the same documents for the same files and `seed`.

    `demo` and `notations` are endless generated documents with marked answers; `easy` is passed to their generators
    (`make_text`). `text=PATH` is a local file, a folder or a glob. `text=USER/DATASET` or `text=USER/DATASET/CONFIG`,
    if no such path exists, is the split "train" of a data set of the Hub, streamed.

    Several sources are interleaved so that at any time each has given a share of the characters that is proportional to
    its weight. The open files of one source are interleaved by their sizes. Long documents are cut into parts. `report`
    counts documents under "text"; each part of a plain file counts as one. Raises `DataError` for files that cannot be
    read as text or have no text, and `SourceError` for a data set that cannot be fetched.
    """
    report = DropReport() if report is None else report
    sources = parse_spec(spec, TEXT_READERS)
    return _interleave([(source.weight, _texts(source, seed, easy, report)) for source in sources], len(sources))


def is_generated(spec: str) -> bool:
    """Return whether all sources of a SPEC are generated. Such documents fit in a row of 512 tokens."""
    return all(source.name in GENERATED for source in parse_spec(spec, TEXT_READERS))


def _interleave(streams: Iterable[tuple[float, Iterator[Text]]], at_once: int) -> Iterator[Text]:
    """Interleave the first `at_once` streams by their weights. When a stream ends, the next one starts."""
    waiting = enumerate(streams)
    heap = [(0.0, number, weight, texts) for number, (weight, texts) in islice(waiting, at_once)]
    while heap:
        characters, number, weight, texts = heappop(heap)
        if (document := next(texts, None)) is not None:
            yield document
            heappush(heap, (characters + len(document.text) / weight, number, weight, texts))
        elif (following := next(waiting, None)) is not None:
            number, (weight, texts) = following
            heappush(heap, (characters, number, weight, texts))


def _texts(source: DataSource, seed: int, easy: float, report: DropReport) -> Iterator[Text]:
    if source.name in GENERATED:
        return map(partial(GENERATED[source.name], seed=seed, easy=easy), count())
    if source.path is None:
        raise DataError("The reader 'text' needs files or a data set: text=FILE, text=FOLDER, text=USER/DATASET, ...")
    path = source.path
    return chain.from_iterable(_one_pass(path, seed, report) for _ in range(source.epochs or 1))


def _one_pass(path: str, seed: int, report: DropReport) -> Iterator[Text]:
    hub = None if Path(path).expanduser().exists() else _HUB_NAME.fullmatch(path)
    if hub and kind_of(Path(path)) not in KINDS:
        texts = _row_texts(hub_rows(hub[1], NAME, config=hub[2], streaming=True), path, report)
    else:
        files = expand(path, KINDS)
        if unknown := [str(file) for file in files if kind_of(file) not in KINDS]:
            raise DataError(f"{unknown[0]!r} cannot be read as text; expected {list_kinds(KINDS)}.")
        Random(seed).shuffle(files)
        texts = _interleave(((max(1, file.stat().st_size), _file_texts(file, report)) for file in files), OPEN_FILES)
    empty = True
    for text in texts:
        empty = False
        yield text
    if empty:
        dropped = ", ".join(f"{reason} {n}" for reason, n in report.as_dict().get(NAME, {}).get("dropped", {}).items())
        raise DataError(f"There is no text in {path!r}; dropped: {dropped or 'nothing'}.")


def _file_texts(file: Path, report: DropReport) -> Iterator[Text]:
    if kind_of(file) in PLAIN:
        return _plain_texts(file, report)
    return _row_texts(file_rows(str(file), NAME, report), str(file), report)


def _row_texts(rows: Iterable[Row], place: str, report: DropReport) -> Iterator[Text]:
    column = None
    for row_id, row in rows:
        report.read[NAME] += 1
        text = row
        if isinstance(row, dict):
            column = column or _text_column(row, place)
            text = row.get(column)
        if not isinstance(text, str):
            reason = f"no text in the column {column!r}" if isinstance(row, dict) else "neither a text nor an object"
        else:
            reason = check_value(text) or ("" if text.strip() else "empty text")
        if reason:
            report.drop(NAME, reason, row, row_id)
            continue
        report.kept[NAME] += 1
        yield from (Text(part, source=f"{place}: {row_id}") for part in _parts(text))


def _text_column(row: dict[str, Any], place: str) -> str:
    for name in COLUMNS:
        if name in row and isinstance(row[name], str | None):
            return name
    if len(row) == 1 and isinstance(next(iter(row.values())), str):
        return next(iter(row))
    raise DataError(
        f"{place!r} has no column that is clearly the text: expected {', '.join(COLUMNS)}, got the columns "
        f"{', '.join(map(str, row))}. Write the text into a file of its own, in a column named text."
    )


def _plain_texts(file: Path, report: DropReport) -> Iterator[Text]:
    for number, part in enumerate(_plain_parts(file, report), 1):
        text = part
        if _NOT_UTF8.search(part):
            lines = part.splitlines(keepends=True)
            for line in filter(_NOT_UTF8.search, lines):
                report.read[NAME] += 1
                readable = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                report.drop(NAME, "line that is not UTF-8", readable, f"{file.name}, part {number}")
            text = "".join(line for line in lines if not _NOT_UTF8.search(line))
        if text.strip():
            report.read[NAME] += 1
            report.kept[NAME] += 1
            yield Text(text, source=f"{file}: {number}")


def _plain_parts(file: Path, report: DropReport) -> Iterator[str]:
    """Yield the documents of a file in parts, without the white space around each document."""
    blocks = Blocks(file)
    text, continues = "", False  # text not yet yielded, and whether it continues a document
    for chunk in chain(_decoded(blocks), [END_OF_TEXT]):
        *finished, text = (text + chunk).split(END_OF_TEXT)
        for document in finished:
            yield from _parts(document.rstrip() if continues else document.strip())
            continues = False
        text = text if continues else text.lstrip()
        while len(text) > PART_CHARACTERS + len(END_OF_TEXT):  # the end of the text may be part of a separator
            part, text = _cut(text)
            yield part
            continues = True
    if blocks.truncated:
        report.read[NAME] += 1
        report.drop(NAME, "truncated file", str(file), file.name)


def _decoded(blocks: Blocks) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    try:
        for block in blocks:
            yield decoder.decode(block)
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"A text file cannot be read: {error}.") from error
    yield decoder.decode(b"", final=True)


def _parts(text: str) -> Iterator[str]:
    """Yield a text in parts of a few pages."""
    while len(text) > PART_CHARACTERS:
        part, text = _cut(text)
        yield part
    yield text


def _cut(text: str) -> tuple[str, str]:
    """Return the first part, which ends at the end of a line if possible, and the rest."""
    end = text.rfind("\n", PART_CHARACTERS // 2, PART_CHARACTERS) + 1 or PART_CHARACTERS
    return text[:end], text[end:]
