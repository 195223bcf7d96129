"""Parse the `--data` SPEC, and the errors of a malformed one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poe.data.readers import READERS, get_reader
from poe.data.spec import MAX_EPOCHS, DataSource, parse_spec
from poe.errors import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("demo", [DataSource("demo")]),
        ("glaive,xlam", [DataSource("glaive"), DataSource("xlam")]),
        (" glaive , xlam ", [DataSource("glaive"), DataSource("xlam")]),
        ("glaive=rows.jsonl*4,xlam*3", [DataSource("glaive", "rows.jsonl", 4), DataSource("xlam", None, 3)]),
        ("glaive:0.5", [DataSource("glaive", None, None, 0.5)]),
        ("glaive*2:.5", [DataSource("glaive", None, 2, 0.5)]),
        ("messages=data/*.jsonl.gz", [DataSource("messages", "data/*.jsonl.gz")]),
        ("messages=data/*.jsonl*2:3", [DataSource("messages", "data/*.jsonl", 2, 3.0)]),
        ("messages=C:/rows/a=b.json", [DataSource("messages", "C:/rows/a=b.json")]),
        ("messages=s3:bucket/x*y", [DataSource("messages", "s3:bucket/x*y")]),
        ("messages=host:8*1:1", [DataSource("messages", "host:8", 1)]),
        ("messages=rows/*8*1:1", [DataSource("messages", "rows/*8", 1)]),
        ("messages=rows/*8", [DataSource("messages", "rows/", 8)]),
        ("xlam:1e-3", [DataSource("xlam", None, None, 0.001)]),
    ],
)
def test_valid_specs_are_parsed(text: str, expected: list[DataSource]) -> None:
    assert parse_spec(text, READERS) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("glaive,,xlam", "Empty item"),
        ("glaive,", "Empty item"),
        ("glaive*0", "Epochs 0"),
        ("glaive*99999999999", "Epochs 99999999999"),
        (f"glaive*{MAX_EPOCHS + 1}", "whole number from 1"),
        ("glaive:0", "Weight 0"),
        ("glaive:1e999", "not a positive number"),
        ("glaive:2*3", "comes before its epochs"),
        ("glaive=x.json:2*3", "comes before its epochs"),
        ("glaive=", "no path"),
        ("=rows.json", "cannot be the name of a reader"),
        ("rows.json", "cannot be the name of a reader"),
        ("glaive*-1", "cannot be the name of a reader"),
    ],
)
def test_malformed_specs_raise_errors(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        parse_spec(text, READERS)
    assert repr(text) in str(error.value) or "empty" in message


def test_unknown_readers_raise_an_error_with_a_suggestion() -> None:
    with pytest.raises(DataError, match="Did you mean 'glaive'"):
        parse_spec("glave", READERS)
    with pytest.raises(DataError, match=r"Known: .*demo, .*glaive, .*messages, .*xlam"):
        get_reader("nothing-like-it")
    assert parse_spec("anything=rows.json") == [DataSource("anything", "rows.json")]


@given(
    st.sampled_from(sorted(READERS)),
    st.none() | st.text("ab/.:*=0123456789-", min_size=1).filter(lambda p: p == p.strip()),
    st.integers(1, MAX_EPOCHS),
    st.floats(1e-6, 1e6),
)
def test_a_printed_source_parses_to_itself(name: str, path: str | None, epochs: int, weight: float) -> None:
    source = DataSource(name, path, epochs, weight)
    assert parse_spec(str(source), READERS) == [source]


@given(st.text(max_size=60))
def test_random_text_never_crashes_the_parser(text: str) -> None:
    try:
        sources = parse_spec(text, READERS)
    except DataError:
        return
    assert all(source.name in READERS and (source.epochs or 1) >= 1 and source.weight > 0 for source in sources)
