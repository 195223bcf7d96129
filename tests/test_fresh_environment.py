"""A published folder in somebody else's environment: torch, transformers and safetensors, and nothing of ours.

Twice: with the oldest transformers that pyproject.toml allows, and with the newest that the tests were run with.
"""

import json
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import scramble, token_ids
from poe import Cascade, StageConfig

ROOT = Path(__file__).parents[1]
FOLDERS = {"poe": "dense", "qwen3-tied": "low_rank", "llama": "none"}
STRANGER = """
import importlib.util, json, sys
assert importlib.util.find_spec("poe") is None
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
transformers.logging.set_verbosity_error()
job, answers = json.load(sys.stdin), {"version": transformers.__version__}
for folder in job["folders"]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = torch.tensor(job["ids"])
    tokens = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        answers[folder] = [model(ids).logits.tolist(), tokens.tolist(), tokenizer("w5 w6").input_ids]
print(json.dumps(answers))
"""


def oldest() -> str:
    return re.search(r'"transformers>=([\d.]+)', (ROOT / "pyproject.toml").read_text())[1]


def newest() -> str:
    return re.search(r"^transformers==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]


@pytest.mark.slow
def test_a_stranger_sees_the_same(saved_base, tmp_path: Path) -> None:
    expected = {}
    for base, head in FOLDERS.items():
        cascade = Cascade.from_pretrained(saved_base(base)).add_stage(StageConfig("parent", 1, head, 4))
        scramble(cascade.stages["parent"])
        cascade.save_stage("parent", tmp_path / f"on-{base}" / "parent")
        cascade.add_stage(StageConfig("child", 1, "low_rank", 4, parent="parent"))
        scramble(cascade.stages["child"], seed=1)
        folder = str(cascade.save_stage("child", tmp_path / f"on-{base}" / "child"))
        ids = token_ids()
        tokens = cascade.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        saved = Cascade.from_pretrained(folder)
        with torch.no_grad():
            expected[folder] = (saved(ids).logits, tokens.tolist())
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    torch_pin = re.search(r"^torch==.+$", (ROOT / "constraints.txt").read_text(), re.M)[0]
    for version in (oldest(), newest()):  # in one environment: installing torch takes longest
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", torch_pin]
        subprocess.run([*install, f"transformers=={version}", "safetensors"], check=True, timeout=900)
        check_answers(python, version, expected, saved.tokenizer, tmp_path)


def check_answers(
    python: Path, version: str, expected: dict[str, tuple[torch.Tensor, Any]], tokenizer: Any, cwd: Path
) -> None:
    done = subprocess.run(
        [python, "-I", "-W", "ignore", "-c", STRANGER],  # isolated: without PYTHONPATH
        input=json.dumps({"ids": token_ids().tolist(), "folders": list(expected)}),
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert seen.pop("version").startswith(version)
    for folder, (logits, tokens) in expected.items():
        their_logits, their_tokens, words = seen[folder]
        torch.testing.assert_close(torch.tensor(their_logits), logits)
        assert their_tokens == tokens
        assert words == tokenizer("w5 w6").input_ids
