"""The examples run as their docstrings say."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import scramble
from poe import Cascade

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_train_stage_example_learns_and_its_stage_loads_without_poe(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "train_stage.py", "--steps", "3", "--out", tmp_path / "stage"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run.stdout)]
    assert len(losses) == 2  # of the first and the last step
    assert losses[1] < losses[0]
    assert (tmp_path / "stage" / "delta.safetensors").is_file()
    reply = ast.literal_eval(re.search(r"after:  (.*)", run.stdout)[1])
    assert f"reply:    {reply}\n" in run.stdout  # the saved stage gives the same reply without poe


def test_train_stage_example_is_short() -> None:
    assert len((EXAMPLES / "train_stage.py").read_text().splitlines()) < 160


def test_two_specialists_of_one_name_answer_alone_and_together(tmp_path: Path, monkeypatch, capsys) -> None:
    for seed, folder in enumerate(("first", "second")):
        cascade = Cascade.from_pretrained("demo").add_stage(name="tool", num_layers=1)
        scramble(cascade.stages["tool"], seed=seed, scale=0.01)
        cascade.save_stage("tool", tmp_path / folder)
    program = str(EXAMPLES / "two_specialists.py")
    monkeypatch.setattr(sys, "argv", [program, str(tmp_path / "first"), str(tmp_path / "second")])
    runpy.run_path(program, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["tool", "tool-2", "base", "product"]
