"""Random conversations in the templates of public families: text is text, and only the assistant is trained."""

import json
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from chat_families import ALL_MARKS, FAMILIES, family
from conftest import mostly_slow
from poe.calls.conversation import Conversation, PromptForm
from poe.data.encoding import control_tokens
from poe.data.render import RenderedRow, Renderer
from poe.errors import DataError, RowError

QUICK = ["mistral-v3"]
TWO_CALLS = ("llama-3.1",)  # refuses them

pieces = st.one_of(
    st.sampled_from(ALL_MARKS),
    st.sampled_from(["<|im_", "end|>", "<", "|>", "</", "[INST]", "<<SYS>>", "\n\nAssistant:", "<｜end", "</think>"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=8),
    st.sampled_from([" ", "\n", "  \n", "a", "é日🙂", "e\u0301", '"', "\\", "{}"]),
)
texts = st.lists(pieces, max_size=5).map("".join)
names = st.sampled_from(["find_fox", "s", "im_end", "tool_call", "|im_end|", "a<|im_end|>", "/s", "user"])


@st.composite
def conversations(draw: Any) -> Conversation:
    """Draw a conversation. Most contents begin and end with a word that shows who wrote them."""
    count = 0

    def write(who: str) -> str:
        nonlocal count
        count += 1
        text = draw(texts)
        return text if draw(st.integers(0, 5)) == 0 else f"{who}{count}b {text} {who}{count}e"

    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": write("sys")})
    key, name = draw(names), draw(names)
    schema = {"type": "object", "properties": {key: {"type": "string", "description": write("tool")}}}
    function = {"name": name, "description": write("tool"), "parameters": schema}
    tools = [{"type": "function", "function": function}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": write("usr")})
        if tools and draw(st.booleans()):
            ids = [f"call_{count}_{i}" for i in range(draw(st.integers(1, 2)))]
            calls = [
                {"id": i, "type": "function", "function": {"name": name, "arguments": {key: write("said")}}}
                for i in ids
            ]
            content = draw(st.sampled_from([None, ""]))
            messages.append({"role": "assistant", "content": content, "tool_calls": calls})
            for i in draw(st.permutations(ids)):
                messages.append({"role": "tool", "tool_call_id": i, "name": name, "content": write("res")})
        messages.append({"role": "assistant", "content": write("said")})
    form = draw(st.sampled_from([None, None, PromptForm(), PromptForm(calls="xlam", place="user")])) if tools else None
    return Conversation(messages, tools, form=form)


HARMLESS = {"s": "ss", "/s": "ss", "im_end": "imend", "|im_end|": "imend", "tool_call": "toolcall", "user": "usr"}


def spell(text: str) -> str:
    """Return a text as it is after tokenization: normalized, and with spaces for the marks of spaces."""
    return unicodedata.normalize("NFC", text.replace("▁", " "))


def words(text: str) -> list[str]:
    return re.findall(r"(?:sys|tool|usr|res|said)\d+[be]", text)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for member in value.values() for text in strings(member))
    elif isinstance(value, list):
        yield from (text for member in value for text in strings(member))


def without_marks(value: Any) -> Any:
    """Return a conversation's part with harmless letters for every control token of any family."""
    if isinstance(value, str):
        for token in ALL_MARKS:
            value = value.replace(token, "xx")
        return HARMLESS.get(value, value)
    if isinstance(value, dict):
        return {
            (key if key in ("role", "name", "type") or not isinstance(key, str) else without_marks(key)): (
                member if key in ("role", "type") else without_marks(member)
            )
            for key, member in value.items()
        }
    return [without_marks(member) for member in value] if isinstance(value, list) else value


def controls(renderer: Renderer, ids: list[int]) -> list[int]:
    known = set(control_tokens(renderer.tokenizer).values())
    return [number for number in ids if number in known]


@cache
def renderer_of(name: str) -> Renderer:
    return Renderer(family(name))


def check(name: str, row: Conversation) -> None:
    renderer = renderer_of(name)
    tokenizer = renderer.tokenizer
    try:
        rendered = renderer.render(row)
    except RowError:
        assert row.form is not None  # the call form cannot hold the text
        return
    except DataError:
        assert name in TWO_CALLS
        assert any(len(m.get("tool_calls") or ()) > 1 for m in row.messages)
        return
    # no forged turn: the same conversation with harmless letters has the same control tokens
    plain = Conversation(without_marks(row.messages), without_marks(row.tools), form=row.form)
    expected = [controls(renderer, part.input_ids) for part in renderer.render(plain)]
    assert [controls(renderer, part.input_ids) for part in rendered] == expected
    # text round-trips
    for part in rendered:
        assert spell(tokenizer.decode(part.input_ids, clean_up_tokenization_spaces=False)) == spell(part.text)
    whole = "".join(part.text for part in rendered)
    for message in row.messages:
        content = message.get("content") or ""
        if message["role"] != "assistant" or not content.lstrip().startswith("<think>"):
            spellings = (content.strip(), json.dumps(content.strip(), ensure_ascii=False)[1:-1])
            assert any(spelling in whole for spelling in spellings), content
    # masks cover the assistant's turns and nothing else, and each turn is trained once
    answers = [w for m in row.messages if m["role"] == "assistant" for text in strings([m.get("content"), *(
        call["function"]["arguments"] for call in m.get("tool_calls") or ())]) for w in words(text)]  # fmt: skip
    assert [w for part in rendered for w in words(masked(tokenizer, part, True))] == answers
    for part in rendered:
        others = words(masked(tokenizer, part, False))
        assert not [w for w in others if w.startswith("said") and w not in answers]
        assert len(rendered) > 1 or not [w for w in others if w.startswith("said")]
    # prompts are prefixes of rows
    for i, message in enumerate(row.messages):
        if message["role"] == "assistant":
            prompt, ids = (f(row.messages[:i], row.tools, row.form) for f in (renderer.prompt, renderer.prompt_ids))
            assert spell(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) == spell(prompt)
            marks = controls(renderer, ids)
            assert any(part.text.startswith(prompt) for part in rendered)
            assert any(controls(renderer, part.input_ids)[: len(marks)] == marks for part in rendered)


def masked(tokenizer: Any, part: RenderedRow, trained: bool) -> str:
    """Return the text of the tokens that are trained (or not), with a gap between runs."""
    runs, last = [""], None
    for i, is_trained in enumerate(part.loss_mask):
        if is_trained != last:
            runs.append("")
            start = i
        last = is_trained
        if i + 1 == len(part.loss_mask) or part.loss_mask[i + 1] != is_trained:
            runs[-1] = tokenizer.decode(part.input_ids[start : i + 1]) if is_trained == trained else ""
    return "\n".join(runs)


@pytest.mark.parametrize("name", mostly_slow(FAMILIES, QUICK))
def test_text_is_text_and_only_the_assistant_is_trained(name: str, request: pytest.FixtureRequest) -> None:
    slow = request.node.get_closest_marker("slow") is not None

    @seed(15)
    @given(conversations())
    @settings(
        max_examples=30 if slow else 12,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(row: Conversation) -> None:
        check(name, row)

    run()
