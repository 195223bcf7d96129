"""Tools through the server with OpenAI's client: random weights give valid calls, and each is read as it closes."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import openai
import pytest

from poe import Cascade
from poe.serving.engine import Engine
from poe.serving.replies import Choice
from served_models import Server

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Zürich", "東京"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "units": {"type": "string", "enum": ["C", "F"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}},
]
SCHEMAS = {"get_weather": WEATHER, "stop": {"type": "object", "maxProperties": 0}}
REQUIRED: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 64}


@pytest.fixture(scope="module")
def server(served: tuple[Cascade, Any]) -> Iterator[Server]:
    cascade, models = served
    engine = Engine(cascade, [model.stage for model in models.values()], max_batch=8)
    engine.start()
    yield Server(engine, models)
    engine.close()


def check_calls(calls: Any) -> list[str]:
    """Check ids, names and arguments of calls; return the names."""
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return [call.function.name for call in calls]


@pytest.mark.parametrize(("threshold", "calls"), [(-1e6, True), (1e6, False)])
def test_the_threshold_of_a_stage_decides_whether_to_call(
    server: Server, served: tuple[Cascade, Any], threshold: float, calls: bool
) -> None:
    models = {name: replace(model, threshold=threshold) for name, model in served[1].items()}

    async def ask(name: str) -> Any:
        async with Server(server.engine, models).openai() as client:
            messages: Any = [{"role": "user", "content": "Hello"}]
            return await client.chat.completions.create(model=name, messages=messages, tools=TOOLS, max_tokens=64)

    (choice,) = asyncio.run(ask("gamma")).choices
    assert bool(choice.message.tool_calls) == calls


def test_required_calls_of_all_models_at_once_are_valid_and_those_of_chat(
    server: Server, served: tuple[Cascade, Any]
) -> None:
    async def ask_all() -> list[Any]:
        async with server.openai() as client:
            create = client.chat.completions.create
            messages: Any = [{"role": "user", "content": "Hello"}]
            return await asyncio.gather(*(create(model=name, messages=messages, **REQUIRED) for name in served[1]))

    for model, completion in zip(served[1].values(), asyncio.run(ask_all()), strict=True):
        (choice,) = completion.choices
        assert check_calls(choice.message.tool_calls)
        assert choice.message.content is None
        if model.stage not in (None, "gamma"):
            continue
        question = [{"role": "user", "content": "Hello"}]
        options = {"tool_choice": "required", "max_new_tokens": 64}
        expected = served[0].chat(question, TOOLS, stage=model.stage, **options)
        assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [
            call.arguments for call in expected.calls
        ]
        assert choice.finish_reason == expected.finish_reason


def test_a_named_tool_is_called_once_where_calls_are_not_parallel(server: Server) -> None:
    for name in SCHEMAS:
        choice = {"type": "function", "function": {"name": name}}
        completion = server.ask("beta", **{**REQUIRED, "tool_choice": choice}, parallel_tool_calls=False)
        assert check_calls(completion.choices[0].message.tool_calls) == [name]
        assert completion.choices[0].finish_reason == "tool_calls"


def test_parallel_calls_are_numbered_and_sampled_choices_are_all_valid(server: Server) -> None:
    completion = server.ask("alpha", **REQUIRED, n=6, temperature=1.0, seed=1)
    names = [check_calls(choice.message.tool_calls) for choice in completion.choices]
    assert max(map(len, names)) > 1
    assert len({tuple(each) for each in names}) > 1


def test_streamed_calls_come_whole_and_are_those_of_the_reply(server: Server) -> None:
    options = {**REQUIRED, "temperature": 1.0, "seed": 3}
    whole = server.ask("gamma", **options).choices[0]
    chunks = [chunk.choices[0] for chunk in server.ask("gamma", **options, stream=True)]
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [call.index for call in deltas] == list(range(len(deltas)))
    assert [(call.function.name, call.function.arguments) for call in deltas] == [
        (call.function.name, call.function.arguments) for call in whole.message.tool_calls
    ]
    assert chunks[0].delta.role == "assistant"
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [whole.finish_reason]


def test_calls_can_be_left_to_the_model_or_forbidden(server: Server) -> None:
    options = {"tools": TOOLS, "max_tokens": 24, "n": 3, "temperature": 1.2, "seed": 0}
    for choice in server.ask("alpha", **options).choices:
        check_calls(choice.message.tool_calls or [])
    for choice in server.ask("alpha", **options, tool_choice="none").choices:
        assert choice.message.tool_calls is None
        assert isinstance(choice.message.content, str)


def test_a_conversation_with_calls_and_results_goes_on(server: Server) -> None:
    first = server.ask("alpha", **{**REQUIRED, "tool_choice": {"type": "function", "function": {"name": "stop"}}})
    message = first.choices[0].message
    messages = [{"role": "user", "content": "Hello"}, message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "stopped"} for call in message.tool_calls]
    completion = server.ask("alpha", messages=messages, **REQUIRED)
    assert completion.usage.prompt_tokens > first.usage.prompt_tokens
    assert check_calls(completion.choices[0].message.tool_calls)


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_fits_the_json_schema(server: Server, stream: bool) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    reply = server.ask("beta", response_format=schema, max_tokens=120, stream=stream, temperature=1.0, seed=2)
    text = (
        "".join(chunk.choices[0].delta.content or "" for chunk in reply) if stream else reply.choices[0].message.content
    )
    jsonschema.validate(json.loads(text), WEATHER)
    reply = server.ask("beta", response_format={"type": "json_object"}, max_tokens=40)
    assert isinstance(json.loads(reply.choices[0].message.content), dict)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({**REQUIRED, "max_tokens": 3}, "max_tokens", "max_tokens"),
        ({**REQUIRED, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice", "'fly'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}}},
            "response_format",
            "No value fits",
        ),
    ],
    ids=["too few tokens", "unknown tool", "impossible schema"],
)
def test_what_no_reply_can_follow_is_refused_before_it_is_decoded(
    server: Server, fields: dict[str, Any], param: str, words: str
) -> None:
    passes = server.engine.passes
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        server.ask("alpha", **fields)
    assert caught.value.param == param
    assert server.engine.passes == passes


def test_a_call_with_a_fault_is_text_and_no_call(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the grammar cannot hold a model, what it says is checked."""
    monkeypatch.setattr("poe.chat.ReplyPlan.make_constraint", lambda self, tokens: None)
    texts: list[str] = []
    add = Choice.add

    def say(choice: Choice, piece: Any) -> Any:
        return add(choice, type(piece)(texts.pop(0) if texts else "", piece.scores))

    monkeypatch.setattr(Choice, "add", say)
    for text in (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>',
        '<tool_call>\n{"name": "launch", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}}}}}\n</tool_call>',
    ):
        texts[:] = [text[:20], text[20:]]
        choice = server.ask("alpha", tools=TOOLS, max_tokens=8).choices[0]
        assert choice.message.tool_calls is None
        assert choice.message.content
        assert choice.finish_reason != "tool_calls"
