"""The examples run as their docstrings say."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


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
