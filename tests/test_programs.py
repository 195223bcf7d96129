"""The programs themselves: `--version`, the lists of recipes and readers, `python -m poe`, and shell completion."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import poe
from command_line import run_program
from poe.data.readers import READERS
from poe.stages import BaseRecipe, list_recipes

WIDE = {"COLUMNS": "200"}


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **WIDE, **environment},
    )


@pytest.mark.parametrize("module", [["poe"], ["poe", "train"], ["poe.commands.poe"], ["poe.commands.train"]])
def test_version_is_printed(module: list[str]) -> None:
    done = run_module(*module, "--version")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"poe-cascade {re.escape(poe.__version__)}, torch \S+, transformers \S+\n", done.stdout)


def test_python_m_poe_is_poe_and_reaches_poe_train() -> None:
    assert "Usage: poe [OPTIONS] COMMAND" in run_module("poe", "--help").stdout
    assert "Usage: poe-train stage [OPTIONS] [recipe]" in run_module("poe", "train", "stage", "--help").stdout
    assert run_module("poe", "trains").returncode == 2


def test_recipes_are_listed_with_their_descriptions() -> None:
    done = run_program("poe", "recipes", environment=WIDE)
    assert done.returncode == 0, done.stderr
    assert "poe-train stage tool" in done.stdout
    assert "Function calling, as published" in done.stdout
    for name in list_recipes(BaseRecipe):
        assert f"poe-train base {name}" in done.stdout


def test_a_recipe_is_printed_with_the_meaning_of_its_fields(tmp_path: Path) -> None:
    shown = run_program("poe", "recipes", "demo", environment=WIDE).stdout
    assert re.search(r"max_steps +│ 380 +│ int\|null +│ Number of optimizer steps", shown)
    assert re.search(r"vocab_size +│ 1536 ", shown)  # of the base recipe with this name
    assert re.search(r"paraphrase +│ 0.0 ", shown)
    (tmp_path / "mine.yaml").write_text("augment: {mask: 0.25}\n")
    shown = run_program("poe", "recipes", "mine.yaml", cwd=tmp_path, environment=WIDE).stdout
    assert re.search(r"mask +│ 0.25 ", shown)
    assert "vocab_size" not in shown
    unknown = run_program("poe", "recipes", "tol")
    assert unknown.returncode == 1
    assert "Did you mean 'tool'? Known: chat, chat-fork, code, code-fork, demo, demo-notations," in unknown.stderr


def test_readers_are_listed_with_license_and_data_set() -> None:
    lines = run_program("poe", "readers", environment=WIDE).stdout.splitlines()
    assert len(lines) == 1 + len(READERS)
    assert ["xlam", "CC-BY-4.0", "Salesforce/xlam-function-calling-60k"] in [line.split() for line in lines]


@pytest.mark.parametrize(
    ("program", "words", "completions"),
    [
        ("train", "poe-train stage t", ["tool", "tool-fork"]),
        ("train", "poe-train base demo", ["demo", "demo-notations"]),
        ("train", "poe-train stage --warm", ["--warmup-ratio", "--warmdown-ratio"]),
        ("poe", "poe recipes tex", ["text"]),
        ("poe", "poe gen", ["generate"]),
    ],
)
def test_the_shell_completes_recipes_options_and_commands(program: str, words: str, completions: list[str]) -> None:
    variable = f"_{words.split()[0].replace('-', '_').upper()}_COMPLETE"
    given = {variable: "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = run_module(f"poe.commands.{program}", **given)
    assert sorted(done.stdout.split()) == sorted(completions), done.stderr


def test_completion_can_be_shown_and_installed(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    for module, name in ((["poe"], "poe"), (["poe", "train"], "poe-train")):
        shown = run_module(*module, "--show-completion", "bash", **home)
        assert f"complete -o default -F _{name.replace('-', '_')}_completion {name}" in shown.stdout, shown.stderr
        installed = run_module(*module, "--install-completion", "bash", **home)
        assert installed.returncode == 0, installed.stderr
        assert (tmp_path / ".bash_completions" / f"{name}.sh").read_text() in shown.stdout
