"""Every call form reads back what it writes, and parses any other text without guessing or failing."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from poe.calls.conversation import Call
from poe.calls.forms.base import Reply
from poe.calls.forms.call_forms import CALL_FORMS, call_form
from poe.errors import DataError, RowError

FORMS = list(CALL_FORMS.values())
MARKED = [CALL_FORMS[name] for name in ("hermes", "glaive", "mistral")]
BARE = [form for form in FORMS if form not in MARKED]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
thorough = settings(max_examples=60, deadline=None)

MARKS = (
    "<tool_call>", "</tool_call>", "<functioncall>", "[TOOL_CALLS]", "<|python_tag|>", '{"name": "f", "arguments": {}}',
    "'}", "it's", "\"\"\"", "\\'", "\n", "; ", "[f(a=1)]", "<|endoftext|>", "]", "}", "{", '{"tool_calls": [',
)  # fmt: skip
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.lists(
    st.sampled_from(MARKS), max_size=4
).map("".join)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=8)
words = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).map(lambda word: f"x{word}")
any_calls = st.lists(st.builds(Call, texts, st.dictionaries(texts, values, max_size=3)), min_size=1, max_size=4)
python_calls = st.lists(st.builds(Call, words, st.dictionaries(words, values, max_size=3)), min_size=1, max_size=4)


def drawn(data, form):
    return data.draw(python_calls if form.name == "python" else any_calls)


@every_form
@given(data=st.data(), text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<[{"), max_size=30))
@thorough
def test_written_calls_are_read_back(form, data, text):
    calls = drawn(data, form)
    assert form.read(form.write(calls)) == Reply("", calls)
    assert form.read(form.write(calls, text)) == Reply(text.strip(), calls)
    assert form.read(f" \n{form.write(calls)}\n ") == Reply("", calls)
    assert form.write([], text) == text


@every_form
@given(data=st.data(), text=texts)
@thorough
def test_text_is_written_unless_it_looks_like_a_call(form, data, text):
    calls = drawn(data, form)
    try:
        written = form.write(calls, text)
    except RowError:
        # Only a mark, or a possible beginning of an unmarked call, is rejected. A bracket may open a list of calls.
        marks = ("<tool_call>", "<functioncall>", "[TOOL_CALLS]", "<|py", '{"', "[f(")
        assert any(mark in text for mark in marks) or text.rstrip().endswith("[")
    else:
        assert form.read(written) == Reply(text.strip(), calls)


@every_form
@given(data=st.data(), share=st.floats(0, 1))
@thorough
def test_a_truncated_reply_gives_no_wrong_calls(form, data, share):
    calls = drawn(data, form)
    written = form.write(calls)
    reply = form.read(written[: int(share * (len(written) - 1))])
    assert reply.calls == calls[: len(reply.calls)]
    assert len(reply.calls) < len(calls)


@every_form
def test_a_call_cut_off_after_its_name_is_malformed(form):
    written = form.write([Call("move", {"to": 'it\'s "there"', "by": [1, {"a": None}]})])
    for length in range(written.index("move") + len('move"'), len(written)):
        reply = form.read(written[:length])
        assert (reply.calls, len(reply.malformed)) == ([], 1), written[:length]


pieces = ("name", "arguments", "parameters", "tool_calls", "function", '"', ":", ",", "{", "}", "[", "]", "f(", ")",
          "a=", "1", "'", "\\", "NaN", "[TOOL_CALLS]", "<tool_call>", "</tool_call>", "<functioncall>", " ", "\n", ";",
          "<|python_tag|>", "\ud800", '{"name": "f", ', '"arguments": {', '"parameters": ')  # fmt: skip


@every_form
@given(text=st.text() | st.lists(st.sampled_from(pieces), max_size=40).map("".join))
@thorough
@example(text="[" * 100_000)
@example(text='{"a":' * 30_000)
@example(text='[{"name": ' * 20_000 + "}")
@example(text="[f(a=" * 20_000)
@example(text="<tool_call>[" * 20_000)
@example(text='<functioncall> {"name": "f", "arguments": \'' * 9_000)
@example(text='{"tool_calls": [{"function": {"name": "f", "arguments": "' + "[" * 9_000 + '"}}]}')
def test_any_text_is_parsed_without_inventing_calls(form, text):
    reply = form.read(text)
    for call in reply.calls:
        assert call.name in text
        assert form.read(form.write([call])).calls == [call]
    if form in MARKED and form.mark not in text:
        assert reply == Reply(text.strip())


PROSE = (
    "Use {braces} or [brackets] (or both), e.g. f(x), [f(x)], [1, 2] and {'a': 1}.",
    "The word tool_call, and functioncall, and TOOL_CALLS, are only words; so is [link](https://example.org).",
    'A person is {"name": "Ada", "born": 1815}; two are [{"name": "Ada"}, {"name": "Alan"}].',
    'In JavaScript {"name": x} is an object, {"a" is not, and [] is empty.',
    "[]",
    "",
)


@every_form
@pytest.mark.parametrize("text", PROSE)
def test_prose_is_not_read_as_a_call(form, text):
    assert form.read(text) == Reply(text)
    assert form.write([], text) == text


READ = [
    ("hermes", 'So:<tool_call>{"arguments":{"x":"</tool_call>"},"name":"f"}</tool_call>\n\ndone', "So:\n\ndone"),
    ("glaive", '<functioncall> {"name": "f", "arguments": {"x": "</tool_call>"}}', ""),
    ("glaive", "<functioncall>{\n\"name\":\"f\",\"arguments\": ' {\"x\": \"</tool_call>\"} '\n}", ""),
    ("xlam", 'Here:\n```json\n[\n  {"name": "f", "arguments": {"x": "</tool_call>"}}\n]\n```', "Here:\n```json\n\n```"),
    ("llama", '<|python_tag|> {"type": "function", "name": "f", "parameters": {"x": "</tool_call>"}}', ""),
    ("mistral", 'Well. [TOOL_CALLS][{"name": "f", "arguments": {"x": "</tool_call>"}, "id": "a1"}]', "Well."),
    ("openai", '{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": '
               '{"x": "</tool_call>"}}}]}', ""),
    ("openai", '{"content": "Hm.", "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", '
               '"arguments": "{\\"x\\": \\"</tool_call>\\"}"}}]}', "Hm."),
    ("python", "I call [ f(x = '</tool_call>') ].", "I call ."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "prose"), READ)
def test_replies_of_real_models_are_read(name, text, prose):
    assert call_form(name).read(text) == Reply(prose, [Call("f", {"x": "</tool_call>"})])


def test_several_calls_in_each_form():
    calls = [Call("f", {"x": "it's"}), Call("g", {})]
    assert {form.name: form.write(calls, "Both." if form in MARKED else "") for form in FORMS} == {
        "hermes": 'Both.\n<tool_call>\n{"name": "f", "arguments": {"x": "it\'s"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
        "glaive": 'Both.\n<functioncall> {"name": "f", "arguments": \'{"x": "it\'s"}\'}\n'
        '<functioncall> {"name": "g", "arguments": \'{}\'}',
        "mistral": 'Both.\n[TOOL_CALLS] [{"name": "f", "arguments": {"x": "it\'s"}}, {"name": "g", "arguments": {}}]',
        "xlam": '[{"name": "f", "arguments": {"x": "it\'s"}}, {"name": "g", "arguments": {}}]',
        "llama": '{"name": "f", "parameters": {"x": "it\'s"}}; {"name": "g", "parameters": {}}',
        "openai": json.dumps({"tool_calls": [call.as_openai(i) for i, call in enumerate(calls)]}),
        "python": '[f(x="it\'s"), g()]',
    }


@every_form
@pytest.mark.parametrize(
    "value",
    ["NaN", "-Infinity", "1e999", '{"a": 1, "a": 2}', '"\\ud800"', "[" * 70 + "]" * 70, "9" * 5000, "[" * 5000, "nope"],
    ids=lambda value: value[:18],
)
def test_invalid_values_make_a_call_malformed(form, value):
    if form.name == "python":
        written = f"[f(x={value})]"
    else:
        written = form.write([Call("f", {"x": "HERE"})])
        inside = json.dumps(value)[1:-1] if form.name == "openai" else value
        written = written.replace('\\"HERE\\"' if form.name == "openai" else '"HERE"', inside)
    assert "HERE" not in written
    reply = form.read(written)
    assert (reply.calls, len(reply.malformed)) == ([], 1)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {}, "why": "x"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}} and more</tool_call>'),
        ("glaive", '<functioncall> {"name": "f", "arguments": \'{"x": "it\\\'s"}\'}'),
        ("glaive", "<functioncall> f(x=1)"),
        ("mistral", "[TOOL_CALLS] []"),
        ("mistral", '[TOOL_CALLS] {"name": "f", "arguments": {}}'),
        ("xlam", '{"name": "f", "arguments": {}}'),
        ("xlam", '[{"name": "f", "arguments": {}}, "g"]'),
        ("xlam", '[{"name": "f", "parameters": {}}]'),
        ("llama", '{"name": "f", "arguments": {}}'),
        ("llama", '[{"name": "f", "parameters": {}}]'),
        ("llama", '{"name": "f", "description": "a tool, not a call", "parameters": {}}'),
        ("llama", '<|python_tag|>search.call(query="x")'),
        ("openai", '{"tool_calls": "f"}'),
        ("openai", '{"tool_calls": [{"function": {"name": "f", "arguments": "x=1"}}]}'),
        ("openai", '{"tool_calls": [{"function": {"name": "f", "arguments": "{} {}"}}]}'),
        ("openai", '{"name": "f", "arguments": {}}'),
        ("python", "[f('Oslo')]"),
        ("python", "[f(x=y)]"),
        ("python", "[f(x=g())]"),
        ("python", "[f(x=1, x=2)]"),
        ("python", "[f(y=1, **{'x': 1})]"),
        ("python", "[f(x=true)]"),
    ],
)
def test_calls_in_a_similar_format_are_malformed(name, text):
    reply = call_form(name).read(f"Well: {text}")
    assert (reply.calls, len(reply.malformed), reply.content) == ([], 1, "Well:")
    assert reply.malformed[0].strip() in text


@pytest.mark.parametrize("form", MARKED, ids=lambda form: form.name)
def test_a_malformed_call_does_not_hide_the_next_call(form):
    good = form.write([Call("g", {"x": 1})])
    reply = form.read(f"{form.mark} oops\n{good}")
    assert (reply.calls, reply.malformed) == ([Call("g", {"x": 1})], ["oops"])


@given(name=texts, key=texts)
@example(name="f", key="class")
@example(name="a-b", key="x")
@example(name="ﬁnd", key="x")  # Python normalizes the ligature
@example(name="a.b", key="größe")
@thorough
def test_the_python_form_rejects_invalid_names(name, key):
    python, calls = call_form("python"), [Call(name, {key: 1})]
    try:
        written = python.write(calls)
    except RowError:
        assert not (name.isidentifier() and key.isidentifier() and name.isascii() and key.isascii()) or key == "class"
    else:
        assert python.read(written) == Reply("", calls)
        assert all(part.isidentifier() for part in name.split("."))


@every_form
def test_calls_that_cannot_be_written_as_text_are_rejected(form):
    for value in (float("nan"), "\ud800", 10**5000):
        with pytest.raises(RowError):
            form.write([Call("f", {"x": value})])


@every_form
@given(name=words, text=texts)
@thorough
def test_results_contain_all_of_a_tools_output(form, name, text):
    written = form.write_result(name, text)
    assert text in written or json.dumps(text, ensure_ascii=False) in written
    assert name in written or form.name in ("hermes", "glaive")


def test_each_form_has_three_requests_that_show_it():
    for form in FORMS:
        assert len(set(form.request)) == 3
        key = {"llama": "parameters", "python": "=", "openai": "tool_calls"}.get(form.name, "arguments")
        assert all(key in sentence or "keyword" in sentence for sentence in form.request)
        assert all(form.mark in sentence for sentence in form.request if form in MARKED)


def test_unknown_forms_raise_an_error_with_a_suggestion():
    with pytest.raises(DataError, match="Did you mean 'hermes'"):
        call_form("herms")


def test_a_long_reply_is_read_in_time():
    call = Call("f", {"x": "y" * 1000})
    for form in FORMS:
        written = form.write([call] * 60, "" if form in BARE else "prose " * 1000)
        assert len(form.read(written).calls) == 60
