"""Suites that tools of others score: BFCL by its command line, tasks of lm-eval. The tools are replaced here.

`tests/engines/official.py` runs them.
"""

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from poe import Cascade
from poe.calls.conversation import Call
from poe.calls.forms.call_forms import call_form
from poe.errors import DataError, EvaluationError, MissingExtraError
from poe.evaluation import bfcl, bfcl_packages, lm_eval_suite
from poe.evaluation.kinds import read_sources
from poe.evaluation.run import Evaluation
from poe.evaluation.suites import Settings

FUNCTION = {
    "name": "math.add",
    "description": "Add numbers.",
    "parameters": {
        "type": "dict",
        "properties": {"a": {"type": "integer", "description": ""}, "b": {"type": "float", "description": ""}},
        "required": ["a"],
    },
}
ADD = Call("math.add", {"a": 3, "b": 4})
TEXT = call_form("hermes").write([ADD])


def question(category: str, number: int, acceptable: Any = None) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Add 3 and 4."}]
    row = {"category": category, "id": f"{category}_{number}", "messages": messages, "functions": [FUNCTION]}
    return {**row, "acceptable": acceptable}


QUESTIONS = {
    "simple_python": [question("simple_python", i, [{"math.add": {"a": [3], "b": ["", 4.0]}}]) for i in range(3)],
    "irrelevance": [question("irrelevance", i) for i in range(4)],
    "live_relevance": [question("live_relevance", i) for i in range(4)],
}
REPLIES = [TEXT, "No tool adds.", "<tool_call>{", call_form("hermes").write([Call("math.add", {"a": 4})])]
EXPECTED = {
    # By the place of the reply: the official score, and the number of replies that are compared with ours.
    "simple_python": ([1, 0, 0], 2),
    "irrelevance": ([0, 1, 1, 0], 3),
    "live_relevance": ([1, 0, 0, 1], 3),
}


def score_like_bfcl(folder: Path, command: str, *arguments: str) -> str:
    """Answer the two commands like bfcl-eval, with the right answer of `QUESTIONS` alone."""
    if command == "questions":
        return "".join(f"{json.dumps(row)}\n" for category in arguments for row in QUESTIONS[category])
    category = arguments[arguments.index("--test-category") + 1]
    (path,) = folder.glob(f"result/poe/*/BFCL_v4_{category}_result.json")
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert ("--partial-eval" in arguments) == (len(answers) < len(QUESTIONS[category]))
    wrong = []
    for answer in answers:
        is_call = isinstance(answer["result"], list)
        right = not is_call if category == "irrelevance" else is_call
        if category == "simple_python":
            right = is_call and [json.loads(each["math.add"]) for each in answer["result"]] == [ADD.arguments]
        wrong += [] if right else [{"id": answer["id"], "valid": False}]
    total = {"accuracy": 0.5, "correct_count": len(answers) - len(wrong), "total_count": len(answers)}
    scores = folder / "score" / path.parent.relative_to(folder / "result") / f"BFCL_v4_{category}_score.json"
    scores.parent.mkdir(parents=True, exist_ok=True)
    scores.write_text("".join(f"{json.dumps(line)}\n" for line in [total, *wrong]))
    return ""


@pytest.fixture
def cascade(demo_base: Path, monkeypatch: pytest.MonkeyPatch) -> Cascade:
    monkeypatch.setattr(bfcl, "run_bfcl", score_like_bfcl)
    return Cascade.from_pretrained(demo_base, dtype=torch.float32)


def reply_with(text: str) -> dict[str, Any]:
    return {"reply": text, "calls": [], "finish_reason": "stop", "tokens": 1, "seconds": 0.1, "teacher_forced": [0, 1]}


def test_answers_are_handed_over_and_scored_by_the_official_rules(
    cascade: Cascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(suite: bfcl.BfclSuite, stage: str | None, items: list[Any]) -> list[dict[str, Any]]:
        return [reply_with(REPLIES[int(item.id.rpartition("_")[2])]) for item in items]

    monkeypatch.setattr(bfcl.BfclSuite, "answer", answer)
    results = Evaluation(cascade, read_sources("bfcl=" + "+".join(QUESTIONS)), tmp_path).run()
    for category, (right, compared) in EXPECTED.items():
        name = f"bfcl: {category}"
        scores = results["scores"][name]["base"]
        assert scores["bfcl"]["value"] == pytest.approx(sum(right) / len(right), abs=1e-4)
        assert scores["malformed"]["value"] == pytest.approx(1 / len(right), abs=1e-4)
        official = {"tool": bfcl_packages.BFCL, "compared": compared, "agreed": compared}
        assert results["suites"][name]["official"] == official
    assert results["scores"]["bfcl: simple_python"]["base"]["acceptable"]["value"] == pytest.approx(1 / 3, abs=1e-4)
    assert "exact" not in results["scores"]["bfcl: live_relevance"]["base"]
    assert f"{bfcl_packages.BFCL} and our rules agree on 2 of 2 replies" in (tmp_path / "results.md").read_text()
    (written,) = (tmp_path / "bfcl" / "base" / "result").glob("poe/live/*.json")
    first, _, third, _ = [json.loads(line) for line in written.read_text().splitlines()]
    assert first == {"id": "live_relevance_0", "result": [{"math.add": '{"a": 3, "b": 4}'}]}
    assert third == {"id": "live_relevance_2", "result": "<tool_call>{"}


def test_a_part_of_a_category_is_scored_as_a_part(cascade: Cascade, tmp_path: Path) -> None:
    settings = Settings(rows=2, max_new_tokens=2)
    results = Evaluation(cascade, read_sources("bfcl=irrelevance"), tmp_path, settings=settings).run()
    assert results["scores"]["bfcl: irrelevance"]["base"]["bfcl"]["rows"] == 2


def test_scores_of_other_answers_are_refused(cascade: Cascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = Evaluation(cascade, read_sources("bfcl=irrelevance"), tmp_path, settings=Settings(max_new_tokens=1))
    monkeypatch.setattr(bfcl, "run_bfcl", lambda *arguments: "")
    with pytest.raises(EvaluationError, match="Expected scores of bfcl-eval"):
        evaluation.run()


@pytest.mark.parametrize("spec", ["bfcl=simple", "bfcl=multi_turn_base", "bfcl=multiple+"])
def test_an_unknown_category_is_refused(spec: str) -> None:
    with pytest.raises(DataError, match=r"BFCL has no category .* with one turn"):
        read_sources(spec)


def test_packages_that_cannot_be_installed_are_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POE_CACHE", str(tmp_path))
    failed = CompletedProcess([], 1, "", "WARNING: no network\nERROR: No matching distribution found for tqdm\n\n")
    monkeypatch.setattr(bfcl_packages, "_run", lambda command: failed)
    bfcl_packages.install_packages.cache_clear()
    with pytest.raises(EvaluationError, match=r"ERROR: No matching distribution.*pip download --no-deps"):
        bfcl_packages.install_packages()
    assert not list(tmp_path.glob("bfcl/*"))


def test_lm_eval_that_is_not_installed_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_suite, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "poe-cascade\[eval\]"'):
        read_sources("lm-eval=arc_easy")
