"""Tasks of lm-evaluation-harness: it asks and scores them itself, with a stage on and with the base alone.

A task is answered as a whole, because lm-eval chooses the examples in its prompts from row to row. A metric is reported
if lm-eval's own figure of it is the mean of its rows, or bits per byte.
"""

import copy
import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Real
from typing import Any

from poe.cascade import Cascade
from poe.data.render import Renderer
from poe.data.spec import DataSource
from poe.errors import DataError, EvaluationError, MissingExtraError, printable
from poe.evaluation.call_metrics import Counts
from poe.evaluation.suites import Item, Rows, Settings, hash_text

NAME = "lm-eval"
REQUESTS = 8  # that lm-eval hands to the model together


@dataclass
class TaskRows(Rows):
    """The documents of a task. Their contents are their numbers; `spec` is the task, or the group that has it."""

    task: str = ""
    spec: str = ""


def read_tasks(source: DataSource, name: str) -> list[Rows]:
    """Read the documents of tasks that the source joins by `+`: names of lm-eval, or YAML files.

    Raises `MissingExtraError` without lm-eval, `DataError` for a task that it cannot load.
    """
    if find_spec("lm_eval") is None:
        raise MissingExtraError('Tasks of lm-eval need lm-eval: pip install "poe-cascade[eval]"')
    if source.path is None:
        raise DataError("Expected lm-eval=TASK[+TASK]: names of tasks of lm-eval, or YAML files of tasks.")
    return [
        _read_documents(task, name, task_name, spec)
        for spec in dict.fromkeys(source.path.split("+"))
        for task_name, task in _load_tasks(spec).items()
    ]


def _load_tasks(spec: str) -> dict[str, Any]:
    """Return the tasks of a name or of a file, with their documents."""
    from lm_eval.tasks import TaskManager

    try:
        tasks = dict(TaskManager().load([spec])["tasks"])
        for task in tasks.values():
            len(task.eval_docs)
    except Exception as error:  # of the task's file, of the Hub, of the data set
        reason = printable(f"{type(error).__name__}: {error}", 300)
        raise DataError(
            f"lm-eval cannot load the task {printable(spec, 80)!r} ({reason}). Expected a task that `lm-eval ls tasks` "
            "lists, with data that can be fetched or is cached, or a YAML file of a task."
        ) from None
    return tasks


def _read_documents(task: Any, name: str, task_name: str, spec: str) -> TaskRows:
    config = json.dumps(task.dump_config(), sort_keys=True, default=str)
    rows = TaskRows(NAME, f"{name}: {task_name}", f"{NAME}={spec}", "", task=task_name, spec=spec)
    for number, document in enumerate(task.eval_docs):
        content = json.dumps([config, number, document], sort_keys=True, default=str)
        rows.rows.append((str(number), str(number), hash_text(content), number))
    rows.read = len(rows.rows)
    return rows


class LmEvalSuite:
    """Lets lm-eval ask and score the documents of a task. All text goes through the stage."""

    success = None

    def __init__(self, rows: Rows, cascade: Cascade, renderer: Renderer, settings: Settings) -> None:
        assert isinstance(rows, TaskRows)
        self.rows: Rows = rows
        self._task, self._spec, self._cascade = rows.task, rows.spec, cascade
        self.items, self.dropped = rows.choose(lambda number: [], settings.rows, settings.seed)
        self.batch_size = len(self.items)

    def answer(self, stage: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return the responses to each document, and the values of its metrics."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        started = time.perf_counter()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is no name
        # A copy: lm-eval gives the tokenizer a padding token.
        model, tokenizer = self._cascade.model(stage), copy.deepcopy(self._cascade.tokenizer)
        numbers = [item.content for item in items]
        try:
            evaluated = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=REQUESTS, backend="causal"),
                tasks=[_load_tasks(self._spec)[self._task]],
                samples={self._task: numbers},
                bootstrap_iters=0,
            )
        except Exception as error:  # of the task's own code
            reason = printable(f"{type(error).__name__}: {error}", 300)
            raise EvaluationError(f"lm-eval failed at the task {self._task!r}: {reason}.") from error
        answers: dict[int, dict[str, Any]] = {
            number: {"responses": {}, "tokens": 0, "counts": {}, "left_out": []} for number in numbers
        }
        values: dict[tuple[str, str], dict[int, Any]] = {}
        for sample in evaluated["samples"][self._task]:
            number, chosen = sample["doc_id"], sample["filter"]
            texts = [" ".join(map(str, arguments)) for arguments in sample["arguments"]]
            answers[number]["tokens"] = sum(len(tokenizer(text)["input_ids"]) for text in texts)
            answers[number]["responses"][chosen] = sample["filtered_resps"]
            for metric in sample["metrics"]:
                values.setdefault((metric, chosen), {})[number] = sample[metric]
        for (metric, chosen), of_rows in values.items():
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            counts = _as_counts(list(of_rows.values()), evaluated["results"][self._task].get(f"{metric},{chosen}"))
            for number, count in zip(of_rows, counts or [], strict=bool(counts)):
                answers[number]["counts"][name] = count
            if counts is None:
                for number in of_rows:
                    answers[number]["left_out"].append(name)
        seconds = round((time.perf_counter() - started) / len(items), 4)
        return [json.loads(json.dumps({**answers[n], "seconds": seconds}, default=str)) for n in numbers]

    def count(self, items: Sequence[Item], answers: Sequence[dict[str, Any]]) -> list[Counts]:
        """Return what each document adds to each metric of its task."""
        return [{name: (above, below) for name, (above, below) in answer["counts"].items()} for answer in answers]


def _as_counts(values: list[Any], figure: Any) -> list[tuple[float, float]] | None:
    """Return what each row adds to a metric above and below, None unless that makes up lm-eval's figure of the task."""
    counts = None
    if all(isinstance(value, Real) for value in values):
        counts = [(float(value), 1.0) for value in values]
    elif all(isinstance(value, tuple) and len(value) == 2 for value in values):
        with suppress(TypeError, ValueError):
            counts = [(-float(log_p) / math.log(2), float(size)) for log_p, size in values]
    total = sum(below for _, below in counts or ())
    if not counts or not total or not isinstance(figure, Real):
        return None
    return counts if math.isclose(sum(above for above, _ in counts) / total, figure, rel_tol=1e-6) else None
