"""What a suite asks: a question for each trained answer of a row, and intervals over rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from poe.calls.conversation import Conversation
from poe.evaluation.call_metrics import Counts, add_by_row, split_question, summarize
from poe.evaluation.kinds import read_sources

CALL = {"type": "function", "id": "1", "function": {"name": "ping", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}}


def talk(text: str, **marks: Any) -> list[dict[str, Any]]:
    """Return a question, a call, its result, and an answer with marks."""
    return [
        {"role": "user", "content": text},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "pong"},
        {"role": "assistant", "content": f"Done: {text}", **marks},
    ]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    rows = [
        [*talk("Ping!"), *talk("Again!", weight=0)],
        talk("Ping!"),  # the beginning of the first row
        talk("Ring!"),
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": row, "tools": [TOOL]}) for row in rows))
    return tmp_path / "rows.jsonl"


def test_each_trained_answer_of_a_row_is_a_question(rows_file: Path) -> None:
    (rows,) = read_sources(f"messages={rows_file}")
    asked = [
        (row, len(split_question(content)[0]), len(split_question(content)[1])) for _, row, _, content in rows.rows
    ]
    first, last = dict.fromkeys(row for row, _, _ in asked)
    assert asked == [(first, 1, 1), (first, 3, 0), (first, 5, 1), (last, 1, 1), (last, 3, 0)]
    assert [question[0] for question in rows.rows[:3]] == [f"{first}#{turn}" for turn in (1, 2, 3)]
    assert (rows.read, rows.dropped) == (3, {"repeated": 2})
    question = split_question(rows.rows[2][-1])[0]
    assert [message["role"] for message in question] == ["user", "assistant", "tool", "assistant", "user"]
    assert question[3]["content"] == "Done: Ping!"


def test_a_row_that_continues_another_one_joins_it(tmp_path: Path) -> None:
    rows = [talk("Ping!")[:2], talk("Ring!"), talk("Ping!"), [*talk("Ping!"), *talk("More!")]]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": row, "tools": [TOOL]}) for row in rows))
    (read,) = read_sources(f"messages={tmp_path / 'rows.jsonl'}")
    first, second = dict.fromkeys(row for _, row, _, _ in read.rows)
    assert [row for _, row, _, _ in read.rows] == [first, second, second, first, first, first]
    assert [id.rpartition("#")[2] for id, *_ in read.rows] == ["1", "1", "2", "2", "3", "4"]


def test_a_sample_has_whole_rows(rows_file: Path) -> None:
    (rows,) = read_sources(f"messages={rows_file}")
    for seed in range(6):
        items, _ = rows.choose(lambda content: [1], 1, seed)
        assert len({item.row for item in items}) == 1
        assert len(items) == sum(row == items[0].row for _, row, _, _ in rows.rows)
    short, dropped = rows.choose(lambda content: "too long" if len(content.messages) > 2 else [1], None, 0)
    assert (len(short), dropped["too long"]) == (2, 3)


def test_the_interval_of_rows_with_many_equal_turns_is_that_of_the_rows() -> None:
    rows: list[Counts] = [{"exact": (float(i % 3 == 0), 1.0)} for i in range(60)]
    turns = [counts for counts in rows for _ in range(5)]
    by_row = summarize(add_by_row(turns, [str(i // 5) for i in range(300)]))["exact"]
    assert by_row == summarize(rows)["exact"]
    alone = summarize(turns)["exact"]
    assert alone.value == by_row.value
    assert by_row.high - by_row.low > 1.8 * (alone.high - alone.low)  # type: ignore[operator]


def test_rows_are_cut_at_their_answers() -> None:
    conversation = Conversation([{"role": "system", "content": "Be kind."}, *talk("Ping!", weight=0)])
    (cut,) = conversation.cut_at_answers()
    assert cut.messages == conversation.messages[:3]
    (whole,) = cut.cut_at_answers()
    assert whole == cut


def test_suites_of_one_reader_are_called_by_their_files(tmp_path: Path, rows_file: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("clean.jsonl", "heavy.jsonl"):
            (tmp_path / folder / name).write_text(rows_file.read_text())
    a, b = tmp_path / "a", tmp_path / "b"
    names = [rows.name for rows in read_sources(f"messages={a / 'clean.jsonl'},messages={a / 'heavy.jsonl'}")]
    assert names == ["messages=clean.jsonl", "messages=heavy.jsonl"]
    names = [rows.name for rows in read_sources(f"messages={a / 'clean.jsonl'},messages={b / 'clean.jsonl'}")]
    assert names == [f"messages={a / 'clean.jsonl'}", f"messages={b / 'clean.jsonl'}"]
