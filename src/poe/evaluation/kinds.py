"""The kinds of rows that `poe eval` asks: how a source of them is read, and which suite asks them."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from poe.cascade import Cascade
from poe.data.readers import READERS, demo
from poe.data.readers.guess import find_reader
from poe.data.render import Renderer
from poe.data.spec import DataSource, parse_spec
from poe.errors import DataError
from poe.evaluation import bfcl, lm_eval_suite, plan_rows, tau2
from poe.evaluation.answer_suite import AnswerSuite
from poe.evaluation.call_suite import CallSuite
from poe.evaluation.format_suite import FormatSuite
from poe.evaluation.plan_suite import PlanSuite, read_plan_rows
from poe.evaluation.reply_checks import check_code, check_number
from poe.evaluation.suites import (
    ANSWERS,
    CALLS,
    CODE,
    NUMBERS,
    TEXT,
    Rows,
    Settings,
    Suite,
    read_demo,
    read_questions,
    read_texts,
)
from poe.evaluation.tau2_suite import Tau2Suite, read_tau2_rows
from poe.evaluation.text_suite import TextSuite

SUITES: dict[str, Callable[[Rows, Cascade, Renderer, Settings], Suite]] = {
    CALLS: CallSuite,
    ANSWERS: AnswerSuite,
    NUMBERS: partial(AnswerSuite, check=check_number),
    CODE: partial(AnswerSuite, check=check_code),
    TEXT: TextSuite,
    bfcl.NAME: bfcl.BfclSuite,
    lm_eval_suite.NAME: lm_eval_suite.LmEvalSuite,
    plan_rows.NAME: PlanSuite,
    tau2.NAME: Tau2Suite,
}
"""The suite of each kind of rows."""

SOURCES: dict[str, Callable[[DataSource, str], list[Rows]]] = {
    demo.NAME: read_demo,
    TEXT: read_texts,
    "gsm8k": partial(read_questions, kind=NUMBERS),
    "mbpp": partial(read_questions, kind=CODE),
    bfcl.NAME: bfcl.read_categories,
    lm_eval_suite.NAME: lm_eval_suite.read_tasks,
    plan_rows.NAME: read_plan_rows,
    tau2.NAME: read_tau2_rows,
}
"""Names of a SPEC that are read otherwise than as the questions of a reader: each with a function of source and name.

The rows that the function returns have the kind of their suite.
"""


def make_suite(rows: Rows, cascade: Cascade, renderer: Renderer, settings: Settings) -> Suite:
    """Return the suite that asks these rows. Raises `DataError` if none of them can be asked."""
    suite = FormatSuite if rows.kind == CALLS and settings.formats > 1 else SUITES[rows.kind]
    return suite(rows, cascade, renderer, settings)


def _name_with_file(source: DataSource) -> str:
    return f"{source.name}={Path(str(source.path)).name}"


def read_sources(spec: str) -> list[Rows]:
    """Read the rows of a SPEC: readers of `--data`, and `SOURCES`.

    Raises `DataError` for a SPEC or a source that cannot be used.
    """
    sources = parse_spec(spec, dict.fromkeys([*READERS, *SOURCES]), find_reader)
    names = Counter(source.name for source in sources)
    files = Counter(_name_with_file(source) for source in sources)
    read: list[Rows] = []
    for source in sources:
        if source.epochs is not None or source.weight != 1:
            raise DataError(
                f"The suite {str(source)!r} has epochs or a weight: expected name=path. Each row counts once."
            )
        name = source.name
        if names[name] > 1 and name != demo.NAME:  # no folders, which a card would show
            name = short if files[short := _name_with_file(source)] == 1 else str(source)
        read += SOURCES.get(source.name, read_questions)(source, name)
    if twice := [name for name, count in Counter(rows.name for rows in read).items() if count > 1]:
        raise DataError(f"The suite {twice[0]!r} is given twice.")
    return read
