"""Plain documents for pretraining a base: the demo world's own texts, or local text files."""

import gzip
import json
from collections.abc import Iterator
from functools import partial
from heapq import heappop, heappush
from itertools import count
from pathlib import Path

from poe.data.conversation import Text
from poe.data.demo.notations import make_notations
from poe.data.demo.text import make_text
from poe.data.spec import parse_spec
from poe.errors import DataError

GENERATED = {"demo": make_text, "notations": make_notations}  # endless: a document is a function of its number
TEXT_READERS = (*GENERATED, "text")
PART_CHARACTERS = 20_000
END_OF_TEXT = "<|endoftext|>"  # separates documents in a .txt file, where it occurs


def documents(spec: str, *, seed: int = 0, easy: float = 0.0) -> Iterator[Text]:
    """Yield the documents of a SPEC: `demo` and `notations` (generated, endless, each with answers marked), or
    `text=FILES` (.txt, .md, .jsonl with a `text` field, .gz).

    Several sources are interleaved so that each has given its weight's share of the characters at any time; long
    documents come in parts. `easy` is the generated texts' (`make_text`). Raises `DataError` for files that cannot be
    read.
    """
    streams = []
    for number, source in enumerate(parse_spec(spec, TEXT_READERS)):
        texts: Iterator[Text]
        if source.name in GENERATED:
            texts = map(partial(GENERATED[source.name], seed=seed, easy=easy), count())
        elif source.path is None:
            raise DataError("The reader 'text' reads local files: text=FILE, text=FOLDER/*.jsonl.gz, ...")
        else:
            files = _files(source.path) * (source.epochs or 1)
            texts = (Text(part) for path in files for text in _read(path) for part in _parts(text))
        streams.append((0.0, number, source.weight, texts))
    while streams:
        given, number, weight, texts = heappop(streams)
        if (document := next(texts, None)) is not None:
            yield document
            heappush(streams, (given + len(document.text) / weight, number, weight, texts))


def is_generated(spec: str) -> bool:
    """Whether all that a SPEC names is generated, in documents that fit in a row of 512 tokens."""
    return all(source.name in GENERATED for source in parse_spec(spec, TEXT_READERS))


def _parts(text: str) -> Iterator[str]:
    """Cut what is longer than a few pages at the end of a line."""
    while len(text) > PART_CHARACTERS:
        end = text.rfind("\n", PART_CHARACTERS // 2, PART_CHARACTERS) + 1 or PART_CHARACTERS
        yield text[:end]
        text = text[end:]
    yield text


def _files(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.is_file())
    else:
        found = [path] if path.is_file() else sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    if not found:
        raise DataError(f"No text files at {pattern!r}: expected a file, a folder or a glob.")
    return found


def _read(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    try:
        with opened(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            if kind == ".jsonl":
                for line in file:
                    if line.strip():
                        text = json.loads(line).get("text")
                        if isinstance(text, str) and text.strip():
                            yield text
            elif kind in (".txt", ".md"):
                yield from (part.strip() for part in file.read().split(END_OF_TEXT) if part.strip())
    except (OSError, EOFError, ValueError, AttributeError) as error:
        raise DataError(f"{path} could not be read as text: {error}") from error
