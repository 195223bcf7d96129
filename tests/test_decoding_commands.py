"""The decoding options of `poe generate`, and `poe calibrate`."""

import json
import subprocess
from pathlib import Path

import pytest

from command_line import run_program
from conftest import scramble
from poe import Cascade, StageConfig

TEXT = "w5 w6 w7 w8"


@pytest.fixture(scope="module")
def folders(saved_base, tmp_path_factory) -> dict[str, str]:
    """Return the paths of a PoE base with two stages, of two siblings on it, and of a text."""
    root = tmp_path_factory.mktemp("decoding")
    base = saved_base("poe-stages")
    paths = {"base": str(base)}
    for seed, name in enumerate(("tool", "math")):
        cascade = Cascade.from_pretrained(base).add_stage(StageConfig(name, 1, "low_rank", 4), seed=seed)
        scramble(cascade.stages[name], seed)
        paths[name] = str(cascade.save_stage(name, root / name))
    (root / "text.txt").write_text("<|endoftext|>".join(f"w{i} w{i + 1} w{i + 2} w{i % 7 + 3}" for i in range(3, 50)))
    paths["text"] = str(root / "text.txt")
    return paths


def poe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_program("poe", *arguments)


def output_of(*arguments: str) -> str:
    done = poe(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_strategy_generates_from_the_command_line(folders, tmp_path: Path) -> None:
    base, short = folders["base"], ("--max-new-tokens", "12")
    plain = output_of("generate", base, TEXT, *short)
    assert output_of("generate", base, TEXT, "--strategy", "draft=1", *short) == plain
    assert output_of("generate", base, TEXT, "--strategy", "exit=1", *short) != plain
    assert output_of("generate", base, TEXT, "--strategy", "exit=2", *short) == plain

    depth = tmp_path / "depth.json"
    table = output_of("calibrate", base, "--data", f"text={folders['text']}", "--agreement", "0.5", "--out", str(depth))
    assert "agreement with full depth" in table
    assert json.loads(depth.read_text())["target"] == 0.5
    assert output_of("generate", base, TEXT, "--strategy", f"adaptive={depth}", *short)

    tool = output_of("generate", folders["tool"], TEXT, *short)
    assert output_of("generate", folders["tool"], TEXT, "--with", f"{folders['math']}=0", *short) == tool
    math = output_of("generate", folders["math"], TEXT, *short)
    assert output_of("generate", folders["tool"], TEXT, "--with", f"{folders['math']}=1", *short) == math != tool


def test_a_bad_option_ends_in_one_message(folders, tmp_path: Path) -> None:
    for arguments, words in (
        ((folders["base"], TEXT, "--strategy", "exit=5"), "but this base has exits after its stages"),
        ((folders["tool"], TEXT, "--with", folders["math"]), "expected REPO=WEIGHT"),
        ((folders["tool"], TEXT, "--with", f"{folders['math']}=0.5", "--strategy", "exit=1"), "at full depth"),
        (
            (folders["base"], TEXT, "--strategy", "exit=first"),
            "--strategy: expected exit=DEPTH, adaptive=FILE",
        ),
        ((folders["base"], TEXT, "--strategy", f"adaptive={folders['text']}"), "is not a saved adaptive depth"),
    ):
        done = poe("generate", *arguments)
        assert done.returncode == 1, arguments
        assert words in " ".join(done.stderr.split()), done.stderr
        assert "Traceback" not in done.stderr
