"""The rows of the baseline kit: what is trained on, and what is asked."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from poe.calls.conversation import Conversation
from poe.data.drops import DropReport
from poe.data.export import export
from poe.data.readers import READERS, read_source
from poe.data.readers.guess import find_reader
from poe.data.spec import parse_spec
from poe.data.split import split_number
from poe.evaluation.kinds import read_sources
from poe.evaluation.suites import ANSWERS, CALLS, CODE, NUMBERS, Rows

ASKED = (CALLS, ANSWERS, NUMBERS, CODE)  # kinds of rows with a reference that can be predicted token by token


def set_aside(data: str, most: int, folder: Path) -> tuple[str, str]:
    """Set `most` questions of each reader of a SPEC aside; return the SPEC of the other rows, and of these.

    Both are files in `folder`, written once. A row that shares its first question with a test row is in neither. What
    the readers drop is in `dropped.jsonl` beside them.
    """
    rows: dict[str, list[Conversation]] = {}
    with DropReport(folder / "dropped.jsonl") as report:
        for source in parse_spec(data, READERS, find_reader):
            rows.setdefault(source.name, []).extend(read_source(source, report))
    train, test = [], []
    for name, conversations in rows.items():
        chosen: dict[str, Conversation] = {}
        for conversation in sorted(conversations, key=split_number):
            if len(chosen) < most:
                chosen.setdefault(conversation.query, conversation)
        others = [conversation for conversation in conversations if conversation.query not in chosen]
        train.append(_write(others, folder / f"train-{name}.jsonl"))
        test.append(_write(chosen.values(), folder / f"test-{name}.jsonl"))
    return ",".join(train), ",".join(test)


def _write(rows: Iterable[Conversation], file: Path) -> str:
    if not file.exists():
        export(rows, file)
    return f"messages={file}"


def read_test(spec: str, data: str) -> list[Rows]:
    """Read the suites of a SPEC without the rows that share their question with a row of the training data.

    A suite of a path is called by the name of its file, if no other one is. The questions of a suite with a scorer of
    its own are kept.
    """
    known = {_question(row[-1]) for rows in read_sources(data) for row in rows.rows}
    sources = read_sources(spec)
    names = Counter(_short_name(rows) for rows in sources)
    for rows in sources:
        if names[_short_name(rows)] == 1:
            rows.name = _short_name(rows)
        if rows.kind not in ASKED:
            continue
        unknown = [row for row in rows.rows if _question(row[-1]) not in known]
        rows.dropped["question of the training data"] += len(rows.rows) - len(unknown)
        rows.rows[:] = unknown
    return sources


def _short_name(rows: Rows) -> str:
    reader, _, path = rows.name.partition("=")
    return Path(path).stem or reader


def _question(conversation: Conversation) -> str:
    return " ".join((conversation.query or "").lower().split())
