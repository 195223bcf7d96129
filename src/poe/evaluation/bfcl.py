"""BFCL v4: the questions of its categories with one turn, asked here and scored by bfcl-eval's own command line.

| category | rows | right is |
|---|---|---|
| simple_python, multiple, parallel, parallel_multiple; the same with live_ (live_simple) | calls that fit |
| simple_java, simple_javascript | calls that fit, with every argument as text in that language |
| irrelevance, live_irrelevance | no call |
| live_relevance | a call |
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.forms.call_forms import parse_reply
from poe.calls.streaming import Reply
from poe.calls.tools import read_tools
from poe.cascade import Cascade
from poe.chat import RawReply
from poe.data.render import Renderer
from poe.data.spec import DataSource
from poe.errors import DataError, EvaluationError, PoEError, suggest
from poe.evaluation.acceptable import AcceptableCall, first_call, match_acceptable
from poe.evaluation.bfcl_packages import BFCL, MODEL, run_bfcl
from poe.evaluation.call_metrics import Counts, count_replies
from poe.evaluation.call_suite import CallSuite
from poe.evaluation.suites import Item, OfficialScores, Rows, Settings, hash_text
from poe.evaluation.teacher_forcing import count_forced
from poe.files.output import convert_os_errors, write_file

NAME = "bfcl"
LICENSE = "Apache-2.0"
PYTHON = (
    *("simple_python", "multiple", "parallel", "parallel_multiple"),
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"),
)
OTHER_LANGUAGES = ("simple_java", "simple_javascript")
NO_CALL = ("irrelevance", "live_irrelevance")
ANY_CALL = ("live_relevance",)
CATEGORIES = (*PYTHON[:1], *OTHER_LANGUAGES, *PYTHON[1:4], *NO_CALL[:1], *PYTHON[4:], *NO_CALL[1:], *ANY_CALL)

_WITHOUT_REFERENCE = ("valid", "invented_tools", "invented_arguments", "clean_stop", "malformed")
_WITHOUT_VALUES = (
    *("name_precision", "name_recall", "name_f1", "hammer_name_f1", "abstention_precision", "abstention_recall"),
    *_WITHOUT_REFERENCE,
)


@dataclass
class BfclRows(Rows):
    """The rows of a category, with the acceptable answers of those that are answered with certain calls."""

    category: str = ""
    acceptable: dict[str, list[AcceptableCall]] = field(default_factory=dict)


def read_categories(source: DataSource, name: str) -> list[Rows]:
    """Read the rows of all categories, or of those that the source joins by `+`.

    Raises `DataError` for an unknown category.
    """
    names = list(CATEGORIES) if source.path is None else list(dict.fromkeys(source.path.split("+")))
    for each in names:
        if each not in CATEGORIES:
            raise DataError(f"BFCL has no category {each!r} with one turn.{suggest(each, CATEGORIES)}")
    with tempfile.TemporaryDirectory() as folder:
        printed = run_bfcl(Path(folder), "questions", *names)
    found = {each: BfclRows(NAME, f"{name}: {each}", f"{NAME}={each}", LICENSE, category=each) for each in names}
    for line in printed.splitlines():
        row = json.loads(line)
        _add_row(found[row["category"]], row)
    return list(found.values())


def _add_row(rows: BfclRows, row: dict[str, Any]) -> None:
    rows.read += 1
    try:
        tools = read_tools(row["functions"])
    except PoEError as error:
        rows.dropped[getattr(error, "reason", "tools that cannot be read")] += 1
        return
    answer: dict[str, Any] = {"role": "assistant", "content": "No call."}
    if row["acceptable"] is not None:
        calls = [first_call(each) for each in row["acceptable"]]
        functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
        answer = {"role": "assistant", "content": None}
        answer["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        rows.acceptable[row["id"]] = row["acceptable"]
    conversation = Conversation([*row["messages"], answer], tools, NAME, LICENSE, row["id"])
    rows.rows.append((row["id"], row["id"], hash_text(json.dumps(row, sort_keys=True)), conversation))


class BfclSuite(CallSuite):
    """Asks the questions of a category, and has the answers scored by bfcl-eval's own command line.

    Beside the metrics of calls there are `acceptable` (the rules of BFCL's checker for Python), `malformed` (replies
    with a call that cannot be read), and `bfcl`, the official score. A malformed reply is handed over as text, so the
    official score of it is that of no call: right where no call is right.
    """

    success = NAME

    def __init__(self, rows: Rows, cascade: Cascade, renderer: Renderer, settings: Settings) -> None:
        assert isinstance(rows, BfclRows)
        self._category, self._acceptable = rows.category, rows.acceptable
        super().__init__(rows, cascade, renderer, settings)

    def count(self, items: Sequence[Item], answers: Sequence[dict[str, Any]]) -> list[Counts]:
        """Return what each reply adds to each of our metrics that the category allows."""
        category = self._category
        replies = [RawReply(answer["reply"], answer["finish_reason"] != "length") for answer in answers]
        acceptable = [self._acceptable[item.id] if category in PYTHON else None for item in items]
        counts = count_replies([item.content for item in items], replies, self._form, acceptable=acceptable)
        for count, answer in zip(counts, answers, strict=True):
            count["malformed"] = float(bool(self._read(answer).faults)), 1.0
            if category in PYTHON:
                count |= count_forced(answer["teacher_forced"])
        kept = _WITHOUT_REFERENCE if category in ANY_CALL else _WITHOUT_VALUES if category in OTHER_LANGUAGES else None
        return [{name: count[name] for name in kept or count if name in count} for count in counts]

    def score_officially(
        self, items: Sequence[Item], answers: Sequence[dict[str, Any]], folder: Path
    ) -> OfficialScores:
        """Write the answers in bfcl-eval's format, let its command line score them, and compare.

        `folder` is the project of a model: the other categories have their files there too. Further samples of the
        replies are in projects below it, because bfcl-eval takes one reply to a question.
        """
        replies = [self._read(answer) for answer in answers]
        wrong = {}
        for sample in sorted({item.sample for item in items}):
            lines = [
                {"id": item.id, "result": _as_result(reply, answer["reply"])}
                for item, reply, answer in zip(items, replies, answers, strict=True)
                if item.sample == sample
            ]
            wrong[sample] = self._score_lines(lines, folder / f"sample-{sample}" if sample else folder)
        right = [item.id not in wrong[item.sample] for item in items]
        readable = [i for i, reply in enumerate(replies) if not reply.faults and self._category not in OTHER_LANGUAGES]
        agreed = sum(right[i] == self._is_right(items[i], replies[i]) for i in readable)
        return OfficialScores(BFCL, [{NAME: (float(r), 1.0)} for r in right], len(readable), agreed)

    def _score_lines(self, lines: Sequence[dict[str, Any]], folder: Path) -> set[str]:
        """Return the ids of the answers that bfcl-eval finds wrong."""
        category = self._category
        place = Path(MODEL) / ("live" if category.startswith("live") else "non_live")
        result = folder / "result" / place / f"BFCL_v4_{category}_result.json"
        scores = folder / "score" / place / f"BFCL_v4_{category}_score.json"
        with convert_os_errors(folder):
            result.parent.mkdir(parents=True, exist_ok=True)
            scores.unlink(missing_ok=True)
        write_file(result, "".join(f"{json.dumps(line)}\n" for line in lines))
        part = ["--partial-eval"] if len(lines) < self.rows.read else []
        run_bfcl(folder, "evaluate", "--model", MODEL, "--test-category", category, *part)
        return _read_wrong(scores, len(lines))

    def _read(self, answer: dict[str, Any]) -> Reply:
        return parse_reply(answer["reply"], self._form)

    def _is_right(self, item: Item, reply: Reply) -> bool:
        """Return whether a reply is right by our rules."""
        if item.id in self._acceptable:
            return match_acceptable(reply.calls, self._acceptable[item.id], item.content.tools)
        return bool(reply.calls) == (self._category in ANY_CALL)


def _as_result(reply: Reply, text: str) -> list[dict[str, str]] | str:
    """Return a reply as bfcl-eval stores it: calls with their arguments as JSON text, or text."""
    if reply.faults or not reply.calls:
        return text
    return [{call.name: json.dumps(call.arguments)} for call in reply.calls]


def _read_wrong(path: Path, asked: int) -> set[str]:
    """Return the ids of the wrong answers in a file of scores. Raises `EvaluationError` if it has other numbers."""
    try:
        total, *wrong = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        ids = {row["id"] for row in wrong}
        found = total["total_count"], total["correct_count"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EvaluationError(f"Expected scores of {BFCL} in {path}, got {error}.") from None
    if found != (asked, asked - len(ids)):
        raise EvaluationError(f"{path}: expected scores of {asked} answers, got {found[1]} right of {found[0]}.")
    return ids
