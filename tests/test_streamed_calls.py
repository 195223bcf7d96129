"""A reply that arrives in pieces gives the same text, calls and faults as the whole, at the earliest moment."""

import itertools
import random
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from poe.calls.conversation import Call
from poe.calls.faults import Fault, FaultKind
from poe.calls.forms.call_forms import CALL_FORMS, parse_reply
from poe.calls.reading import Source
from poe.calls.streaming import CallPart, ReplyReader, TextPart, join_parts
from poe.errors import DataError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from replies import INSERTS, cut, mutate, random_reply

every_form = pytest.mark.parametrize("form", CALL_FORMS.values(), ids=lambda form: form.name)
CALL = Call("f", {"x": "it's"})


def read_pieces(form, pieces, tools=None):
    reader = ReplyReader(form, tools)
    return [part for piece in pieces for part in reader.feed(piece)] + reader.close()


@every_form
@given(
    text=st.text() | st.lists(st.sampled_from(INSERTS), max_size=30).map("".join), cuts=st.lists(st.integers(0, 200))
)
@example(text='<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"', cuts=[4, 30])
@example(text='{"a": x} {"a" is <tool_call>{"name": "f"}', cuts=[3, 9, 20])
@settings(max_examples=40, deadline=None)
def test_any_cutting_gives_the_same_reply(form, text, cuts):
    points = sorted({0, len(text), *(point % (len(text) + 1) for point in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(points)]
    whole = parse_reply(text, form.name)
    assert join_parts(read_pieces(form.name, pieces)) == whole
    assert join_parts(read_pieces(form.name, text)) == whole


@every_form
def test_mutated_calls_are_read_alike_in_pieces(form):
    rng = random.Random(17)
    for _ in range(150):
        text = mutate(rng, random_reply(rng, form))
        assert join_parts(read_pieces(form.name, cut(rng, text))) == parse_reply(text, form.name), text


@every_form
def test_a_call_is_returned_the_moment_it_closes(form):
    written = form.write([CALL])
    reader = ReplyReader(form.name)
    early = [part for character in written[:-1] for part in reader.feed(character)]
    assert early == []
    assert reader.feed(written[-1]) == [CallPart(CALL)]


def test_text_and_parallel_calls_come_in_order():
    calls = [CallPart(Call("f", {"n": n})) for n in (1, 2)]
    text = "One.\n" + "\nand ".join(CALL_FORMS["hermes"].write([part.call]) for part in calls) + " Done. "
    assert read_pieces("hermes", [text]) == [
        TextPart("One."), calls[0], TextPart("\n\nand"), calls[1], TextPart("  Done."),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "text"),
    [("hermes", "a <tool"), ("glaive", "a <functioncal"), ("mistral", "a [TOOL_CALLS"), ("xlam", 'a [{ '),
     ("llama", "a <|python"), ("openai", "a {"), ("python", "a [name.of(x ")],
)  # fmt: skip
def test_a_possible_beginning_of_a_call_is_held_back(form, text):
    reader = ReplyReader(form)
    assert reader.feed(text) == [TextPart("a")]
    assert reader.feed(" is none") == [TextPart(f"{text} is none"[1:])]
    assert reader.close() == []


@pytest.mark.parametrize(
    ("form", "text", "kind"),
    [
        ("hermes", '<tool_call>{"name": "f", "argum', FaultKind.UNCLOSED),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_', FaultKind.UNCLOSED),
        ("hermes", "<tool_call>f(x=1)</tool_call>", FaultKind.NOT_JSON),
        ("hermes", '<tool_call>{"name": "f", "parameters": {}}</tool_call>', FaultKind.NOT_A_CALL),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}} so</tool_call>', FaultKind.TEXT_IN_CALL),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}}</tool_call>', FaultKind.BRACE_LOOP),
        ("hermes", '<tool_call>{"name": "f", "arguments": \'{"x": 1}\'}</tool_call>', FaultKind.QUOTED_ARGUMENTS),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1, "x": 2}}</tool_call>', FaultKind.DUPLICATE_KEY),
        ("hermes", f'<tool_call>{{"name": "f", "arguments": {"[" * 101}', FaultKind.TOO_DEEP),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', FaultKind.INVALID_VALUE),
        ("glaive", '<functioncall> {"name": "f", "arguments": \'{"x": "it\\\'s"}\'}', FaultKind.NOT_JSON),
        ("mistral", "[TOOL_CALLS] []", FaultKind.NOT_A_CALL),
        ("xlam", '[{"name": "f", "arguments": {"x": 1, "x": 2}}]', FaultKind.DUPLICATE_KEY),
        ("xlam", '[{"name": "f", "arguments": {"x": ', FaultKind.UNCLOSED),
        ("llama", '{"name": "f", "parameters": {"x": yes}}', FaultKind.NOT_JSON),
        ("openai", '{"tool_calls": [{"function": {"name": "f", "arguments": "x=1"}}]}', FaultKind.NOT_JSON),
        ("python", "[f(x=y)]", FaultKind.NOT_A_CALL),
        ("python", "[f(x=true or)]", FaultKind.NOT_PYTHON),
        ("python", "[f(x=1", FaultKind.UNCLOSED),
    ],
)  # fmt: skip
def test_faults_have_names(form, text, kind):
    (fault,) = parse_reply(f"So: {text}", form).faults
    assert fault.kind == kind
    assert fault.text in text


@pytest.mark.parametrize("form", ["glaive", "mistral", "xlam", "llama", "openai", "python"])
def test_closing_brackets_again_and_again_are_a_fault_beside_the_call(form):
    reply = parse_reply(CALL_FORMS[form].write([CALL]) + "]}]}]}]} ", form)
    assert (reply.content, reply.calls, reply.faults) == ("", [CALL], [Fault(FaultKind.BRACE_LOOP, "]}]}]}]}")])


def test_a_broken_object_of_a_form_without_marks_ends_with_its_bracket():
    written = CALL_FORMS["xlam"].write([CALL])
    reply = parse_reply(f'In JavaScript {{"a": x}} is an object. {written}', "xlam")
    assert (reply.content, reply.calls, reply.faults) == ('In JavaScript {"a": x} is an object.', [CALL], [])


def test_the_tools_give_the_faults_of_a_call():
    tools = [{"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}]
    calls = [CALL, Call("f", {"x": 1}), Call("g", {}), Call("f", '{"x": 1}')]
    parts = read_pieces("hermes", CALL_FORMS["hermes"].write(calls), tools)
    kinds = [[fault.kind for fault in part.faults] for part in parts if isinstance(part, CallPart)]
    assert kinds == [[FaultKind.INVALID_ARGUMENTS], [], [FaultKind.UNKNOWN_TOOL], [FaultKind.QUOTED_ARGUMENTS]]


def test_a_closed_reader_takes_no_more_text():
    reader = ReplyReader("hermes")
    assert reader.close() == reader.close() == []
    with pytest.raises(DataError, match="closed"):
        reader.feed("x")


def count_work(form, pieces, monkeypatch):
    """Return the number of characters that are looked at, for the first time or again, or copied."""
    work = 0
    feed, held, rewind = Source.feed, Source.held, Source.rewind

    def count_feed(source, text):
        nonlocal work
        feed(source, text)
        work += len(source.window)

    def count_held(source):
        nonlocal work
        work += source.count
        return held(source)

    def count_rewind(source):
        nonlocal work
        work += source.count
        rewind(source)

    with monkeypatch.context() as patch:
        for name, method in (("feed", count_feed), ("held", count_held), ("rewind", count_rewind)):
            patch.setattr(Source, name, method)
        read_pieces(form, pieces)
    return work


HARD = (
    *("<tool_call>[", '<tool_call>{"a": "', '<functioncall> {"name": "f", "arguments": \'', '{"a" ', '{"name": "f", '),
    *(
        '["<tool_call>[\\"", ',
        "[f(a=",
        "[f(a='",
        " ",
        "}",
        "x",
        '{"a": 1} ',
        "[TOOL_CALLS] [1, ",
        "</tool_call>",
        "[a.",
    ),
)


@every_form
@pytest.mark.parametrize("size", [1, 400], ids=["by character", "in large pieces"])
def test_twice_the_text_is_twice_the_work(form, size, monkeypatch):
    for unit in (*HARD, form.write([CALL]) + "\n", form.write([Call("f", {"x": "y" * 50 + '"' * 9})])[:-9]):
        work = []
        for count in (1, 2):
            text = unit * (count * 800 // len(unit))
            work.append(count_work(form.name, [text[i : i + size] for i in range(0, len(text), size)], monkeypatch))
        assert work[1] < 2.2 * work[0] + 500, (unit, work)
