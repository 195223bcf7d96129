"""Rows that other tools wrote: columnar files, JSON text at any level, weights, older lists, keys twice, long texts."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import demo_tokenizer, render_one
from poe.calls.conversation import Conversation
from poe.data.drops import DropReport
from poe.data.export import export
from poe.data.near import NearDuplicates
from poe.data.readers import glaive, hermes, messages, read_source, xlam
from poe.data.render import Renderer
from poe.data.render_worker import RenderWorker
from poe.data.sources import ColumnRow
from poe.data.spec import DataSource
from poe.data.store import RowWriter
from poe.evaluation.calls import split_question
from test_readers import kept, reason, run, shape

USER = {"role": "user", "content": "Go"}
SEARCH = {
    "name": "search",
    "description": "",
    "parameters": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "limit": {"type": ["integer", "null"]},
            "page": {"type": ["integer", "null"]},
            "filter": {"type": "object"},
        },
        "required": ["text", "limit"],
    },
}
NAP = {
    "name": "nap",
    "description": "",
    "parameters": {"type": "object", "properties": {"minutes": {"type": "integer"}}},
}


def chat(*calls: dict[str, Any]) -> list[dict[str, Any]]:
    called = [{"id": f"c{i}", "type": "function", "function": call} for i, call in enumerate(calls)]
    return [USER, {"role": "assistant", "content": None, "tool_calls": called}]


CALLS = [
    {"name": "search", "arguments": {"text": "a", "limit": None, "filter": {"year": 1, "place": None}}},
    {"name": "nap", "arguments": {"minutes": 5}},
]
CLEAN = [("search", {"text": "a", "limit": None, "filter": {"year": 1}}), ("nap", {"minutes": 5})]


@pytest.mark.parametrize("tools_as", ["list", "text", "texts"])
@pytest.mark.parametrize("calls_as", ["structs", "text"])
def test_nulls_of_columnar_files_are_left_out(tmp_path: Path, tools_as: str, calls_as: str) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    tools: Any = [SEARCH, NAP]
    tools = {"list": tools, "text": json.dumps(tools), "texts": list(map(json.dumps, tools))}[tools_as]
    rows = []
    for call in (CALLS, CALLS[::-1]):
        conversation = [*chat(*call), {"role": "tool", "tool_call_id": "c0", "content": "ok"}]
        if calls_as == "text":
            conversation[1] = {**conversation[1], "tool_calls": json.dumps(conversation[1]["tool_calls"])}
        rows.append({"messages": conversation, "tools": tools, "functions": None})
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    report = DropReport()
    got = list(read_source(DataSource("messages", f"{tmp_path}/x.parquet"), report))
    assert report.as_dict()["messages"]["dropped"] == {}
    explicit = [("search", CALLS[0]["arguments"]), CLEAN[1]]  # text has the nulls that it was written with
    expected = CLEAN if calls_as == "structs" else explicit
    assert [shape(c)[1][2] for c in got] == [expected, expected[::-1]]
    assert [tool["function"]["parameters"] for tool in got[0].tools] == [SEARCH["parameters"], NAP["parameters"]]


def test_every_reader_ignores_the_nulls_of_columnar_files() -> None:
    nap = {**NAP, "parameters": {**NAP["parameters"], "properties": {**NAP["parameters"]["properties"], "text": None}}}
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Go", "weight": None},
            {"from": "gpt", "value": "Fine.", "weight": None},
        ],
        "tools": [nap],
    }
    flat = {"name": "nap", "description": "", "parameters": {"minutes": {"type": "int", "default": None}, "text": None}}
    answers = [{"name": "nap", "arguments": {"minutes": 5, "text": None}}]
    for reader, row in (
        (glaive, sharegpt),
        (hermes, sharegpt),
        (xlam, {"query": "Go", "tools": [flat], "answers": answers}),
    ):
        conversation, _ = kept(reader, ColumnRow(row))
        assert list(conversation.tools[0]["function"]["parameters"]["properties"]) == ["minutes"]


def test_nulls_and_json_text_at_every_level() -> None:
    answer = {"role": "assistant", "content": "b"}
    for row in (
        {"messages": [USER, {**answer, "tool_calls": None, "function_call": None}], "tools": None},
        {"messages": [USER, {**answer, "tool_calls": "null", "function_call": ""}], "tools": "null"},
        {"messages": json.dumps([USER, {**answer, "tool_calls": []}]), "tools": {}, "functions": []},
        {"messages": [json.dumps(USER), json.dumps(answer)], "functions": ""},
    ):
        assert shape(kept(messages, row)[0]) == [("user", "Go", []), ("assistant", "b", [])]
    call = {"name": "nap", "arguments": {"minutes": 5}}
    text = json.dumps(call["arguments"])
    for calls in (
        json.dumps([call]),
        [json.dumps(call)],
        [{"type": "function", "function": json.dumps(call)}],
        [{"function": {"name": "nap", "arguments": text}}],
        [{"name": "nap", "arguments": json.dumps(text)}],  # JSON text of JSON text
        [{"type": "tool_call", "name": "nap", "args": call["arguments"], "id": "x"}],
        [{"type": "tool_use", "name": "nap", "input": call["arguments"]}],
        [{"type": "function_call", "call_id": "x", "name": "nap", "arguments": text}],
        [{"name": "nap", "arguments": None, "parameters": call["arguments"]}],
    ):
        row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}], "tools": [NAP]}
        assert shape(kept(messages, row)[0])[1] == ("assistant", None, [("nap", {"minutes": 5})])


def test_the_older_lists_of_functions_are_offered() -> None:
    legacy = {"role": "assistant", "content": None, "function_call": {"name": "nap", "arguments": '{"minutes": 5}'}}
    result = {"role": "function", "name": "nap", "content": "ok"}
    row = {"messages": [USER, legacy, result, {"role": "assistant", "content": "b"}], "functions": [NAP]}
    for given in (row, {**row, "functions": json.dumps([NAP])}, {**row, "tools": [], "functions": [NAP]}):
        conversation, _ = kept(messages, given)
        assert [m["role"] for m in conversation.messages] == ["user", "assistant", "tool", "assistant"]
        assert [tool["function"]["name"] for tool in conversation.tools] == ["nap"]
    both, _ = kept(messages, {**row, "tools": [SEARCH, NAP]})
    assert [tool["function"]["name"] for tool in both.tools] == ["search", "nap"]


MARKS = [
    *({"weight": 0}, {"weight": 0.0}, {"weight": "0"}, {"loss_weight": 0.0}, {"loss": False}, {"train": False}),
    *({"training": False}, {"trainable": False}, {"masked": True}),
]


@pytest.mark.parametrize("mark", MARKS, ids=str)
def test_messages_that_are_not_to_be_learned_are_not(mark: dict[str, Any], renderer: Renderer) -> None:
    answers = [
        {"role": "assistant", "content": "wrong", **mark},
        {"role": "assistant", "content": "right", "weight": 1},
    ]
    row = {"messages": [{**USER, "weight": 0}, answers[0], {**USER, "content": "Again"}, answers[1]]}
    conversation, _ = kept(messages, row)
    rendered = render_one(renderer, conversation)
    learned = [i for i, trained in zip(rendered.input_ids, rendered.loss_mask, strict=True) if trained]
    text = renderer.tokenizer.decode(learned)
    assert "right" in text
    assert "wrong" not in text
    assert "wrong" in rendered.text
    question, _ = split_question(conversation)
    assert [m["content"] for m in question] == ["Go", "wrong", "Again"]  # a wrong answer is no reference
    turns = [{"from": "human", "value": "Go"}, {"from": "gpt", "value": "wrong", **mark}]
    turns += [{"from": "human", "value": "Again"}, {"from": "gpt", "value": "right"}]
    for reader in (glaive, hermes):
        assert [m.get("weight") for m in kept(reader, {"conversations": turns})[0].messages] == [None, 0, None, None]
        assert reason(reader, {"conversations": turns[:2]}) == "no assistant turn that is trained on"


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(demo_tokenizer())


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_weights_survive_an_export(tmp_path: Path, ending: str) -> None:
    row = {
        "messages": [
            USER,
            {"role": "assistant", "content": "a", "weight": 0},
            USER,
            {"role": "assistant", "content": "b"},
        ]
    }
    conversation, _ = kept(messages, row)
    export([conversation], tmp_path / f"x{ending}")
    (back,) = read_source(DataSource("messages", str(tmp_path / f"x{ending}")), DropReport())
    assert back.messages == conversation.messages


def test_weights_that_cannot_be_kept_drop_the_row() -> None:
    half = {"role": "assistant", "content": "a", "weight": 0.5}
    assert reason(messages, {"messages": [USER, half]}) == "message with a weight other than 0 or 1"
    detail = {
        "role": "assistant",
        "content": "ab",
        "train_detail": [{"begin_offset": 0, "end_offset": 0, "train": False}],
    }
    assert reason(messages, {"messages": [USER, detail]}) == "message that is trained in part"


def test_a_key_twice_drops_the_row_and_is_counted(tmp_path: Path) -> None:
    twice = '{"minutes": 5, "minutes": 6}'
    row = {
        "messages": [USER, {"role": "assistant", "tool_calls": [{"name": "nap", "arguments": twice}]}],
        "tools": [NAP],
    }
    assert reason(messages, row) == "arguments with one key twice"
    call = f'<tool_call>{{"name": "nap", "arguments": {twice}}}</tool_call>'
    turns = {"conversations": [{"from": "human", "value": "Go"}, {"from": "gpt", "value": call}], "tools": [NAP]}
    assert reason(hermes, turns) == "call with one key twice"
    answers = f'[{{"name": "nap", "arguments": {twice}}}]'
    assert reason(xlam, {"query": "Go", "tools": [NAP], "answers": answers}) == "answers with one key twice"
    chat_text = f'USER: Go\n\n\nASSISTANT: <functioncall> {{"name": "nap", "arguments": \'{twice}\'}} <|endoftext|>\n'
    assert reason(glaive, {"system": json.dumps(NAP), "chat": chat_text}) == "arguments with one key twice"
    good = json.dumps({"messages": [USER, {"role": "assistant", "content": "a"}]})
    for name, text in (
        ("x.jsonl", '{"messages": [], "messages": []}\n' + good),
        ("x.json", '[{"messages": [], "messages": []},' + good + "]"),
    ):
        (tmp_path / name).write_text(text)
        report = DropReport()
        assert len(list(read_source(DataSource("messages", str(tmp_path / name)), report))) == 1
        assert report.as_dict()["messages"]["dropped"] == {"one key twice": 1}


def test_a_long_row_is_dropped_before_it_is_rendered(tmp_path: Path, renderer: Renderer) -> None:
    words = " ".join(f"w{i}" for i in range(800_000))
    writer = RowWriter(tmp_path)
    long = [{"role": "user", "content": words}, {"role": "assistant", "content": "a"}]
    tool = {"type": "function", "function": {"name": "f", "description": words, "parameters": {"type": "object"}}}
    rows = [Conversation(long), Conversation([USER, long[1]], [tool]), Conversation([USER, long[1]])]
    for row in rows:
        writer.append(row)
    writer.close()
    import numpy as np

    start = time.process_time()
    worker = RenderWorker(tmp_path, renderer, 256)
    dropped = [item.dropped for item in worker(np.array([[0, 0], [1, 0], [2, 0]]))]
    assert dropped == ["longer than 256 tokens", "longer than 256 tokens", None]
    unlimited = RenderWorker(tmp_path, renderer, 2**31)
    assert unlimited(np.array([[0, 0]]))[0].dropped == "longer than 2,097,152 characters"
    assert time.process_time() - start < 2  # it took half a minute


def test_near_duplicates_of_a_long_row_take_little_memory() -> None:
    import tracemalloc

    words = [f"w{i}" for i in range(12_000)]
    rows = [Conversation([{"role": "user", "content": " ".join(words[i:])}]) for i in (0, 3)]
    near = NearDuplicates(0.9)
    tracemalloc.start()
    for row in rows:
        near.add(row)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20  # all at once took 36 MB, and 2 GB for a row of 5 MB
    assert list(near.find()) == [(1, 0)]


def test_rows_and_reports_of_hostile_content_stay_small() -> None:
    long = "x" * 100_000
    for row in (
        {"messages": [{"role": long, "content": "x"}]},
        {"messages": [USER, {"role": "assistant", "content": [{"type": long, "value": "x"}]}]},
        {"messages": [USER], "tools": [{"name": long, "parameters": {}}]},
        {"messages": [USER], "tools": [{"name": "f", "parameters": {"type": long}}]},
        {"messages": [USER], "tools": [{"name": "f", long: {"a": {"type": "string"}}}]},
        {"messages": [USER], "tools": [{"name": "f", "parameters": {"a": {"type": "List[" * 1000}}}]},
    ):
        assert len(reason(messages, row)) < 120
    assert run(messages, {"messages": "[" * 100_000})[1]["dropped"] == {"messages not JSON": 1}
