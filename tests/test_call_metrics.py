"""Metrics of calls, against cases worked out by hand."""

import math
from typing import Any

import pytest

from poe.calls.conversation import Call, Conversation
from poe.calls.faults import Fault, FaultKind
from poe.calls.forms.call_forms import CALL_FORMS
from poe.calls.reading import Reply
from poe.calls.tools import read_tools
from poe.chat import RawReply
from poe.evaluation.acceptable import match_acceptable
from poe.evaluation.call_metrics import count_row, measure_calls, summarize

TOOLS = read_tools(
    [
        {"name": "pay", "parameters": {"type": "dict", "properties": {
            "to": {"type": "string"}, "amount": {"type": "float"}, "currency": {"type": "string", "default": "EUR"},
            "tags": {"type": "array", "items": {"type": "string"}}, "note": {"type": "any"},
            "address": {"type": "dict", "properties": {"street": {"type": "string"}}},
        }, "required": ["to"]}},
        {"name": "ping", "parameters": {"type": "dict", "properties": {}, "required": []}},
    ]
)  # fmt: skip
PAY, PING = Call("pay", {"to": "Ann", "amount": 5}), Call("ping", {})
BROKEN = Fault(FaultKind.NOT_JSON, "{")


def share(expected: list[Call], reply: Reply, name: str) -> float | None:
    above, below = count_row(expected, reply, TOOLS)[name]
    return above / below if below else None


def of(*calls: Call, text: str = "", faults: int = 0) -> Reply:
    return Reply(text, list(calls), [BROKEN] * faults)


@pytest.mark.parametrize(
    ("expected", "reply", "exact"),
    [
        ([PAY, PING], of(PING, PAY), 1),  # any order
        ([PAY], of(Call("pay", {"amount": 5.0, "to": "Ann", "currency": "EUR"})), 1),  # 5.0 is 5; the default
        ([Call("pay", {"to": "Ann", "currency": "USD"})], of(Call("pay", {"to": "Ann"})), 0),
        ([Call("pay", {"to": "1"})], of(Call("pay", {"to": 1})), 0),
        ([Call("pay", {"note": 1})], of(Call("pay", {"note": True})), 0),
        ([PAY], of(PAY, PAY), 0),
        ([PAY], of(PAY, faults=1), 0),
        ([PAY], of(), 0),
        ([], of(text="no"), 1),
        ([], of(PING), 0),
    ],
)
def test_exact_calls_are_equal_as_values_in_any_order(expected: list[Call], reply: Reply, exact: int) -> None:
    assert share(expected, reply, "exact") == exact


@pytest.mark.parametrize(
    ("expected", "reply", "f1"),
    [
        ([PAY, PING], of(PAY), 2 / 3),  # 1 of 1, 1 of 2
        ([PAY], of(PAY, PAY, PAY), 2 / 4),  # 1 of 3, 1 of 1; Hammer counts 3 of 3 and 3 of 1
        ([PAY], of(PING), 0),
        ([PAY], of(faults=1), 0),
        ([PAY], of(), 0),
        ([], of(text="no"), 1),
        ([], of(PING), 0),
    ],
)
def test_the_f1_of_names(expected: list[Call], reply: Reply, f1: float) -> None:
    assert share(expected, reply, "name_f1") == pytest.approx(f1)


def test_hammers_f1_passes_one_and_gives_nothing_for_a_right_empty_answer() -> None:
    assert share([PAY], of(PAY, PAY, PAY), "hammer_name_f1") == pytest.approx(6 / 4)
    assert share([], of(text="no"), "hammer_name_f1") is None
    assert share([PAY], of(faults=1), "hammer_name_f1") == 0


@pytest.mark.parametrize(
    ("expected", "reply", "f1"),
    [
        # Items of PAY: its name, to, amount, currency (the default): 4.
        ([PAY], of(Call("pay", {"to": "Bob", "amount": 5})), 2 * 3 / 8),
        ([PAY], of(Call("pay", {"to": "Ann"})), 2 * 3 / (3 + 4)),
        # The best assignment of two calls to one tool: 4 + 4 right, not 3 + 3.
        ([PAY, Call("pay", {"to": "Bob", "amount": 1})], of(Call("pay", {"to": "Bob", "amount": 1}), PAY), 1),
        ([PAY], of(PING), 0),
        ([PAY], of(PAY, faults=1), 2 * 4 / (5 + 4)),
        ([], of(text="no"), 1),
        ([], of(PING), 0),
        ([], of(faults=2), 0),
    ],
)
def test_the_f1_of_names_and_arguments(expected: list[Call], reply: Reply, f1: float) -> None:
    assert share(expected, reply, "call_f1") == pytest.approx(f1)


def test_what_a_model_invents_and_whether_it_is_valid() -> None:
    reply = of(
        PAY, Call("fly", {"x": 1}), Call("pay", {"to": "Ann", "when": 1, "why": 2}), Call("pay", {"to": 5}), faults=1
    )
    counts = count_row([PAY], reply, TOOLS)
    assert counts["valid"] == (1, 5)
    assert counts["invented_tools"] == (1, 4)
    assert counts["invented_arguments"] == (2, 7)


def row(*calls: Call) -> Conversation:
    made: list[Any] = [
        {"id": "1", "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls
    ]
    answer = {"role": "assistant", "content": None if calls else "none", "tool_calls": made}
    return Conversation([{"role": "user", "content": "?"}, answer], TOOLS)


def test_metrics_of_a_whole_split() -> None:
    written = CALL_FORMS["hermes"].write
    rows = [row(PAY), row(PAY, PING), row(), row(), row(PING)]
    replies = [
        RawReply(written([PAY]), True),
        RawReply(written([PING, PAY], "Sure."), False),  # cut off after the calls
        RawReply("I cannot do that.", True),
        RawReply(written([PING]), True),
        RawReply("I cannot do that.", True),
    ]
    acceptable = [[{"pay": {"to": ["ann"], "amount": [4, 5], "tags": [""]}}], None, [], [], [{"ping": {}}]]
    metrics = measure_calls(rows, replies, acceptable=acceptable)
    values = {name: metric.value for name, metric in metrics.items()}
    assert values["exact"] == 0.6
    assert values["acceptable"] == 0.5
    assert metrics["acceptable"].rows == 4
    assert values["abstention_precision"] == values["abstention_recall"] == 0.5
    assert values["valid"] == 1
    assert values["clean_stop"] == 0.8
    assert values["name_f1"] == round(2 * 4 / (6 + 6), 4)
    again = RawReply(f"{written([PAY])} so", True), RawReply(f"{written([PAY])}<tool_call>", True)
    assert [measure_calls([rows[0]], [reply])["clean_stop"].value for reply in again] == [0, 0]


def test_intervals_hold_the_value_and_shrink_with_more_rows() -> None:
    def interval(rows: int) -> tuple[float, float]:
        metric = summarize([{"exact": (float(i % 4 == 0), 1.0)} for i in range(rows)])["exact"]
        assert metric.value == 0.25
        return metric.low, metric.high

    (low, high), (lower, higher) = interval(400), interval(40)
    error = math.sqrt(0.25 * 0.75 / 400)  # the interval of the normal distribution
    assert (low, high) == pytest.approx((0.25 - 1.96 * error, 0.25 + 1.96 * error), abs=0.006)
    assert lower < low < 0.25 < high < higher
    assert summarize([{"exact": (0.0, 0.0)}])["exact"].value is None
    assert summarize([]) == {}


@pytest.mark.parametrize(
    ("arguments", "fits"),
    [
        ({"to": "new york", "amount": 5}, True),
        ({"to": "New-York", "amount": 5.0}, True),
        ({"to": "Boston"}, False),  # amount may not be left out
        ({"to": "New York", "amount": "5"}, False),
        ({"to": "New York", "amount": True}, False),
        ({"to": "New York", "amount": 5, "tags": ["A b"]}, True),
        ({"to": "New York", "amount": 5, "tags": ["a", 1]}, False),
        ({"to": "New York", "amount": 5, "address": {"street": "main st"}}, True),
        ({"to": "New York", "amount": 5, "address": {"street": "Main St", "town": "x"}}, False),
        ({"to": "New York", "amount": 5, "note": "x"}, False),  # declared, without acceptable values
        ({"amount": 5}, False),
        (None, False),
    ],
)
def test_acceptable_answers(arguments: Any, fits: bool) -> None:
    values = {"to": ["New York"], "amount": [5.0, 6], "tags": ["", ["a b"]], "address": ["", {"street": ["Main St."]}]}
    assert match_acceptable([Call("pay", arguments)], [{"pay": values}], TOOLS) == fits


def test_acceptable_answers_in_any_order() -> None:
    answers = [{"pay": {"to": ["A", "B"]}}, {"ping": {}}]
    assert match_acceptable([PING, Call("pay", {"to": "b"})], answers, TOOLS)
    assert match_acceptable([PING] * 2, [{"ping": {}}] * 2, TOOLS)
    assert not match_acceptable([PING, PING], answers, TOOLS)
    assert not match_acceptable([PING], answers, TOOLS)
