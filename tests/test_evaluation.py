"""`poe eval`: answers that survive kills, results with intervals, comparisons, and what is refused."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from huggingface_hub import ModelCard

from command_line import run_program
from conftest import scramble
from poe import Cascade
from poe.errors import DataError, EvaluationError, FingerprintError, LineageError
from poe.evaluation.answers import AnswersFile
from poe.evaluation.call_metrics import Counts, summarize, summarize_differences
from poe.evaluation.call_suite import CallSuite
from poe.evaluation.kinds import read_sources
from poe.evaluation.results import compare_runs, describe_for_card, read_run
from poe.evaluation.run import Evaluation
from poe.evaluation.samples import add_samples
from poe.evaluation.significance import adjust_p_values, compute_p_values
from poe.evaluation.suites import Settings
from poe.evaluation.unchanged import hash_logits
from poe.loaders.card import stage_card
from poe.loaders.hub import plan_upload
from poe.training.parallel.distributed import World

TEXT = "The lighthouse keeper counted forty boats. " * 3
SHORT = Settings(max_new_tokens=3)


def row(question: str, answer: dict[str, Any] | None) -> str:
    tool = {"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}}
    turns = [{"role": "user", "content": question}, *([{"role": "assistant", **answer}] if answer else [])]
    return json.dumps({"messages": turns, "tools": [tool]})


@pytest.fixture(scope="module")
def files(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of a stage and of a finished evaluation of it, and its files of rows and of text."""
    folder = tmp_path_factory.mktemp("evaluation")
    cascade = Cascade.from_pretrained(demo_base, dtype=torch.float32).add_stage(name="tool", num_layers=1)
    scramble(cascade.stages["tool"], scale=0.3)
    cascade.save_stage("tool", folder / "stage", dtype=torch.float32)
    call = {"content": None, "tool_calls": [{"type": "function", "function": {"name": "ping", "arguments": "{}"}}]}
    hello = json.dumps({**json.loads(row("Hello", {"content": "Hi"})), "tools": []})
    rows = [row("Ping!", call), row("Ping!", call), hello, row("Anyone?", None)]
    (folder / "rows.jsonl").write_text("\n".join([*rows, row("word " * 3000, call)]))
    (folder / "text.txt").write_text(TEXT)
    return {name: folder / name for name in ("stage", "rows.jsonl", "text.txt", "run")}


@pytest.fixture
def cascade(files: dict[str, Path], demo_base: Path) -> Cascade:
    return Cascade.from_pretrained(files["stage"], base=demo_base, dtype=torch.float32)


def evaluate(cascade: Cascade, folder: Path, spec: str = "demo=2", settings: Settings = SHORT) -> dict[str, Any]:
    return Evaluation(cascade, read_sources(spec), folder, stage=cascade.active, settings=settings).run()


def test_an_evaluation_has_answers_results_and_a_table(files: dict[str, Path], tmp_path: Path) -> None:
    suites = f"messages={files['rows.jsonl']},text={files['text.txt']}"
    options = ("--suite", suites, "--max-new-tokens", "4", "--out", str(tmp_path / "run"))
    done = run_program("poe", "eval", files["stage"], *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "run" / "results.md").read_text()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["schema"] == 1
    assert results["base_unchanged"]["is_equal"]
    suite = results["suites"]["messages"]
    assert (suite["read"], suite["asked"]) == (5, 2)
    assert suite["asked"] + sum(suite["dropped"].values()) == suite["read"], suite
    assert {"repeated": 1, "longer than 2048 tokens with its reply": 1}.items() <= suite["dropped"].items()
    assert results["scores"]["messages"]["stage"]["exact"]["rows"] == 2
    assert set(results["scores"]["text"]) == {"base", "stage", "difference"}
    header, *answers = map(json.loads, (tmp_path / "run" / "answers.jsonl").read_text().splitlines())
    assert set(header["models"]) == {"base", "stage"}
    assert len(answers) == 2 * (2 + 1)
    replies = [answer for answer in answers if answer["suite"] == "messages"]
    assert all(0 <= answer["tokens"] <= 4 and answer["seconds"] > 0 for answer in replies)
    assert [suite["replies"][label]["free_replies"] for label in ("base", "stage")] == [1, 1]
    assert "2 replies were free, because their row has no tools" in done.stdout


def test_bits_per_byte_are_those_of_the_logits(cascade: Cascade, files: dict[str, Path], tmp_path: Path) -> None:
    measured = evaluate(cascade, tmp_path, f"text={files['text.txt']}")["scores"]["text"]
    ids = cascade.tokenizer(TEXT.strip(), return_tensors="pt")["input_ids"]
    num_bytes = len(TEXT.strip().encode())  # the first token, which nothing predicts, is <|bos|>
    for label, stage in (("base", None), ("stage", "tool")):
        with torch.no_grad():
            log_p = cascade.model(stage)(ids).logits.log_softmax(-1)
        bits = -log_p[0, :-1].gather(1, ids[0, 1:, None]).sum().item() / math.log(2)
        assert measured[label]["bits_per_byte"]["value"] == pytest.approx(bits / num_bytes, abs=1e-3)


SAMPLED = Settings(max_new_tokens=3, temperature=0.8, samples=2)


@pytest.mark.parametrize(("spec", "settings"), [("demo=2", SHORT), ("demo=1", SAMPLED)])
def test_a_continued_evaluation_ends_with_the_same_scores(
    spec: str, settings: Settings, cascade: Cascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CallSuite, "batch_size", 2)
    whole = evaluate(cascade, tmp_path, spec, settings)
    scores, answers = (tmp_path / "scores.jsonl").read_bytes(), tmp_path / "answers.jsonl"
    lines = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[:4]) + lines[4][:30])  # killed inside a batch, inside a line
    again = evaluate(cascade, tmp_path, spec, settings)
    assert (tmp_path / "scores.jsonl").read_bytes() == scores
    assert again["scores"] == whole["scores"]
    assert len(answers.read_bytes().splitlines()) == len(lines)

    def fail(*arguments: Any) -> None:
        raise AssertionError("everything is answered")

    monkeypatch.setattr(CallSuite, "answer", fail)
    assert evaluate(cascade, tmp_path, spec, settings)["scores"] == whole["scores"]


def test_an_answers_file_of_another_evaluation_and_an_edited_one_are_refused(cascade: Cascade, tmp_path: Path) -> None:
    evaluate(cascade, tmp_path, "demo=1")
    answers = tmp_path / "answers.jsonl"
    lines = answers.read_bytes().splitlines(keepends=True)
    for settings, spec, words in (
        (SAMPLED, "demo=1", "another setting (temperature): it has 0.0, and this evaluation has 0.8"),
        (Settings(max_new_tokens=4), "demo=1", "another setting (max_new_tokens): it has 3, and this evaluation has 4"),
        (SHORT, "demo=2", "of another suite (demo: unseen values)"),
    ):
        with pytest.raises(EvaluationError, match=re.escape(words)):
            evaluate(cascade, tmp_path, spec, settings)
    with pytest.raises(EvaluationError, match=r"another model \(stage\): it has .*, and this evaluation has none"):
        evaluate(cascade.activate(None), tmp_path)

    header = json.loads(lines[0])
    del header["hash"]
    for edit in (
        lambda text: text.replace('"finish_reason": "', '"finish_reason": "s', 1),
        lambda text: "".join(text.splitlines(keepends=True)[:1] + text.splitlines(keepends=True)[2:]),
        lambda text: text + text.splitlines(keepends=True)[-1],
        lambda text: text + "{}\n",
    ):
        answers.write_text(edit(b"".join(lines).decode()))
        with pytest.raises(EvaluationError, match=r"line \d+: expected a line that an evaluation wrote"):
            AnswersFile(answers, header)


def test_several_processes_share_the_questions(
    cascade: Cascade, files: dict[str, Path], demo_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CallSuite, "batch_size", 1)
    alone = evaluate(cascade, tmp_path / "alone")
    store, results = torch.distributed.HashStore(), {}
    meeting = threading.Barrier(2)  # threads of one process have no process group
    monkeypatch.setattr(World, "_patient_group", None)
    monkeypatch.setattr(torch.distributed, "barrier", lambda group: meeting.wait(60))

    def run(rank: int) -> None:
        own = cascade if rank == 0 else Cascade.from_pretrained(files["stage"], base=demo_base, dtype=torch.float32)
        evaluation = Evaluation(own, read_sources("demo=2"), tmp_path / "two", stage="tool", settings=SHORT)
        results[rank] = evaluation.run(world=World(rank, 2, rank, store=store))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0]["scores"] == alone["scores"]
    assert results[0] == results[1]
    assert results[0]["scores_sha256"] == alone["scores_sha256"]
    both = [(tmp_path / name / "answers.jsonl").read_text().count("\n") for name in ("alone", "two")]
    assert both[0] == both[1]


def test_sampled_and_free_replies_are_measured_beside_one_another(cascade: Cascade, tmp_path: Path) -> None:
    sources = read_sources("demo=2")[:1]
    evaluation = Evaluation(cascade, sources, tmp_path, stage="tool", settings=SAMPLED, both=True)
    assert evaluation.num_answers == 2 * 2 * 2 * 2  # models, decodings, questions, samples
    results = evaluation.run()
    (scores,) = results["scores"].values()
    labels = ["base", "base, free", "stage", "difference", "stage, free", "difference, free"]
    assert list(scores) == labels
    assert all({"pass@2", "pass^2"} <= scores[label].keys() for label in labels)
    assert scores["stage"]["exact"]["rows"] == 2
    table = (tmp_path / "results.md").read_text()
    assert "Sampled at temperature 0.8, 2 replies to each question, constrained and free" in table
    assert "| metric | rows | base | base, free | stage | stage \N{MINUS SIGN} base | stage, free |" in table
    chart = (tmp_path / "results.svg").read_text()
    assert ElementTree.fromstring(chart).tag.endswith("svg")
    assert chart.count(">stage, free<") == 1
    with pytest.raises(EvaluationError, match="3 samples of each reply would be equal at temperature 0"):
        Settings(samples=3)


def test_pass_at_k_is_that_at_least_one_reply_is_right_and_pass_to_the_k_that_all_are() -> None:
    right: Counts = {"exact": (1.0, 1.0)}
    wrong: Counts = {"exact": (0.0, 1.0)}
    added = add_samples([right, wrong, right, wrong], "exact")
    assert added["exact"] == (2, 4)
    assert added["pass@2"] == (pytest.approx(5 / 6), 1)  # of 6 pairs one has no right reply
    assert added["pass^2"] == (pytest.approx(1 / 6), 1)  # and one has two
    assert (added["pass@3"][0], added["pass^3"][0]) == (1, 0)
    assert add_samples([right], "exact") == right
    assert "pass@2" not in add_samples([right, wrong], None)


def test_a_threshold_decides_between_a_call_and_text_as_in_chat(cascade: Cascade, tmp_path: Path) -> None:
    settings = Settings(max_new_tokens=40, rows=1)
    evaluation = Evaluation(cascade, read_sources("demo=1")[:1], tmp_path, stage="tool", settings=settings)
    (suite,) = evaluation.suites.values()
    for threshold, is_call in ((-1e6, True), (1e6, False)):
        cascade.stages["tool"].prompt = {"call_threshold": threshold}
        (answer,) = suite.answer("tool", suite.items)
        assert bool(answer["calls"]) is is_call


def test_runs_are_compared_question_by_question(cascade: Cascade, files: dict[str, Path], tmp_path: Path) -> None:
    evaluate(cascade, tmp_path / "all")
    evaluate(cascade.activate(None), tmp_path / "free", settings=Settings(constrain=False, max_new_tokens=3, rows=1))
    table = run_program("poe", "eval", "compare", tmp_path / "all", tmp_path / "free")
    assert table.returncode == 0, table.stderr
    assert "**demo: unseen values**: 1 questions (left out: up to 1 that not all have)" in table.stdout
    assert "| metric | rows | all | free | free \N{MINUS SIGN} all |" in table.stdout

    evaluate(cascade, tmp_path / "texts", f"text={files['text.txt']}")
    with pytest.raises(EvaluationError, match="no question in common"):
        compare_runs([read_run(tmp_path / "all"), read_run(tmp_path / "texts")])
    with (tmp_path / "all" / "scores.jsonl").open("a") as file:
        file.write("\n")
    for folder, words in (("all", "is not the file that results.json describes"), ("none", "no finished evaluation")):
        done = run_program("poe", "eval", "compare", tmp_path / "free", tmp_path / folder)
        assert (done.returncode, words in " ".join(done.stderr.split())) == (1, True), done.stderr


def test_a_card_shows_the_evaluation_of_its_own_stage_and_no_other(
    cascade: Cascade, files: dict[str, Path], tmp_path: Path
) -> None:
    sources = read_sources(f"demo=1,text={files['text.txt']}")
    evaluation = Evaluation(cascade, sources, tmp_path / "run", stage="tool", settings=SHORT)
    off = hash_logits(cascade)
    evaluation.run(off)
    measured = describe_for_card(read_run(tmp_path / "run").results)
    config = json.loads((files["stage"] / "config.json").read_text())
    card = ModelCard(stage_card(config, {"measured": measured}, parameters=1))
    assert "greedy, constrained, at most 3 tokens per reply, float32" in card.text
    assert "| bits per byte |" in card.text
    assert f"have the SHA-256 `{off}`" in card.text
    assert "on the rows above and on nothing else" in card.text
    bits = measured["suites"]["text"]["metrics"]["bits_per_byte"]["stage"][0]
    assert ("text", "bits_per_byte", bits) in [
        (result.dataset_name, result.metric_type, result.metric_value) for result in card.data.eval_results
    ]
    with pytest.raises(LineageError):  # it is the right stage, on a base that only this machine has
        plan_upload(files["stage"], "me/t", measured=measured)
    for model in ("stage", "base"):
        with pytest.raises(FingerprintError, match=f"The results are of another {model}"):
            plan_upload(files["stage"], "me/t", measured={**measured, model: "0" * 64})
    evaluate(cascade.activate(None), tmp_path / "base", "demo=1")
    with pytest.raises(EvaluationError, match="measured a base alone"):
        describe_for_card(read_run(tmp_path / "base").results)


def test_the_stage_is_measured_alone_and_the_base_added_later(cascade: Cascade, tmp_path: Path) -> None:
    sources = read_sources("demo=1")
    alone = Evaluation(cascade, sources, tmp_path / "run", stage="tool", settings=SHORT, stage_only=True).run()
    assert [set(scores) for scores in alone["scores"].values()] == [{"stage"}] * len(alone["scores"])
    with pytest.raises(EvaluationError, match="without its base: evaluate it without --stage-only"):
        describe_for_card(alone)
    assert "| metric | rows | stage |" in (tmp_path / "run" / "results.md").read_text()
    both = Evaluation(cascade, sources, tmp_path / "run", stage="tool", settings=SHORT).run()
    for name, scores in both["scores"].items():
        assert scores["stage"] == alone["scores"][name]["stage"]
        assert both["suites"][name]["replies"]["stage"] == alone["suites"][name]["replies"]["stage"]  # not asked again
        assert set(scores) == {"base", "stage", "difference"}


def test_three_runs_are_compared_with_adjusted_p_values(cascade: Cascade, tmp_path: Path) -> None:
    for name, limit in (("a", 3), ("b", 4), ("c", 3)):
        evaluate(cascade, tmp_path / name, "demo=1", Settings(max_new_tokens=limit))
    table = compare_runs([read_run(tmp_path / name) for name in "abc"])
    assert "| metric | rows | a | b | b \N{MINUS SIGN} a | c | c \N{MINUS SIGN} a |" in table
    assert "adjusted for the 2 runs that are compared with the first (Holm)" in table
    assert re.search(r"\| clean_stop \|.* \[\+0\.0, \+0\.0\], p 1\.000 \|$", table, re.MULTILINE)


def test_a_p_value_is_the_share_of_exchanges_with_at_least_the_difference() -> None:
    rows = 6
    worse: list[Counts] = [{"exact": (0.0, 1.0)} for _ in range(rows)]
    better: list[Counts] = [{"exact": (1.0, 1.0)} for _ in range(rows)]
    p = compute_p_values(worse, better, exchanges=20_000)["exact"]
    assert p == pytest.approx(2 / 2**rows, abs=0.004)  # none or all of them exchanged
    assert p == compute_p_values(better, worse, exchanges=20_000)["exact"]
    assert compute_p_values(better, better)["exact"] == 1
    assert compute_p_values([{"valid": (0.0, 0.0)}], [{"valid": (1.0, 1.0)}]) == {}
    assert adjust_p_values({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_differences_are_paired() -> None:
    first: list[Counts] = [{"exact": (float(i % 2), 1.0)} for i in range(40)]
    better: list[Counts] = [{"exact": (1.0 if i < 4 else float(i % 2), 1.0)} for i in range(40)]
    difference = summarize_differences(first, better)["exact"]
    assert (difference.value, difference.rows) == (0.05, 40)  # rows 0 and 2 of 40
    alone = summarize(first)["exact"]
    assert difference.high - difference.low < (alone.high - alone.low) / 2  # type: ignore[operator]
    same = summarize_differences(first, first)["exact"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert summarize_differences([{"valid": (0.0, 0.0)}], [{"valid": (1.0, 1.0)}])["valid"].value is None


def test_the_hash_of_a_base_is_that_of_its_logits(cascade: Cascade, demo_base: Path) -> None:
    alone = Cascade.from_pretrained(demo_base, dtype=torch.float32)
    assert hash_logits(cascade) == hash_logits(alone)
    with torch.no_grad():
        alone.base.get_output_embeddings().weight[5, 0] += 1e-3
    assert hash_logits(cascade) != hash_logits(alone)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("demo=2*3", "has epochs or a weight"),
        ("demo=0", "expected demo or demo=NUMBER"),
        ("demo=2,demo=2", "given twice"),
        ("xlamm=rows.json", "Did you mean 'xlam'"),
    ],
)
def test_a_suite_that_cannot_be_asked_is_refused(spec: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_sources(spec)


KILLED = """
import sys
from poe.commands.poe import main
from poe.evaluation.call_suite import CallSuite
CallSuite.batch_size = 4
sys.argv = ["poe", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_an_evaluation_that_was_killed_three_times_ends_with_the_numbers_of_one_that_was_not(
    processes: int, files: dict[str, Path], tmp_path: Path
) -> None:
    def start(folder: Path, processes: int) -> list[subprocess.Popen[bytes]]:
        sampled = ("--free", "--temperature", "0.7", "--samples", "2")
        words = ("eval", files["stage"], "--suite", "demo=8", "--max-new-tokens", "32", *sampled, "--out", folder)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        return [
            subprocess.Popen(
                [sys.executable, "-c", KILLED, *map(str, words)],
                env={**environment, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=-3,
                stderr=-3,
            )
            for rank in range(processes)
        ]

    assert start(tmp_path / "whole", 1)[0].wait() == 0
    answers, lengths = tmp_path / "killed" / "answers.jsonl", []
    for number in range(3):
        started, before = start(tmp_path / "killed", processes), count_lines(answers)
        while started[0].poll() is None and count_lines(answers) < before + 5:
            time.sleep(0.01)
        killed, *others = started[number % processes :] + started[: number % processes]
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL, "it ended before it could be killed"
        assert all(other.wait(60) for other in others), "one that lost its partner ends with an error"
        lengths.append(count_lines(answers))
    assert [process.wait() for process in start(tmp_path / "killed", processes)] == [0] * processes
    assert lengths == sorted(set(lengths))
    assert count_lines(answers) == count_lines(tmp_path / "whole" / "answers.jsonl") > lengths[-1]
    whole, continued = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed"))
    assert continued["scores"] == whole["scores"]
    assert continued["scores_sha256"] == whole["scores_sha256"]


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
