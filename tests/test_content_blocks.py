"""Messages with a list of blocks as content mean the same as messages with text, calls and results."""

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import demo_tokenizer
from poe.calls.content import split_messages
from poe.data.drops import DropReport
from poe.data.readers import messages, read_source
from poe.data.render import Renderer
from poe.data.spec import DataSource
from poe.errors import RowError
from test_readers import BAKE, NAP, kept, reason

USER = {"role": "user", "content": "Go"}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def use(name: str = "bake_bread", call_id: str = "toolu_1", **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def result(content: Any, call_id: str = "toolu_1", **others: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **others}


def call(name: str, call_id: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


ANTHROPIC = {
    "system": [text("Be brief."), {**text(" Be kind."), "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [text("Bake "), text("bread")]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                text("Sure."),
                use(flour="rye", grams=5),
                use("take_nap", "toolu_2"),
            ],
        },
        {
            "role": "user",
            "content": [result([text("res"), text("ted")], "toolu_2"), result("baked"), text("And now?")],
        },
        {"role": "assistant", "content": [text("Eat it.")]},
    ],
    "tools": [{**tool, "input_schema": tool["parameters"]} | {"parameters": None} for tool in (BAKE, NAP)],
}
OPENAI = {
    "messages": [
        {"role": "system", "content": "Be brief. Be kind."},
        {"role": "user", "content": "Bake bread"},
        {
            "role": "assistant",
            "content": "Sure.",
            "tool_calls": [call("bake_bread", "a", {"flour": "rye", "grams": 5}), call("take_nap", "b", {})],
        },
        {"role": "tool", "tool_call_id": "b", "content": "rested"},
        {"role": "tool", "tool_call_id": "a", "content": "baked"},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Eat it."},
    ],
    "tools": [BAKE, NAP],
}


def test_rows_in_the_spelling_of_anthropic_are_those_of_openai() -> None:
    expected = kept(messages, OPENAI)[0]
    assert kept(messages, ANTHROPIC)[0].key() == expected.key()
    as_text = {**ANTHROPIC, "messages": json.dumps(ANTHROPIC["messages"]), "tools": json.dumps(ANTHROPIC["tools"])}
    assert kept(messages, as_text)[0].key() == expected.key()
    with_both = {**OPENAI, "system": "Be brief. Be kind."}
    assert kept(messages, with_both)[0].key() == expected.key()


def test_blocks_from_parquet_lose_the_keys_of_other_blocks(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    question, answer = ANTHROPIC["messages"][:2]  # type: ignore[misc]
    short = {"role": "assistant", "content": [use(flour="rye", grams=None)]}
    tools = json.dumps([BAKE, NAP])
    rows = [{"messages": [question, other], "tools": tools} for other in (answer, short)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    got = list(read_source(DataSource("messages", f"{tmp_path}/x.parquet"), DropReport()))
    calls = [[c["function"]["arguments"] for c in row.messages[1]["tool_calls"]] for row in got]
    assert calls == [[{"flour": "rye", "grams": 5}, {}], [{"flour": "rye"}]]


@pytest.mark.parametrize(
    ("turns", "why"),
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "image in the content"),
        ([{"role": "user", "content": [text("x"), {"type": "image", "source": {}}]}], "image in the content"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "content that is not text"),
        ([{"role": "user", "content": {"type": "input_image"}}], "image in the content"),
        ([{"role": "user", "content": ["a", "b"]}], "content that is not text"),
        ([{"role": "user", "content": {"a": 1}}], "content that is not text"),
        ([{"role": "user", "content": [use()]}], "content that is not text"),
        ([{"role": "user", "content": [result("x")]}], "response without a call"),
        ([USER, {"role": "assistant", "content": [{"type": "server_tool_use"}]}], "content that is not text"),
        ([USER, {"role": "assistant", "content": [use(flour="rye"), text("x")]}], "text after a call"),
        ([USER, {"role": "assistant", "content": [use(flour=[])]}], "argument of another type than declared"),
        ([USER, {"role": "assistant", "content": [use("fly")]}], "call to a tool that is not offered"),
        ([USER, {"role": "assistant", "content": [{"type": "tool_use"}]}], "call without a name"),
        (
            [USER, {"role": "assistant", "content": [use(flour="rye")], "tool_calls": [call("take_nap", "a", {})]}],
            "calls in the content and in tool_calls",
        ),
        (
            [
                USER,
                {"role": "assistant", "content": [use(flour="rye")]},
                {"role": "user", "content": [result([{"type": "image"}])]},
            ],
            "image in the content",
        ),
        (
            [
                USER,
                {"role": "assistant", "content": [use(flour="rye")]},
                {"role": "user", "content": [text("Wait"), result("x")]},
            ],
            "call without a response",
        ),
    ],
)  # fmt: skip
def test_blocks_that_cannot_be_read_drop_the_row_with_a_reason(turns: list[dict[str, Any]], why: str) -> None:
    assert reason(messages, {"messages": turns, "tools": [BAKE, NAP]}) == why


def test_results_that_are_no_blocks_are_json() -> None:
    places = [{"type": "museum", "name": "A"}, {"type": "park", "name": "B"}]
    for content, expected in ((places, json.dumps(places)), ([], "[]"), ({"type": "x"}, '{"type": "x"}'), (5, "5")):
        answer = {"role": "tool", "content": content}
        turns = [USER, {"role": "assistant", "content": [], "tool_calls": [call("take_nap", "a", {})]}, answer]
        row = {"messages": [*turns, {"role": "assistant", "content": "b"}], "tools": [NAP]}
        conversation, _ = kept(messages, row)
        assert [m["content"] for m in conversation.messages[1:3]] == [None, expected]


def test_an_error_mark_is_counted_and_marks_of_training_stay() -> None:
    turns = [
        USER,
        {"role": "assistant", "content": [use(flour="rye")], "weight": 0},
        {"role": "user", "content": [result("burnt", is_error=True)]},
        {"role": "assistant", "content": "Sorry."},
    ]
    conversation, repairs = kept(messages, {"messages": turns, "tools": [BAKE]})
    assert conversation.messages[1]["weight"] == 0
    assert repairs["error mark of a result left out"] == 1


def test_prompts_take_blocks() -> None:
    renderer = Renderer(demo_tokenizer())
    plain = kept(messages, OPENAI)[0].messages
    given = [{"role": "system", "content": ANTHROPIC["system"]}, *ANTHROPIC["messages"]]  # type: ignore[misc]
    assert renderer.prompt(given[:-1], [BAKE, NAP]) == renderer.prompt(plain[:-1], [BAKE, NAP])
    assert renderer.prompt_ids(given[:-1], [BAKE, NAP]) == renderer.prompt_ids(plain[:-1], [BAKE, NAP])
    with pytest.raises(RowError, match="image in the content"):
        renderer.prompt([{"role": "user", "content": [{"type": "image"}]}])


def test_messages_with_text_are_not_changed() -> None:
    assert all(a is b for a, b in zip(split_messages(OPENAI["messages"]), OPENAI["messages"], strict=True))
