"""The baseline kit: it continues where it was killed, and what a method saves is what it trained."""

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import baselines
from baseline_methods import METHODS

from conftest import demo_tokenizer, tiny_model
from poe.loaders.base import save_base_folder

SIZES = ["--seq-len", "256", "--rows-per-step", "2", "--attach-at", "1", "--dtype", "float32", "--held-out", "0.2"]
SHAPE = {"head_dim": 16, "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 600, "tie_word_embeddings": True}
LIMITS = ["--rows", "2", "--forced-rows", "3", "--val-rows", "2", "--max-new-tokens", "3"]


def question(number: int) -> str:
    """Return a row: a question that is like no other one, and the call that answers it."""
    words = [f"{random.Random(8 * number + i).getrandbits(40):x}" for i in range(6)]
    tool = {"name": "ping", "parameters": {"type": "object", "properties": {"host": {"type": "string"}}}}
    call = {"name": "ping", "arguments": json.dumps({"host": words[0]})}
    turns = [
        {"role": "user", "content": " ".join(words)},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
    ]
    return json.dumps({"messages": turns, "tools": [{"type": "function", "function": tool}]})


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of the kit for a tiny base: 40 rows to train on, of which two are in the suite as well."""
    folder = tmp_path_factory.mktemp("kit")
    model = tiny_model("qwen3", SHAPE)
    model.config.max_position_embeddings = 512
    save_base_folder(model, folder / "base", demo_tokenizer())
    (folder / "train.jsonl").write_text("\n".join(question(n) for n in range(40)))
    (folder / "test.jsonl").write_text("\n".join(question(n) for n in range(38, 44)))
    (folder / "text.txt").write_text("The lighthouse keeper counted forty boats.")
    suites = f"messages={folder / 'test.jsonl'},text={folder / 'text.txt'}"
    sources = ["--base", str(folder / "base"), "--data", f"messages={folder / 'train.jsonl'}", "--suites", suites]
    return ["baselines.py", *sources, *SIZES, *LIMITS]


def run_kit(monkeypatch: pytest.MonkeyPatch, command: list[str], killed_at: int = 0) -> list[str]:
    """Run the kit in this process; return the tasks that it started. It is killed inside task `killed_at`."""
    started: list[str] = []

    def start(kit: baselines.Kit, task: str, run: baselines.Run) -> bool:
        started.append(f"{task} {run.name}")
        if len(started) == killed_at:
            kit.folder(run).mkdir(parents=True, exist_ok=True)
            raise KeyboardInterrupt
        baselines.child(task, asdict(run), kit.options, str(kit.folder(run)))
        return True

    monkeypatch.setattr(baselines.Kit, "start", start)
    monkeypatch.setattr(sys, "argv", command)
    if killed_at:
        with pytest.raises(KeyboardInterrupt):
            baselines.main()
    else:
        assert baselines.main() == 0
    return started


def test_a_killed_kit_continues_with_the_run_that_is_missing(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["--methods", "base", "fork", "stage", "--rates", "fork=0.01,0.03", "stage=0.01", "--steps", "2"]
    call = [*command, *methods, "--seeds", "0", "--out", str(tmp_path)]
    first = run_kit(monkeypatch, call, killed_at=4)
    assert first == ["train base-0-0-0", "train fork-0.01-2-0", "validate fork-0.01-2-0", "train fork-0.03-2-0"]
    second = run_kit(monkeypatch, call, killed_at=5)
    assert second[:3] == ["train fork-0.03-2-0", "validate fork-0.03-2-0", "train stage-0.01-2-0"]
    assert second[3] == "measure base-0-0-0"
    assert second[4].startswith("measure fork-"), "of a sweep only the best rate is measured"
    capsys.readouterr()
    assert run_kit(monkeypatch, call) == [second[4], "measure stage-0.01-2-0"]
    assert run_kit(monkeypatch, call) == []

    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["method"].partition(",")[0] for row in rows] == ["base", "fork", "stage"]
    assert rows[1]["metrics"]["artifact_bytes"] > rows[0]["metrics"]["artifact_bytes"] == 0
    tokens = {json.loads(file.read_text()).get("tokens") for file in tmp_path.glob("runs/*/training.json")}
    assert len(tokens - {None}) == 1, "all methods read the same rows"
    names = {"messages: exact", "messages, teacher-forced: forced_calls", "text: bits_per_byte"}
    assert all(names <= set(row["metrics"]) for row in rows)
    assert "| stage, 0.01, 2 steps | 1 |" in capsys.readouterr().out
    header = json.loads((tmp_path / "runs/base-0-0-0/measured/results.json").read_text())
    assert header["suites"]["messages"]["dropped"]["question of the training data"] == 2
    with pytest.raises(SystemExit, match="other options"):
        run_kit(monkeypatch, [*call, "--rows", "1"])


def test_equal_seconds_gives_a_faster_method_more_steps(command: list[str], tmp_path: Path) -> None:
    options = ["--methods", "lora", "fork", "--seeds", "0", "1", "--equal-seconds", "fork=lora", "--steps", "10"]
    kit = baselines.Kit(baselines.read_arguments([*command[1:], *options, "--out", str(tmp_path)]), {})
    for run in [*kit.sweep("lora"), *kit.sweep("fork")]:
        is_lora = run.method == "lora"
        kit.folder(run).mkdir(parents=True)
        validation = {"forced_calls": 0.5 if run.rate == 6e-3 else 0.4, "forced_nats": run.rate}
        baselines.write_json(kit.folder(run) / "validation.json", validation)
        baselines.write_json(kit.folder(run) / "training.json", {"step_seconds": 6.0 if is_lora else 2.0})
    first, second = [list(kit.runs(seed)) for seed in (0, 1)]
    assert len(first) == 3 + 3 + 1
    assert first[-1] == baselines.Run("fork", 6e-3, 30, 0, "lora")
    assert [(run.method, run.rate, run.steps) for run in second] == [
        ("lora", 6e-3, 10),
        ("fork", 6e-3, 10),
        ("fork", 6e-3, 30),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name != "base"])
def test_what_a_method_saves_has_learned(
    name: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = METHODS[name].rates[-1]
    options = ["--methods", "base", name, "--rates", f"{name}={rate}", "--seeds", "0", "--steps", "8"]
    run_kit(monkeypatch, [*command, *options, "--out", str(tmp_path)])
    base, learned = json.loads((tmp_path / "results.json").read_text())["rows"]
    key = "messages, teacher-forced: forced_nats"
    assert learned["metrics"][key][0] < base["metrics"][key][0]
    results: Any = [json.loads(file.read_text()) for file in tmp_path.glob("runs/*/measured/results.json")]
    assert len({result["base"]["fingerprint"] for result in results}) == 2


def test_further_passes_over_few_rows_and_no_replies(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = ["--rates", "fork=0.01", "fork-cached=0.01"]
    options = ["--methods", "fork", "fork-cached", *rates, "--steps", "4", "--train-rows", "3", "--seeds", "0"]
    more = ["--augment", "contrast=0.5", "--rows", "0", "--out", str(tmp_path)]
    run_kit(monkeypatch, [*command, *options, *more])
    fork, cached = json.loads((tmp_path / "results.json").read_text())["rows"]
    nats = "messages, teacher-forced: forced_nats"
    assert fork["metrics"][nats] == pytest.approx(cached["metrics"][nats], rel=0.01)  # the cache is in bf16
    assert "messages: exact" not in fork["metrics"]
    record = json.loads((tmp_path / "runs" / "fork-0.01-4-0" / "training.json").read_text())
    assert record["training_rows"] == 3


def test_questions_that_are_set_aside_are_asked_and_not_trained_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--methods", "base", "fork", "--rates", "fork=0.01", "--steps", "1", "--seeds", "0", "--test-rows", "4"]
    run_kit(monkeypatch, [*command, *options, "--out", str(tmp_path)])
    test, train = [
        {json.loads(line)["messages"][0]["content"] for line in (tmp_path / "rows" / name).read_text().splitlines()}
        for name in ("test-messages.jsonl", "train-messages.jsonl")
    ]
    assert (len(test), len(train)) == (4, 36)
    assert not test & train
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {"test-messages: exact", "test: exact"} <= set(rows[0]["metrics"])
