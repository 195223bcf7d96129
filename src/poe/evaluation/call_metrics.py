"""Metrics of calls, each with a bootstrap interval. A metric is a share: what each row adds above, and below.

| metric | above / below |
|---|---|
| exact | rows with exactly the reference calls, in any order / rows |
| exact_calls | the same / rows with reference calls |
| acceptable | rows whose calls are acceptable answers (`poe.evaluation.acceptable`) / rows that have such answers |
| name_precision, name_recall, name_f1 | calls to the right tools / calls, reference calls, both |
| call_precision, call_recall, call_f1 | right names and arguments / those of calls, of reference calls, both |
| hammer_name_f1, hammer_argument_f1 | the same as Hammer counts them; see `hammer_counts` |
| abstention_precision, abstention_recall | right abstentions / abstentions, rows where no call is right |
| valid | calls that can be read, are offered, and fit their schema / calls |
| invented_tools, invented_arguments | calls to tools that are not offered / calls; arguments not declared / arguments |
| clean_stop | replies that end by themselves, right after the last call if there is one / replies |

A call that cannot be read counts as a call that is wrong. In names and in names with arguments, no call at all counts
as one item, so that a right abstention counts as right, and a call in its place as wrong. No metric passes 1.

Values are compared as JSON values: 1 and 1.0 are equal, 1 and true are not; an argument that is left out equals its
default. A row without anything below a metric does not count for it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from poe.calls.arguments import UNDECLARED, find_faults, find_tool
from poe.calls.conversation import Call, Conversation, Tool
from poe.calls.faults import Fault, FaultKind
from poe.calls.streaming import CallPart, Part, Reply, ReplyReader, join_parts
from poe.calls.validation import canonical_value
from poe.calls.values import join_place
from poe.chat import RawReply
from poe.evaluation.acceptable import AcceptableCall, match_acceptable

RESAMPLES = 1000
CONFIDENCE = 0.95
MAX_MATCHED = 10
"""The maximum number of calls of one tool for which every assignment to the reference is tried."""

AT_FORMAT = " @ "
"""Stands between a metric and the number of the prompt format in which it is measured."""

Counts = dict[str, tuple[float, float]]
"""What one row adds to each metric: above and below."""

_Shares = tuple[float, np.ndarray, np.ndarray]  # over all rows, in each resample, and which rows count


@dataclass(frozen=True)
class Metric:
    """A share with the bounds of its bootstrap interval, over `rows` rows. It is None without rows."""

    value: float | None
    low: float | None
    high: float | None
    rows: int


def split_question(conversation: Conversation) -> tuple[list[dict[str, Any]], list[tuple[str, Any]]]:
    """Return the messages before the first assistant turn that is trained on, and its calls as (name, arguments)."""
    question = conversation.question
    calls = conversation.messages[len(question)].get("tool_calls") or []
    return question, [(c["function"]["name"], c["function"]["arguments"]) for c in calls]


def measure_calls(
    conversations: Sequence[Conversation],
    replies: Sequence[RawReply],
    form: str = "hermes",
    *,
    acceptable: Sequence[Sequence[AcceptableCall] | None] | None = None,
    seed: int = 0,
) -> dict[str, Metric]:
    """Compare replies with the reference answers of `conversations`; return every metric.

    `acceptable` has the acceptable answers of each row, None for a row without. The other arguments are those of
    `count_replies`.
    """
    return summarize(count_replies(conversations, replies, form, acceptable=acceptable), seed=seed)


def count_replies(
    conversations: Sequence[Conversation],
    replies: Sequence[RawReply],
    form: str = "hermes",
    *,
    acceptable: Sequence[Sequence[AcceptableCall] | None] | None = None,
) -> list[Counts]:
    """Return what each reply adds to each metric.

    A reply is parsed in the call form of its conversation, or in `form` if the conversation has none.
    """
    answers = acceptable or [None] * len(conversations)
    rows = []
    for conversation, raw, acceptable_calls in zip(conversations, replies, answers, strict=True):
        expected = [Call(*call) for call in split_question(conversation)[1]]
        reader = ReplyReader(conversation.form.calls if conversation.form else form)
        parts = [*reader.feed(raw.text), *reader.close()]
        counts = count_row(expected, join_parts(parts), conversation.tools, acceptable_calls)
        rows.append({**counts, "clean_stop": (float(raw.is_complete and _ends_cleanly(parts)), 1.0)})
    return rows


def count_row(
    expected: Sequence[Call],
    reply: Reply,
    tools: Sequence[Tool],
    acceptable: Sequence[AcceptableCall] | None = None,
) -> Counts:
    """Return what a reply adds to each metric but `clean_stop`."""
    calls, broken = reply.calls, len(reply.faults)
    known = [_normalize(call, tools) for call in calls]
    reference = [_normalize(call, tools) for call in expected]
    is_exact = float(not broken and Counter(known) == Counter(reference))
    counts: Counts = {"exact": (is_exact, 1.0), "exact_calls": (is_exact * bool(expected), float(bool(expected)))}
    if acceptable is not None:
        is_match = not broken and match_acceptable(calls, acceptable, tools)
        counts["acceptable"] = float(is_match), 1.0

    names, right_names = _count_items([name for name, _ in known], broken), _count_items([n for n, _ in reference], 0)
    _add_f1(counts, "name", (names & right_names).total(), names.total(), right_names.total())
    hits = float(not expected and not calls and not broken)
    if expected and calls:
        hits = sum(_match_arguments(known, reference, name) for name in {name for name, _ in reference})
    sizes = [max(1, sum(1 + len(arguments) for _, arguments in side)) for side in (known, reference)]
    _add_f1(counts, "call", hits, sizes[0] + (broken if calls else max(0, broken - 1)), sizes[1])
    for name, (right, predicted, gold) in hammer_counts(expected, calls, broken).items():
        counts[f"hammer_{name}_f1"] = 2.0 * right, float(predicted + gold)

    abstains = float(not calls and not broken and bool(reply.content))
    counts["abstention_precision"] = abstains * (not expected), abstains
    counts["abstention_recall"] = abstains * (not expected), float(not expected)
    faults = [find_faults(call, tools) for call in calls]
    counts["valid"] = float(sum(not found for found in faults)), float(len(calls) + broken)
    invented = sum(any(fault.kind is FaultKind.UNKNOWN_TOOL for fault in found) for found in faults)
    counts["invented_tools"] = float(invented), float(len(calls))
    arguments = [(call, found) for call, found in zip(calls, faults, strict=True) if isinstance(call.arguments, dict)]
    undeclared = sum(_count_undeclared(call, found) for call, found in arguments)
    counts["invented_arguments"] = float(undeclared), float(sum(len(call.arguments) for call, _ in arguments))
    return counts


def summarize(rows: Sequence[Counts], *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Metric]:
    """Return each metric over all rows, with the interval of the bootstrap over rows (the percentile method)."""
    measured = _measure(rows, _names_of(rows), _draw_weights(len(rows), resamples, seed))
    return {name: _make_metric(value, shares, counted) for name, (value, shares, counted) in measured.items()}


def summarize_differences(
    first: Sequence[Counts], second: Sequence[Counts], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Metric]:
    """Return each metric of `second` minus that of `first`, with the interval of the paired bootstrap over rows.

    Row i of both is about the same question, and a resample has the same rows of both. `rows` are those that count for
    the metric in either.
    """
    weights, names = _draw_weights(len(first), resamples, seed), _names_of([*first, *second])
    before, after = (_measure(rows, names, weights) for rows in (first, second))
    metrics = {}
    for name, (value, shares, counted) in after.items():
        value_before, shares_before, counted_before = before[name]
        metrics[name] = _make_metric(value - value_before, shares - shares_before, counted | counted_before)
    return metrics


def add_by_row(counts: Sequence[Counts], rows: Sequence[str]) -> list[Counts]:
    """Return the sums of the counts that belong to the same row, so that the bootstrap draws it as a whole."""
    sums: dict[str, Counts] = {}
    for row, own in zip(rows, counts, strict=True):
        total = sums.setdefault(row, {})
        for name, (above, below) in own.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = before[0] + above, before[1] + below
    return list(sums.values())


def _draw_weights(rows: int, resamples: int, seed: int) -> np.ndarray:
    """Return how often each row is in each resample (resamples, rows)."""
    if not rows:
        return np.zeros((resamples, 0))
    return np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), resamples)


def _names_of(rows: Sequence[Counts]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _measure(rows: Sequence[Counts], names: Sequence[str], weights: np.ndarray) -> dict[str, _Shares]:
    """Return each metric over all rows, with the worst of the metrics that hold for formats, and their spread."""
    measured: dict[str, _Shares] = {}
    groups: dict[str, list[_Shares]] = {}
    for name in names:
        above, below = take_columns(rows, name)
        measured[name] = _share(above, below), _resample(above, below, weights), below > 0
        metric, mark, _ = name.partition(AT_FORMAT)
        if mark:
            groups.setdefault(metric, []).append(measured[name])
    for metric, members in groups.items():
        values, shares = np.array([m[0] for m in members]), np.stack([m[1] for m in members])
        counted = np.any([m[2] for m in members], axis=0)
        measured[f"{metric}_worst"] = float(values.min()), shares.min(axis=0), counted
        measured[f"{metric}_spread"] = float(np.ptp(values)), np.ptp(shares, axis=0), counted
    return measured


def take_columns(rows: Sequence[Counts], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return what each row adds to a metric above and below."""
    above, below = np.array([row.get(name, (0.0, 0.0)) for row in rows], dtype=np.float64).T
    return above, below


def _share(above: np.ndarray, below: np.ndarray) -> float:
    return float(above.sum() / below.sum()) if below.sum() > 0 else math.nan


def _resample(above: np.ndarray, below: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the share in each resample, NaN in one without rows that count."""
    return sum_shares(weights @ above, weights @ below)


def sum_shares(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return each share from its sums above and below, NaN where nothing counts."""
    return np.divide(above, below, out=np.full(len(below), math.nan), where=below > 0)


def _make_metric(value: float, shares: np.ndarray, counted: np.ndarray) -> Metric:
    shares = shares[~np.isnan(shares)]
    if math.isnan(value) or not len(shares):
        return Metric(None, None, None, 0)
    bounds = np.quantile(shares, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value, low, high = (round(float(x), 4) for x in (value, *bounds))
    return Metric(value, low, high, int(counted.sum()))


def hammer_counts(expected: Sequence[Call], calls: Sequence[Call], broken: int) -> dict[str, tuple[int, int, int]]:
    """Return the right, predicted and reference numbers of names and of arguments, as Hammer's script counts them.

    Every call to a tool that the reference calls is right, so a repeated call is right again, and the score can pass 1.
    A row without a reference call or without a call adds nothing right. Values are compared as Python's text of them,
    and empty text counts as no argument. A reply that cannot be read as a whole counts as one call.
    """
    names = [call.name for call in expected]
    gold = sum(_count_filled(call) for call in expected)
    if broken:
        return {"name": (0, 1, len(names)), "argument": (0, 0, gold)}
    right = hits = 0
    for call in calls:
        if call.name in names:
            right += 1
            scores = (_hammer_hits(other.arguments, call.arguments) for other in expected if other.name == call.name)
            hits += next((score for score in scores if score), 0)
    predicted = sum(_count_filled(call) for call in calls)
    return {"name": (right, len(calls), len(names)), "argument": (hits, predicted, gold)}


def _hammer_hits(reference: Any, arguments: Any) -> int:
    if not isinstance(reference, dict) or not isinstance(arguments, dict):
        return 0
    if not reference and not _filled(arguments):
        return 1
    given = _filled(arguments)
    return sum(given.get(name) == text for name, text in _filled(reference).items())


def _filled(arguments: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in arguments.items() if value != ""}


def _count_filled(call: Call) -> int:
    return len(_filled(call.arguments)) if isinstance(call.arguments, dict) else 0


def _add_f1(counts: Counts, name: str, hits: float, predicted: float, gold: float) -> None:
    counts[f"{name}_precision"] = float(hits), float(predicted)
    counts[f"{name}_recall"] = float(hits), float(gold)
    counts[f"{name}_f1"] = 2.0 * hits, float(predicted + gold)


def _count_items(names: list[str], broken: int) -> Counter[str | None]:
    """Return the names as counted items; no call and nothing broken is one item."""
    items: list[str | None] = [*names, *["\0broken"] * broken]
    return Counter(items or [None])


def _normalize(call: Call, tools: Sequence[Tool]) -> tuple[str, frozenset[tuple[str, Any]]]:
    """Return a call as a value that is equal for equal calls: its name, and its arguments with the defaults."""
    if not isinstance(call.arguments, dict):
        return call.name, frozenset({("", canonical_value(call.arguments))})
    return call.name, canonical_value(add_defaults(call, tools).arguments)


def add_defaults(call: Call, tools: Sequence[Tool]) -> Call:
    """Return a call with the declared defaults of the arguments that it leaves out."""
    if not isinstance(call.arguments, dict):
        return call
    tool = find_tool(tools, call.name)
    declared = tool["parameters"].get("properties", {}) if tool else {}
    defaults = {n: s["default"] for n, s in declared.items() if isinstance(s, dict) and "default" in s}
    return Call(call.name, {**defaults, **call.arguments})


def _match_arguments(calls: list[Any], reference: list[Any], name: str) -> int:
    """Return the number of right items of the calls to one tool in the best assignment to its reference calls.

    An assigned call has one right item for its name, and one for each right argument.
    """
    left = [arguments for other, arguments in calls if other == name][:MAX_MATCHED]
    right = [arguments for other, arguments in reference if other == name][:MAX_MATCHED]
    scores = [[1 + len(mine & other) for other in right] for mine in left]

    @cache
    def best(position: int, taken: int) -> int:
        if position == len(scores):
            return 0
        free = ((i, score) for i, score in enumerate(scores[position]) if not taken >> i & 1)
        return max([best(position + 1, taken), *(score + best(position + 1, taken | 1 << i) for i, score in free)])

    return best(0, 0)


def _count_undeclared(call: Call, faults: Sequence[Fault]) -> int:
    """Return the number of arguments of a call that its tool does not declare."""
    places = {fault.path for fault in faults if fault.text == UNDECLARED}
    return sum(join_place(f"{call.name[:80]}: arguments", name) in places for name in call.arguments)


def _ends_cleanly(parts: Sequence[Part]) -> bool:
    """Return whether a reply ends with its last call, or with text if it has no call."""
    reply = join_parts(list(parts))
    if any(fault.kind in (FaultKind.BRACE_LOOP, FaultKind.UNCLOSED) for fault in reply.faults):
        return False
    return not reply.calls or isinstance(parts[-1], CallPart)
