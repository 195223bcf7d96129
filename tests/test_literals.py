"""Python notation is read as data: literals and calls are read back, and nothing is executed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poe.calls.literals import PythonCall, Variable, parse_calls, parse_literal

numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(values)
def test_a_printed_value_is_read_back(value):
    assert parse_literal(repr(value)) == value


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True).filter(str.isidentifier), values, max_size=4))
def test_a_printed_call_is_read_back(arguments):
    from keyword import iskeyword

    arguments = {name: value for name, value in arguments.items() if not iskeyword(name)}
    text = f"[tools.act({', '.join(f'{name}={value!r}' for name, value in arguments.items())})]"
    assert parse_calls(text) == [PythonCall("tools.act", [], arguments)]


def test_tuples_and_sets_are_lists_and_keys_are_text():
    assert parse_literal("{1: (2, 3), 'a': {4}}") == {"1": [2, 3], "a": [4]}


def test_nested_calls_and_variables_are_returned_as_objects():
    first, second = parse_calls("x = find(name='a')\nopen_it(x, when=now())")
    assert first == PythonCall("find", [], {"name": "a"})
    assert second == PythonCall("open_it", [Variable("x")], {"when": PythonCall("now", [], {})})


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "open",
        "1 + 1",
        "[x for x in y]",
        "1e999",
        "b'x'",
        "{**{}}",
        "f'{x}'",
        "(" * 9000,
        "[" * 200 + "]" * 200,
        "'" + "x" * 300000 + "'",
        "lambda: 1",
        "{None: 1}",
        "{1: 2, '1': 3}",
        "-'a'",
        "",
        "1 2",
    ],
)
def test_other_text_than_a_literal_is_rejected(text):
    with pytest.raises(ValueError):
        parse_literal(text)


@pytest.mark.parametrize("text", ["f(**x)", "f(a=1)(b=2)", "1", "", "import os", "f(a=1 + 1)", "[1]", "del x"])
def test_other_text_than_calls_is_rejected(text):
    with pytest.raises(ValueError):
        parse_calls(text)
