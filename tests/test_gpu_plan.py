"""The plan of a short GPU slot: best first, each result kept at once, continued by the next call."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_plan
import training_gpu

OPTIONS = {"small": False, "speed": {}, "base": "b"}
POINT = {
    "tokens_per_s": 10.0,
    "seconds": 1.0,
    "peak_bytes": 0,
    "held_out_loss": 1.0,
    "trained": 5,
    "rows": 1,
    "calls_right": 0.5,
}


def arms(*seconds: int) -> list[gpu_plan.Arm]:
    return [gpu_plan.Arm(f"Arm {i}", "none.py", [], limit) for i, limit in enumerate(seconds)]


def test_the_plan_begins_with_the_comparison_and_has_every_speed_arm_not_compiled_first() -> None:
    plan = gpu_plan.make_arms(OPTIONS)
    names = [arm.name for arm in plan]
    assert names[:3] == list(gpu_plan.COMPARED)[:3]
    assert set(gpu_plan.COMPARED) <= set(names)
    assert len({arm.file(Path()) for arm in plan}) == len(names)
    for shape in ("poe-d24", "qwen3-1.7b"):
        own = [name for name in names if name.startswith(shape)]
        assert own[0].endswith(training_gpu.REFERENCE)
        assert any(name.endswith("compiled") for name in own)
    assert all(arm.task[0] in training_gpu.ARMS for arm in plan if arm.script == "training_gpu.py")
    assert sum(arm.seconds for arm in plan[:6]) <= 900


def test_a_second_call_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    now, started = [0.0], []

    def start(arm: gpu_plan.Arm, seconds: float) -> dict:
        """Take 70 seconds, or be cut short."""
        started.append((arm.name, seconds))
        kept = json.loads((tmp_path / "arm-0.json").read_text()) if len(started) > 1 else {"complete": True}
        assert kept["complete"], "a result is on disk before the next arm starts"
        took = min(70, seconds)
        now[0] += took
        return {"points": [POINT] * (took == 70), "timed_out": took < 70}

    plan = arms(100, 60, 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_plan.time, "monotonic", lambda: now[0])
        first = gpu_plan.run_plan(plan, 170, tmp_path, OPTIONS, start, lambda text: None)
        assert started == [("Arm 0", 100), ("Arm 1", 60), ("Arm 2", 40)]
        assert [first[arm.name]["complete"] for arm in plan] == [True, True, False]  # its own limit ends an arm
        second = gpu_plan.run_plan(plan, 170, tmp_path, OPTIONS, start, lambda text: None)
        assert started[3:] == [("Arm 2", 100)]
        assert all(second[arm.name]["complete"] for arm in plan)
        with pytest.raises(SystemExit, match="other options"):
            gpu_plan.run_plan(plan, 170, tmp_path, {**OPTIONS, "base": "c"}, start)


def test_an_arm_that_hangs_or_fails_is_ended_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "arm.py"
    script.write_text(
        "import json, sys, time\n"
        "print(json.dumps({'tokens_per_s': 1}), flush=True)\n"
        "print('{not json')\n"
        "time.sleep(60) if json.loads(sys.argv[2]) == ['hang'] else sys.exit('it broke')\n"
    )
    monkeypatch.setattr(gpu_plan, "HERE", tmp_path)
    hung = gpu_plan.run_arm(gpu_plan.Arm("a", "arm.py", ["hang"], 9), 2)
    assert hung == {"points": [{"tokens_per_s": 1}], "timed_out": True}
    failed = gpu_plan.run_arm(gpu_plan.Arm("a", "arm.py", ["fail"], 9), 30)
    assert (failed["error"], failed["timed_out"]) == ("it broke", False)
    text = gpu_plan.tables({"LoRA r16, TRL": {"points": [POINT]}, "x": {"points": [], "error": "it broke"}}, None)
    assert "| LoRA r16, TRL | 0.0 | 10 | 1.0 | 0.0 | 1.0000 | 0.500 |" in text
    assert "- x: it broke" in text


def test_times_have_a_unit() -> None:
    assert [gpu_plan.parse_seconds(text) for text in ("10min", "90s", "1h", "1.5min")] == [600, 90, 3600, 90]
    with pytest.raises(argparse.ArgumentTypeError, match="such as 10min"):
        gpu_plan.parse_seconds("10")


def test_a_machine_without_a_gpu_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_plan.sys, "argv", ["training_gpu.py", "--plan", "10min"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^Expected a CUDA device, but found none\. Use --small"):
        training_gpu.main()


@pytest.mark.slow
def test_a_small_plan_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(gpu_plan.HERE / "training_gpu.py"),
        "--plan",
        "10min",
        "--small",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run([*command, "--arms", "chain"], capture_output=True, text=True, check=True)
    assert "1 of 1 arms done" in done.stdout
    assert "| chain, a fork on a fork | " in (tmp_path / "tables.md").read_text()
