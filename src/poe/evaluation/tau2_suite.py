"""Tasks that a model acts on until it answers; the database that it leaves decides (`poe.evaluation.tau2`)."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from poe.cascade import Cascade
from poe.data.render import Renderer
from poe.data.spec import DataSource
from poe.evaluation.call_metrics import Counts
from poe.evaluation.call_suite import make_seed
from poe.evaluation.suites import Item, Rows, Settings, hash_text
from poe.evaluation.tau2 import LICENSE, NAME, Task, attempt, find_domain, hash_reference, list_tools, read_tasks
from poe.tools.agent import Agent
from poe.tools.execution import BoundTool

MAX_TURNS = 30  # the longest reference has 19 actions
_NO_LIMIT = 1e9  # of seconds: a slow machine must not change the result
_CALL_SECONDS = 20.0


def read_tau2_rows(source: DataSource, name: str) -> list[Rows]:
    """Read the tasks of a domain: `tau2=retail` or `tau2=airline`."""
    domain = find_domain(source.path)
    tasks = read_tasks(domain)
    rows = Rows(NAME, f"{NAME} solo: {domain.name}", str(source), LICENSE, read=len(tasks))
    for task in tasks:
        rows.add(task.id, task.id, hash_text(task.key()), task)
    return [rows]


class Tau2Suite:
    """Attempts each task, with a database of its own. The database that an attempt leaves decides.

    | metric | share of |
    |---|---|
    | solved | attempts that leave the database of the reference |
    | idle | tasks that are solved by doing nothing |
    | answered | attempts that end with an answer, not with a limit or a call that cannot be used |
    """

    batch_size = 1
    success = "solved"

    def __init__(self, rows: Rows, cascade: Cascade, renderer: Renderer, settings: Settings) -> None:
        self.rows, self._cascade, self._renderer, self._settings = rows, cascade, renderer, settings
        self._longest = getattr(cascade.config, "max_position_embeddings", None)
        self.items, self.dropped = rows.choose(self._encode, settings.rows, settings.seed)
        tasks = [item.content for item in self.items]
        hashes = hash_reference(tasks[0].domain, [task.actions for task in tasks])
        self._expected = dict(zip([item.fingerprint for item in self.items], hashes, strict=True))

    def answer(self, stage: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return the attempt of a stage (None: the base) at each task."""
        answers = []
        for item in items:
            started = time.perf_counter()
            torch.manual_seed(make_seed(self._settings.seed, item))
            done = attempt(item.content, lambda tools: self._make_agent(stage, tools))
            answers.append({**done, "seconds": round(time.perf_counter() - started, 4)})
        return answers

    def count(self, items: Sequence[Item], answers: Sequence[dict[str, Any]]) -> list[Counts]:
        """Return what each attempt adds to each metric."""
        rows = []
        for item, answer in zip(items, answers, strict=True):
            expected, untouched = self._expected[item.fingerprint], item.content.domain.untouched
            rows.append(
                {
                    "solved": (float(answer["database"] == expected), 1.0),
                    "idle": (float(untouched == expected), 1.0),
                    "answered": (float(answer["reason"] == "answer"), 1.0),
                }
            )
        return rows

    def _make_agent(self, stage: str | None, tools: list[BoundTool]) -> Agent:
        settings = self._settings
        options: dict[str, Any] = {"constrain": settings.constrain, "max_new_tokens": settings.max_new_tokens}
        if settings.temperature:
            options |= {"do_sample": True, "temperature": settings.temperature, "top_k": 0}
        limits: dict[str, Any] = {"max_turns": MAX_TURNS, "max_seconds": _NO_LIMIT, "call_seconds": _CALL_SECONDS}
        return Agent(self._cascade, tools, stage=stage, **limits, **options)

    def _encode(self, task: Task) -> list[int] | str:
        ids = self._renderer.prompt_ids(task.messages, list_tools(task.domain))
        if self._longest and len(ids) + self._settings.max_new_tokens > self._longest:
            return f"longer than {self._longest} tokens with its reply"
        return ids
