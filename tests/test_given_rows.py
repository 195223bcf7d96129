"""Rows that are given to `train_stage` in Python, its callbacks, and its result."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from conftest import SMALL_RUN
from poe import Cascade, train_stage
from poe.calls.conversation import Conversation
from poe.data.drops import DropReport
from poe.data.given import write_given
from poe.data.readers import READERS, read_source
from poe.data.spec import DataSource, parse_spec
from poe.errors import DataError, TrainingError
from poe.evaluation.calls import compare_with_base
from poe.training.interrupts import Interrupted
from poe.training.reporting.progress import Progress

QUIET = Progress("test", quiet=True)
RUN = {**SMALL_RUN, "max_steps": 2, "eval_rows": 1, "head": "none"}
ROW = {"messages": [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Sunny."}]}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Rows with calls, as a user of OpenAI's format has them."""
    return [{"messages": c.messages, "tools": c.tools} for c in read_source(DataSource("demo", "60"), DropReport())]


def read(spec: str | None, report: DropReport | None = None) -> list[Conversation]:
    """Return the conversations of a SPEC without their ids."""
    (source,) = parse_spec(spec or "", READERS)
    found = read_source(source, report or DropReport())
    return [Conversation(row.messages, row.tools, row.source, row.license) for row in found]


def test_every_container_of_rows_gives_what_a_file_gives(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = read(f"messages={file}")
    texts = [{**row, "tools": json.dumps(row["tools"]), "messages": json.dumps(row["messages"])} for row in rows]
    data_set = datasets.Dataset.from_list(texts)
    containers: dict[str, Any] = {
        "list": rows,
        "tuple": tuple(rows),
        "generator": (row for row in rows),
        "data set": data_set,
        "stream": data_set.to_iterable_dataset(),
        "split": datasets.DatasetDict(train=data_set),
    }
    for name, data in containers.items():
        assert read(write_given(data, None)[0]) == expected, name
    assert read(write_given(file, None)[0]) == expected
    assert write_given(f"messages={file}", None) == (f"messages={file}", None)
    assert write_given(None, None) == (None, None)


def test_equal_rows_are_one_source_and_other_rows_another(rows: list[dict[str, Any]]) -> None:
    first, again, other = (write_given(data, None)[0] for data in (rows[:5], iter(rows[:5]), rows[:4]))
    assert first == again != other
    path = Path(str(parse_spec(str(first))[0].path))
    assert path.name.startswith("train-")
    path.write_text("damaged")
    assert len(read(write_given(rows[:5], None)[0])) == 5  # it is written again


def test_splits_become_training_and_evaluation_rows(rows: list[dict[str, Any]]) -> None:
    train, evaluation = write_given({"train": rows[:5], "test": rows[5:7]}, None)
    assert (len(read(train)), len(read(evaluation))) == (5, 2)
    assert "/test-" in str(evaluation)
    train, evaluation = write_given({"train": rows[:5], "test": rows[5:7]}, rows[7:10])
    assert (len(read(train)), len(read(evaluation))) == (5, 3)


def test_rows_that_cannot_be_used_are_counted_by_reason_and_kept(tmp_path: Path) -> None:
    image = object()
    with_image = {"messages": [{"role": "user", "content": [{"type": "image", "image": image}]}]}
    bad: list[Any] = [{"messages": []}, "text", with_image, {"messages": [{"role": "user", "content": float("nan")}]}]
    report = DropReport(tmp_path / "dropped.jsonl")
    good = {**ROW, "image": image, "score": float("nan")}  # other columns do not matter
    assert len(read(write_given([good, *bad], None)[0], report)) == 1
    report.close()
    assert report.as_dict()["messages"]["read"] == 5
    assert report.dropped["messages"] == {"row without a list of messages": 1, "row is not an object": 1, "not JSON": 2}
    dropped = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert dropped[2]["row"].startswith("<object is no JSON value> {'messages'")
    assert dropped[2]["id"].endswith(":4")


def get_weather(city: str, days: int = 1) -> str:
    """Get the weather.

    Args:
        city: The city.
        days: Number of days.
    """
    return city * days


def test_tools_of_rows_can_be_python_functions() -> None:
    (row,) = read(write_given([{**ROW, "tools": [get_weather]}], None)[0])
    assert row.tools[0]["function"]["name"] == "get_weather"
    assert row.tools[0]["function"]["parameters"]["required"] == ["city"]
    with pytest.raises(DataError, match=r"Row 1 of data: Python function that does not describe a tool"):
        write_given([ROW, {**ROW, "tools": [lambda city: city]}], None)


def test_absent_members_in_a_data_set_are_not_null_arguments() -> None:
    """Arrow gives every object the keys of all rows, with the value null."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}}
    tools = json.dumps([{"type": "function", "function": {"name": "f", "parameters": schema}}])
    calls = [{"type": "function", "function": {"name": "f", "arguments": {key: "x"}}} for key in "ab"]
    data = [
        {"messages": [ROW["messages"][0], {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": tools}
        for call in calls
    ]
    found = read(write_given(datasets.Dataset.from_list(data), None)[0])
    arguments = [row.messages[1]["tool_calls"][0]["function"]["arguments"] for row in found]
    assert arguments == [{"a": "x"}, {"b": "x"}]


def test_prompts_and_completions_are_rows_in_which_the_completion_is_trained() -> None:
    turns = [*ROW["messages"], {"role": "user", "content": "And now?"}]
    completion = [{"role": "assistant", "content": "Rain."}]
    data = [{"prompt": "Weather?", "completion": "Sunny."}, {"prompt": turns, "completion": completion}]
    plain, chat = read(write_given(data, None)[0])
    assert plain.messages == ROW["messages"]
    assert chat.messages == [turns[0], {**turns[1], "weight": 0}, turns[2], *completion]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ([], "data has no rows: expected a SPEC, or rows with `messages`"),
        ([{"text": "a"}], r"data has rows with text: .* Plain texts train a base, not a stage"),
        (["a", "b"], "data has 2 rows that are no dicts"),
        (ROW, "data is one row"),
        ({"test": [ROW]}, r"data has no split 'train', but 'test': give data=splits\[...\]"),
        (3, "data cannot be int"),
        (datasets.Dataset.from_dict({"question": ["a"]}), "data has rows with question"),
    ],
)
def test_data_of_another_kind_is_refused_at_once(data: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        write_given(data, None)


def test_an_error_of_the_iterable_is_the_callers() -> None:
    def failing() -> Iterator[dict[str, Any]]:
        yield ROW
        raise OSError("my disk")

    with pytest.raises(OSError, match=r"^my disk$"):
        write_given(failing(), None)


def test_a_run_on_rows_reports_every_step_and_returns_stage_and_metrics(
    rows: list[dict[str, Any]], demo_base: Path, tmp_path: Path
) -> None:
    cascade, seen = Cascade.from_pretrained(demo_base), []
    splits = {"train": rows[:50], "test": rows[50:]}
    run = train_stage(
        *(cascade, "demo", splits, tmp_path / "run"),
        name="mine",
        callbacks=[seen.append],
        evaluate=lambda *given: compare_with_base(*given, lambda *asked: {}) or {"s": {"stage": {"exact": 0.5}}},
        progress=QUIET,
        **RUN,
    )
    assert run.stage is cascade.stages["mine"]
    assert [record["step"] for record in seen if "loss" in record] == [1, 2]
    assert [record["step"] for record in seen if "val_bpb" in record] == [0, 2]
    assert seen == sorted(
        map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()), key=lambda r: r["step"]
    )
    metrics = run.metrics
    assert metrics["steps"] == 2
    assert metrics["s/stage/exact"] == 0.5
    assert metrics["val_bpb_before"] == seen[0]["val_bpb"]
    assert all(isinstance(value, int | float) for value in metrics.values())
    assert run.record["data"]["spec"].startswith("messages=/")
    with pytest.raises(TrainingError, match=r"a function that takes a dict of metrics, such as print, got 3"):
        train_stage(cascade, "demo", rows, tmp_path / "no", callbacks=[3])  # type: ignore[list-item]


@pytest.mark.slow
def test_a_run_on_rows_that_was_stopped_continues_and_equals_a_run_on_their_file(
    rows: list[dict[str, Any]], demo_base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(out: str, data: Any, **options: Any) -> bytes:
        run = train_stage(Cascade.from_pretrained(demo_base), "demo", data, tmp_path / out, progress=QUIET, **options)
        return (run.folder / "delta.safetensors").read_bytes()

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            raise Interrupted

    fields = {**RUN, "max_steps": 4, "checkpoint_every": 0.0}
    expected = train("file", f"messages={file}", **fields)
    with pytest.raises(Interrupted):
        train("rows", rows, callbacks=[stop], **fields)
    assert train("rows", iter(rows), resume=True, **fields) == expected
    with pytest.raises(Interrupted):
        train("other", rows, callbacks=[stop], **fields)
    with pytest.raises(TrainingError, match="belongs to another run"):
        train("other", rows[:30], resume=True, **fields)
