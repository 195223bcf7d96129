"""Rows with a replaced or cut part are read or dropped with a reason; they never crash a reader."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import test_hammer_reader as of_hammer
import test_hermes_reader as of_hermes
import test_sealtools_reader as of_sealtools
import test_toolalpaca_reader as of_toolalpaca
import test_toolrl_reader as of_toolrl
from poe.data.readers import hammer, hermes, messages, sealtools, toolalpaca, toolrl
from test_readers import BAKE, junk, run

TYPED = {
    "tools": json.dumps([BAKE]),
    "messages": [
        {"role": "user", "content": [{"type": "text", "value": "Go"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "reasoning", "value": "Hm"},
                {"type": "tool_call", "value": '{"name": "bake_bread", "arguments": {"flour": "rye"}}'},
            ],
        },
    ],
}
WHOLE = [
    (hermes, of_hermes.row("H:Go", "G:" + of_hermes.tagged(of_hermes.RYE), "T:done", "G:Done")),
    (toolrl, of_toolrl.row(of_toolrl.calls(of_toolrl.RYE))),
    (sealtools, of_sealtools.prompted(of_sealtools.row(of_sealtools.FIND), [of_sealtools.POOL["findFlour"]])),
    (hammer, of_hammer.row([{"role": "user", "content": "Bread"}])),
    (hammer, of_hammer.masked([{"name": "bake", "arguments": {"flour": "rye", "grams": 1}}])),
    (toolalpaca, of_toolalpaca.api(of_toolalpaca.LOOK)),
    (messages, TYPED),
]


def damage(value: Any, data: st.DataObject) -> Any:
    """Return a copy with one part replaced, at any depth, also inside JSON text."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
        copy = dict(value) if isinstance(value, dict) else list(value)
        copy[key] = damage(value[key], data)
        return copy
    if isinstance(value, str) and value[:1] in "[{" and data.draw(st.booleans()):
        try:
            return json.dumps(damage(json.loads(value), data))
        except ValueError:
            pass
    if isinstance(value, str) and data.draw(st.booleans()):
        return value[: data.draw(st.integers(0, len(value)))]
    return data.draw(junk)


@pytest.mark.parametrize(("reader", "row"), WHOLE)
@given(data=st.data())
def test_damaged_rows_never_crash_a_reader(reader: Any, row: dict[str, Any], data: st.DataObject) -> None:
    assert len(run(reader, row)[0]) == 1  # the undamaged row is read
    conversations, counts = run(reader, damage(row, data))
    if counts:  # an API without questions has no rows
        assert len(conversations) == counts["kept"]
        assert counts["kept"] + sum(counts["dropped"].values()) == counts["read"] >= 1
