"""Questions that are answered with a plan: all calls at once, some of which use the results of others."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from poe.calls.conversation import Call, Conversation
from poe.calls.forms.call_forms import parse_reply
from poe.data.drops import DropReport
from poe.data.spec import DataSource
from poe.errors import DataError
from poe.evaluation.call_metrics import Counts, add_defaults, count_row, split_question
from poe.evaluation.call_suite import CallSuite
from poe.evaluation.plan_match import match_plans
from poe.evaluation.plan_rows import NAME, allow_references, read_plans
from poe.evaluation.suites import Item, Rows, add_questions
from poe.tools.plans import Plan, parse_plan

_CALL_METRICS = ("name_precision", "name_recall", "name_f1", "valid", "invented_tools", "invented_arguments")


def read_plan_rows(source: DataSource, name: str) -> list[Rows]:
    """Read questions that are answered with plans."""
    report = DropReport()
    return [add_questions(Rows(NAME, name, str(source), ""), read_plans(source.path, report), report)]


class PlanSuite(CallSuite):
    """Asks for all calls at once, and compares their graph with that of the reference.

    | metric | share of |
    |---|---|
    | plan | rows with the reference's tools and dependencies |
    | plan_with_arguments | rows with its arguments, too |
    | readable_plan | rows with a plan without a call that cannot be read, a reference to no call, or a circle |

    An argument may be a reference of any declared type.
    """

    def answer(self, stage: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return the replies of a stage, None for the base, with references as arguments of any type."""
        return super().answer(stage, [replace(item, content=_with_references(item.content)) for item in items])

    def count(self, items: Sequence[Item], answers: Sequence[dict[str, Any]]) -> list[Counts]:
        """Return what each reply adds to the metrics of plans, and to those of calls that hold for plans."""
        return [self._count(item.content, answer["reply"]) for item, answer in zip(items, answers, strict=True)]

    def _count(self, conversation: Conversation, text: str) -> Counts:
        expected = [Call(*call) for call in split_question(conversation)[1]]
        reply = parse_reply(text, self._form_of(conversation))
        counts = count_row(expected, reply, _with_references(conversation).tools)
        reference = parse_plan([add_defaults(call, conversation.tools) for call in expected])
        plan: Plan | None = None
        if not reply.faults and reply.calls:
            try:
                plan = parse_plan([add_defaults(call, conversation.tools) for call in reply.calls])
            except DataError:
                plan = None
        matches = [plan is not None and match_plans(reference, plan, with_arguments=w) for w in (False, True)]
        return {
            "plan": (float(matches[0]), 1.0),
            "plan_with_arguments": (float(matches[1]), 1.0),
            "readable_plan": (float(plan is not None), 1.0),
            **{name: counts[name] for name in _CALL_METRICS},
        }


def _with_references(conversation: Conversation) -> Conversation:
    return replace(conversation, tools=list(map(allow_references, conversation.tools)))
