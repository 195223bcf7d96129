"""Plain documents for pretraining a base: the demo world's own texts, local files, or a data set of the Hub.

Nothing is held but what is being read. Local files are .txt and .md, where `<|endoftext|>` separates documents, and
rows of json, jsonl and parquet, each also as .gz or .zst; of a row the text is one column. What has no text in it, or
cannot be read, is counted in the report.
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
from poe.calls.schema import check_value
from poe.data.drops import DropReport
from poe.data.sources import SUFFIXES, Blocks, Row, expand, file_rows, hub_rows, kind_of, kinds_text
from poe.data.spec import DataSource, parse_spec
from poe.demo.notations import make_notations
from poe.demo.text import make_text
from poe.errors import DataError

GENERATED = {"demo": make_text, "notations": make_notations}  # endless: a document is a function of its number
NAME = "text"
TEXT_READERS = (*GENERATED, NAME)
PLAIN = (".txt", ".md")
KINDS = (*PLAIN, *SUFFIXES)
COLUMNS = ("text", "content", "raw_content", "document", "article", "body", "code")  # the first that a row has
PART_CHARACTERS = 20_000
OPEN_FILES = 16
END_OF_TEXT = "<|endoftext|>"

_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w.-]+))?")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what the error handler "surrogateescape" makes of such bytes


def documents(spec: str, *, seed: int = 0, easy: float = 0.0, report: DropReport | None = None) -> Iterator[Text]:
    """Yield the documents of a SPEC, the same ones for the same files and `seed`.

    `demo` and `notations` are generated, endless, each document with its answers marked; `easy` is theirs
    (`make_text`). `text=PATH` are local files, a folder or a glob; `text=USER/DATASET` or `text=USER/DATASET/CONFIG`,
    where no such path exists, is the split "train" of a data set of the Hub, streamed.

    Several sources are interleaved so that each has given its weight's share of the characters at any time, and so are
    the files of one source (as many as are open at a time) by their sizes; long documents come in parts. `report`
    counts what was read, kept and dropped under "text", parts of plain files each as one. Raises `DataError` for what
    cannot be read as text or holds none, `SourceError` for a data set that cannot be fetched.
    """
    report = DropReport() if report is None else report
    sources = parse_spec(spec, TEXT_READERS)
    return _mixed([(source.weight, _texts(source, seed, easy, report)) for source in sources], len(sources))


def is_generated(spec: str) -> bool:
    """Whether all that a SPEC names is generated, in documents that fit in a row of 512 tokens."""
    return all(source.name in GENERATED for source in parse_spec(spec, TEXT_READERS))


def _mixed(streams: Iterable[tuple[float, Iterator[Text]]], at_once: int) -> Iterator[Text]:
    """Take from the first `at_once` streams by their weights; where one ends, the next begins."""
    waiting = enumerate(streams)
    heap = [(0.0, number, weight, texts) for number, (weight, texts) in islice(waiting, at_once)]
    while heap:
        given, number, weight, texts = heappop(heap)
        if (document := next(texts, None)) is not None:
            yield document
            heappush(heap, (given + len(document.text) / weight, number, weight, texts))
        elif (following := next(waiting, None)) is not None:
            number, (weight, texts) = following
            heappush(heap, (given, number, weight, texts))


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
        if strange := [str(file) for file in files if kind_of(file) not in KINDS]:
            raise DataError(f"{strange[0]!r} is of no kind that can be read as text; expected {kinds_text(KINDS)}.")
        Random(seed).shuffle(files)
        texts = _mixed(((max(1, file.stat().st_size), _file_texts(file, report)) for file in files), OPEN_FILES)
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
        f"{place!r} has no column that is clearly its text: expected {', '.join(COLUMNS)}, got the columns "
        f"{', '.join(map(str, row))}. Write the text into a file of its own, in a column named text."
    )


def _plain_texts(file: Path, report: DropReport) -> Iterator[Text]:
    for number, part in enumerate(_plain_parts(file, report), 1):
        text = part
        if _NOT_UTF8.search(part):
            lines = part.splitlines(keepends=True)
            for line in filter(_NOT_UTF8.search, lines):
                report.read[NAME] += 1
                shown = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                report.drop(NAME, "line that is not UTF-8", shown, f"{file.name}, part {number}")
            text = "".join(line for line in lines if not _NOT_UTF8.search(line))
        if text.strip():
            report.read[NAME] += 1
            report.kept[NAME] += 1
            yield Text(text, source=f"{file}: {number}")


def _plain_parts(file: Path, report: DropReport) -> Iterator[str]:
    """The documents of a file, without the white space around them, in parts."""
    blocks = Blocks(file)
    text, inside = "", False  # what was read and not given, and whether it continues a document
    for chunk in chain(_decoded(blocks), [END_OF_TEXT]):
        *ended, text = (text + chunk).split(END_OF_TEXT)
        for document in ended:
            yield from _parts(document.rstrip() if inside else document.strip())
            inside = False
        text = text if inside else text.lstrip()
        while len(text) > PART_CHARACTERS + len(END_OF_TEXT):  # what is left may begin a separator
            part, text = _cut(text)
            yield part
            inside = True
    if blocks.broken:
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
        raise DataError(f"A file of text cannot be read: {error}.") from error
    yield decoder.decode(b"", final=True)


def _parts(text: str) -> Iterator[str]:
    """Cut what is longer than a few pages."""
    while len(text) > PART_CHARACTERS:
        part, text = _cut(text)
        yield part
    yield text


def _cut(text: str) -> tuple[str, str]:
    """A part, up to the end of a line where there is one, and the rest."""
    end = text.rfind("\n", PART_CHARACTERS // 2, PART_CHARACTERS) + 1 or PART_CHARACTERS
    return text[:end], text[end:]
