"""The demo world is reproducible, its splits are disjoint, and its answers are correct."""

import hashlib
import itertools
import json
import re
from random import Random

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from conftest import demo_tokenizer, render_one
from poe.calls.arguments import check_call
from poe.calls.forms.call_forms import CALL_FORMS
from poe.calls.forms.tool_forms import TOOL_FORMS
from poe.calls.schema import lint_schema
from poe.data.drops import DropReport
from poe.data.readers import demo
from poe.data.render import Renderer
from poe.data.text import documents
from poe.demo import notations, words
from poe.demo.conversations import Split, make_conversation
from poe.demo.notations import make_notations
from poe.demo.text import KEYS, make_text
from poe.demo.tokenizer import SPECIAL_TOKENS
from poe.demo.world import HELD_OUT_TOOLS, KINDS, TRAIN_TOOLS, make_tool
from poe.loaders.repository import EMBEDDED_BASE

SPLITS: tuple[Split, ...] = ("train", "unseen_values", "unseen_tools")


def test_hundreds_of_tools_and_none_is_both_trained_and_held_out() -> None:
    assert len(TRAIN_TOOLS) > 400
    assert len(HELD_OUT_TOOLS) > 100
    assert not {t.noun for t in TRAIN_TOOLS} & {t.noun for t in HELD_OUT_TOOLS}
    assert {k.type for k in KINDS} == {"string", "integer", "number", "boolean", "array"}
    assert any(k.enum for k in KINDS)


def test_every_tool_is_json_schema() -> None:
    for tool in TRAIN_TOOLS + HELD_OUT_TOOLS:
        assert lint_schema(tool.schema()["function"]["parameters"]) is None


@given(st.integers(0, 10**6), st.sampled_from(SPLITS))
def test_rows_are_reproducible_and_every_call_fits_its_tool(index: int, split: Split) -> None:
    row = make_conversation(index, split)
    assert row == make_conversation(index, split)
    names = [t["function"]["name"] for t in row.tools]
    assert len(set(names)) == len(names)
    for message in row.messages:
        for call in message.get("tool_calls") or []:
            function = call["function"]
            assert check_call(row.tools, function["name"], function["arguments"]) is None
            declared = next(t["function"] for t in row.tools if t["function"]["name"] == function["name"])
            order = [p for p in declared["parameters"]["properties"] if p in function["arguments"]]
            assert list(function["arguments"]) == order


@given(st.integers(0, 10**6))
def test_training_rows_and_texts_contain_nothing_held_out(index: int) -> None:
    row = make_conversation(index)
    assert not {t["function"]["name"].split("_", 1)[1] for t in row.tools} & set(words.HELD_OUT_NOUNS)
    open_names = {name for kind in KINDS if kind.open for name in kind.names}
    for message in row.messages:
        for call in message.get("tool_calls") or []:
            for name, value in call["function"]["arguments"].items():
                if name in open_names:
                    assert not any(words.is_held_out(v) for v in (value if isinstance(value, list) else [value]))
    text = make_text(index).text
    assert "<tool_call>" not in text
    assert not {t.name for t in HELD_OUT_TOOLS} & set(re.findall(r"[a-z]+_[a-z]+", text))


@given(st.integers(0, 10**6))
def test_marked_answers_follow_from_the_text_before_them(index: int) -> None:
    text, answers, _ = make_text(index)
    assert answers
    for start, end in answers:
        assert text[:end].endswith(("\nEnd.\n", "<|assistant_end|>"))
        answer = text[start:end].removesuffix("<|assistant_end|>")
        known = {"do", "no", "form", "fits", "true", "false", "End", *itertools.chain(*KEYS)}
        for word in re.findall(r"[A-Za-z]+|\d+", answer):
            assert word in known or word in text[:start] or answer.startswith('{"do"')


def test_the_texts_of_the_embedded_base_do_not_change() -> None:
    digest = hashlib.blake2b(digest_size=8)
    for i, easy in itertools.product(range(100), (0.0, 0.8)):
        text, answers, _ = make_text(i, seed=i % 3, easy=easy)
        digest.update(f"Text({text=}, {answers=})".encode())
    assert digest.hexdigest() == "76c8a021bd387ad1"


@given(st.integers(0, 10**6))
def test_notations_are_reproducible_and_contain_nothing_held_out(index: int) -> None:
    text, answers, _ = written = make_notations(index)
    assert written == make_notations(index)
    assert answers
    assert not {t.name for t in HELD_OUT_TOOLS} & set(re.findall(r"[a-z]+_[a-z]+", text))
    descriptions = {t.description for t in HELD_OUT_TOOLS}
    assert not descriptions & set(re.findall(r"[A-Z][a-z]+ an? [a-z]+", text))
    assert all(text[:end].endswith(("\nEnd.\n", "<|assistant_end|>")) for _, end in answers)


@given(st.integers(0, 10**6), st.booleans())
def test_calls_are_written_in_the_form_of_the_prompt(index: int, chat: bool) -> None:
    text, answers, _ = notations.make_calls(Random(index), chat)
    expected = [form for form in CALL_FORMS.values() if any(request in text for request in form.request)]
    assert len(expected) == 1
    for start, end in answers:
        answer = text[start:end].removesuffix("<|assistant_end|>").removesuffix("\nEnd.\n")
        reply = expected[0].read(answer)
        assert not reply.malformed
        assert (reply.content, bool(reply.calls)) in (("", True), ("no form fits", False))
        for call in reply.calls:
            assert all(re.search(rf"\b{name}\b", text[:start]) for name in (call.name, *call.arguments))


def test_every_notation_occurs_and_the_documents_fit_in_a_row() -> None:
    texts = [make_notations(i).text for i in range(1000)]
    requests = {name: sum(any(r in t for r in form.request) for t in texts) for name, form in CALL_FORMS.items()}
    assert min(requests.values()) > 30, requests
    begins = ('\n"name"', '\n  "name"', '\n    "name"', '[{"name"', '[{"type"', "<tools>\n", "def ", "type ")
    assert len(begins) == len(TOOL_FORMS) - 1  # a tool alone on its line looks like any JSON
    assert all(sum(begin in t for t in texts) > 30 for begin in begins)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    assert sum(length > 512 for length in lengths) < 0.02 * len(texts)


def test_text_sources_are_mixed_by_weight() -> None:
    given = itertools.islice(documents("demo:2,notations", seed=5), 600)
    kinds = {make_text(i, seed=5).text: "demo" for i in range(600)}
    characters = {"demo": 0, "notations": 0}
    for document in given:
        characters[kinds.get(document.text, "notations")] += len(document.text)
    assert 1.9 < characters["demo"] / characters["notations"] < 2.1


def test_held_out_rows_use_new_values_and_new_tools() -> None:
    splits = demo.evaluation_splits(50)
    held_out = {t.name for t in HELD_OUT_TOOLS}
    assert all(t["function"]["name"] in held_out for row in splits["unseen tools"] for t in row.tools)
    trained = {json.dumps(make_conversation(i).messages) for i in range(3000)}
    assert not any(json.dumps(row.messages) in trained for rows in splits.values() for row in rows)
    assert not any(m.get("tool_calls") for row in splits["no tool fits"] for m in row.messages)


def test_the_reader_takes_a_number_of_rows() -> None:
    report = DropReport()
    assert len(list(demo.read("25", report))) == 25
    assert report.kept["demo"] == 25


def test_the_template_trains_exactly_the_assistant_and_its_stop_token() -> None:
    tokenizer = demo_tokenizer()
    renderer = Renderer(tokenizer)
    for index in range(40):
        row = make_conversation(index)
        rendered = render_one(renderer, row)
        trained = tokenizer.decode([i for i, m in zip(rendered.input_ids, rendered.loss_mask, strict=True) if m])
        expected = ""
        for message in row.messages:
            if message["role"] == "assistant":
                expected += message["content"] or ""
                for call in message.get("tool_calls") or []:
                    function = call["function"]
                    body = (
                        f'{{"name": {json.dumps(function["name"])}, "arguments": {json.dumps(function["arguments"])}}}'
                    )
                    expected += f"<tool_call>{body}</tool_call>"
                expected += SPECIAL_TOKENS[1]
        assert trained == expected


def test_a_tool_depends_only_on_its_name_and_a_word_on_its_letters() -> None:
    assert make_tool("book", "flight") == make_tool("book", "flight")
    tokenizer = demo_tokenizer()
    inside = [tokenizer.encode(text, add_special_tokens=False) for text in ("_table", ' "table"', " table,")]
    word = tokenizer.encode("table", add_special_tokens=False)
    for ids in inside:
        assert any(ids[i : i + len(word)] == word for i in range(len(ids)))
