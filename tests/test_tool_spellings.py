"""A tool in any system's spelling becomes the same canonical tool, for readers, commands and Python alike."""

import json
from typing import Any

import pytest

from command_line import run_program
from poe.calls.conversation import Call
from poe.calls.tools import check_calls, read_tools
from poe.data.readers import glaive, hermes, messages
from poe.data.render import Renderer
from poe.errors import RowError
from test_readers import kept, reason

NAME, ABOUT = "get_weather", "Say the weather"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Where"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOL = {"type": "function", "function": {"name": NAME, "description": ABOUT, "parameters": SCHEMA}}
PLAIN = {"name": NAME, "description": ABOUT}
MATRIX = {"type": "object", "properties": {"a": {"type": "matrix"}}}
GEMINI = {
    "type": "OBJECT",
    "properties": {"city": {"type": "STRING", "description": "Where"}, "days": {"type": "INTEGER"}},
    "required": ["city"],
}
FLAT = {"city": {"description": "Where", "type": "str", "required": True}, "days": {"type": "int", "required": False}}
XLAM = {"city": {"type": "str", "description": "Where"}, "days": {"type": "int, optional"}}
PROPERTIES_TEXT = json.dumps(SCHEMA["properties"])
BARE = {"title": NAME, "description": ABOUT, **SCHEMA}
MCP = {**PLAIN, "title": "Weather", "inputSchema": SCHEMA, "annotations": {"readOnlyHint": True}}
SPELLINGS: dict[str, Any] = {
    "OpenAI chat": TOOL,
    "OpenAI chat, nulls of Arrow": {**TOOL, "strict": None, "function": {**TOOL["function"], "strict": None}},
    "OpenAI chat, schema as text": {"type": "function", "function": {**PLAIN, "parameters": json.dumps(SCHEMA)}},
    "OpenAI chat, function as text": {"type": "function", "function": json.dumps(TOOL["function"])},
    "OpenAI chat, properties as text": {**PLAIN, "parameters": {**SCHEMA, "properties": PROPERTIES_TEXT}},
    "OpenAI responses": {"type": "function", **PLAIN, "parameters": SCHEMA, "strict": True},
    "older functions": {**PLAIN, "parameters": SCHEMA},
    "Anthropic": {**PLAIN, "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}},
    "Anthropic, custom": {"type": "custom", **PLAIN, "input_schema": SCHEMA},
    "Anthropic and others, nulls of Arrow": {**PLAIN, "parameters": None, "input_schema": SCHEMA, "inputSchema": None},
    "MCP": MCP,
    "Gemini": {"function_declarations": [{**PLAIN, "parameters": GEMINI}]},
    "Gemini, camel case and JSON Schema": {"functionDeclarations": [{**PLAIN, "parametersJsonSchema": SCHEMA}]},
    "Bedrock": {"toolSpec": {**PLAIN, "inputSchema": {"json": SCHEMA}}},
    "Cohere": {**PLAIN, "parameter_definitions": FLAT},
    "xLAM": {**PLAIN, "parameters": XLAM},
    "smolagents": {**PLAIN, "inputs": FLAT},
    "Qwen-Agent": {**PLAIN, "parameters": [{"name": name, **parameter} for name, parameter in FLAT.items()]},
    "JSON Schema": BARE,
    "JSON Schema with a name": {"name": NAME, "description": ABOUT, **SCHEMA},
    "zod": {**PLAIN, "parameters": {"$ref": "#/definitions/W", "definitions": {"W": SCHEMA}}},
    "required beside the parameters": {**PLAIN, "parameters": {**SCHEMA, "required": None}, "required": ["city"]},
    "one of several parts": {**PLAIN, "parameters": {"allOf": [SCHEMA]}},
}  # fmt: skip


def without_definitions(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for tool in tools:
        tool["function"]["parameters"].pop("definitions", None)
    return tools


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_tool(spelling: str) -> None:
    tool = SPELLINGS[spelling]
    for given in ([tool], tool, {"tools": [tool]}, json.dumps([tool]), [json.dumps(tool)]):
        assert without_definitions(read_tools(given)) == [TOOL]


def test_a_whole_result_or_request_holds_its_tools() -> None:
    listed = {"jsonrpc": "2.0", "id": 1, "result": {"tools": [MCP], "nextCursor": None}}
    request = {"model": "m", "functions": [SPELLINGS["older functions"]]}
    config = {"toolConfig": {"tools": [SPELLINGS["Bedrock"]], "toolChoice": {"auto": {}}}}
    for given in (listed, request, config, [SPELLINGS["Gemini"], {"function_declarations": []}]):
        assert read_tools(given) == [TOOL]
    assert [read_tools(nothing) for nothing in (None, [], {}, "", "[]", "null")] == [[]] * 6


def test_python_functions_and_classes_are_tools() -> None:
    def get_weather(city: str, days: int = 1) -> str:
        """Say the weather

        Args:
            city: Where
            days: How many
        """
        return city + str(days)

    (tool,) = read_tools([get_weather])
    assert tool["function"]["name"] == NAME
    assert tool["function"]["parameters"]["properties"]["city"] == {"type": "string", "description": "Where"}
    assert tool["function"]["parameters"]["required"] == ["city"]
    with pytest.raises(RowError, match=r"tools\[0\]: Python function that does not describe a tool"):
        read_tools([lambda x: x])

    class Listed:  # as the classes of the MCP and Google SDKs
        def model_dump(self, **options: Any) -> Any:
            return {"tools": [MCP]}

    assert read_tools(Listed()) == [TOOL]

    class Arguments:  # as a class of Pydantic
        @classmethod
        def model_json_schema(cls) -> Any:
            return BARE

    assert read_tools([Arguments]) == [TOOL]


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({"type": "function", "function": None}, "tool: tool is not an object"),
        ([TOOL, {"type": "function", "function": None}], "tools[1]: tool is not an object"),
        ([TOOL, 5], "tools[1]: tool is not an object"),
        ([{"type": "web_search"}], "tools[0]: tool that is not a function"),
        ([{"type": "custom", "name": "f", "format": {"type": "text"}}], "tools[0] 'f': tool that is not a function"),
        ([{"name": "f", "parameters": MATRIX}],
         "tools[0].parameters.properties.a.type of 'f': tool schema with an unknown type ('matrix')"),
        ([{"name": "f", "arguments": FLAT}], "tools[0] 'f': tool with parameters under an unknown key ('arguments')"),
        ([{"name": "f", "schema": SCHEMA}], "tools[0] 'f': tool with parameters under an unknown key ('schema')"),
        ([{"name": "f", "parameters": SCHEMA, "input_schema": BARE}], "tools[0] 'f': tool with two parameter schemas"),
        ({"result": {"tools": [TOOL, {"inputSchema": SCHEMA}]}}, "result.tools[1]: tool without a usable name"),
        ([{"functionDeclarations": [{"parameters": "{"}]}], "tools[0].functionDeclarations[0]: parameters not JSON"),
        ([{"name": "f", "parameters": '{"a": 1, "a": 2}'}], "tools[0] 'f': parameters with one key twice"),
        ([TOOL, {**PLAIN, "input_schema": {}}], "one tool name, two definitions"),
        ("[" * 10_000, "tools not JSON"),
        ({"a": 1}, "tools are not a list"),
    ],
)  # fmt: skip
def test_an_unreadable_tool_is_one_error_with_its_place(tools: Any, message: str) -> None:
    with pytest.raises(RowError) as error:
        read_tools(tools)
    assert str(error.value) == message
    assert error.value.reason in message


@pytest.mark.parametrize("spelling", ["Anthropic", "MCP", "Gemini", "Cohere", "Bedrock", "JSON Schema"])
def test_readers_read_every_spelling(spelling: str) -> None:
    tool = SPELLINGS[spelling]
    call = {"name": NAME, "arguments": {"days": 3, "city": "Oslo"}}
    question = {"from": "human", "value": "Weather?"}
    rows = [
        (
            messages,
            {"messages": [{"role": "user", "content": "Weather?"}, {"role": "assistant", "tool_calls": [call]}]},
        ),
        (hermes, {"conversations": [question, {"from": "gpt", "value": f"<tool_call>{json.dumps(call)}</tool_call>"}]}),
        (glaive, {"conversations": [question, {"from": "function_call", "value": json.dumps(call)}]}),
    ]
    for reader, row in rows:
        for tools in ([tool], json.dumps([tool])):
            conversation, _ = kept(reader, {**row, "tools": tools})
            assert conversation.tools == [TOOL]
            assert list(conversation.messages[1]["tool_calls"][0]["function"]["arguments"]) == ["city", "days"]
        assert reason(reader, {**row, "tools": [{**PLAIN, "schema": SCHEMA}]}).startswith("tool with parameters under")


def test_prompts_and_checks_take_every_spelling(demo_tokens: Renderer) -> None:
    question = [{"role": "user", "content": "Weather?"}]
    prompt = demo_tokens.prompt(question, [TOOL])
    for tools in ([MCP], {"tools": [MCP]}, [SPELLINGS["Anthropic"]], SPELLINGS["Gemini"]):
        assert demo_tokens.prompt(question, tools) == prompt
        assert check_calls([Call(NAME, {"city": "Oslo"})], tools) == []
        assert check_calls([Call(NAME, {})], tools) == [f"{NAME}: arguments.city: required argument missing"]


@pytest.fixture(scope="module")
def demo_tokens() -> Renderer:
    from conftest import demo_tokenizer

    return Renderer(demo_tokenizer())


def test_a_tools_file_that_cannot_be_used_is_one_message(tmp_path: Any) -> None:
    from poe.calls.tool_files import read_tools_file
    from poe.errors import DataError

    path = tmp_path / "tools.json"
    for content, message in (
        (json.dumps([TOOL, {"type": "function", "function": None}]), r"tools\[1\]: tool is not an object"),
        ("[" * 100_000, "tools not JSON"),
        ("[]", "holds no tools"),
        ('[{"name": "a", "name": "b"}]', "tools with one key twice"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message) as error:
            read_tools_file(path)
        assert str(path) in str(error.value)
    path.write_bytes(b"\xff\xfe[")
    with pytest.raises(DataError, match="cannot be used"):
        read_tools_file(path)
    path.write_text("\ufeff" + json.dumps({"tools": [MCP]}), encoding="utf-8")
    assert read_tools_file(path) == [TOOL]


@pytest.mark.slow
def test_the_command_names_the_tool_that_it_cannot_use(tmp_path: Any) -> None:
    (tmp_path / "tools.json").write_text(json.dumps([{"type": "function", "function": None}]))
    run = run_program("poe", "call", "demo", "Weather?", "--tools", "tools.json", cwd=tmp_path)
    assert run.returncode == 1
    assert "tools[0]: tool is not an object" in run.stderr
    assert "Traceback" not in run.stderr
