"""Every command and Python block of the README and the documentation runs, and prints what the page shows.

Training is cut short. Blocks that cannot run here give a reason in the page, and are counted below.
"""

import ast
import contextlib
import doctest
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from command_line import MODULES, run_program
from conftest import mostly_slow
from documented_commands import LANGUAGES, ROOT, Block, blocks, check_options, commands, pages

# How many blocks of a page are not run. Each gives its reason in a comment above it.
NOT_RUN = {
    "README.md": 2,
    "docs/explanation/optimizer.md": 2,
    "docs/how-to/agent.md": 2,
    "docs/how-to/call.md": 1,
    "docs/how-to/choose-layers.md": 1,
    "docs/how-to/decode.md": 6,
    "docs/how-to/evaluate.md": 4,
    "docs/how-to/export.md": 6,
    "docs/how-to/from-peft-and-trl.md": 3,
    "docs/how-to/nanochat.md": 2,
    "docs/how-to/poe-bases.md": 4,
    "docs/how-to/publish.md": 7,
    "docs/how-to/quantized-bases.md": 2,
    "docs/how-to/serve.md": 3,
    "docs/how-to/several-devices.md": 5,
    "docs/how-to/siblings.md": 2,
    "docs/how-to/train.md": 4,
    "docs/how-to/trl.md": 1,
    "docs/tutorial.md": 4,
}
# Run by tests of their own, because they train for a minute.
EXAMPLES_WITH_TESTS = {"examples/train_stage.py": "test_examples.py"}
# Options that make a training command short, unless the page gives them.
SHORT = {"--max-steps": "2", "--tokens-per-step": "1024", "--eval-rows": "1"}
# How `poe call` and examples/load_without_poe.py fail where a stage learned for two steps only.
UNTRAINED = re.compile("not accepted|cut off|no call that can be read|does not fit the tools")
SET_UP = re.compile(r"^(python3 -m venv|(\.venv/bin/)?pip install|source \.venv)")
PAGES = [page for page in pages() if any(block.language in LANGUAGES for block in blocks(page))]
SLOW = ("docs/how-to/", "docs/tutorial.md")  # the tutorial trains on a real base
QUICK_PAGES = [page for page in PAGES if not page.startswith(SLOW)]
REAL_BASE = "benchmarks/smollm2.py"
CHECKER, FLAGS = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a page: the examples, the benchmarks, and rows like those of the Hub."""
    for name in ("examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "public.jsonl").write_text("".join(f"{json.dumps(make_row(number))}\n" for number in range(30)))
    return tmp_path


def make_row(number: int) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": {"city": f"City {number}"}}
    answer = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    tools = json.loads((ROOT / "examples" / "weather.json").read_text())
    question = {"role": "user", "content": f"How is the weather in City {number}?"}
    return {"messages": [question, answer], "tools": tools}


@pytest.mark.parametrize("page", mostly_slow(PAGES, QUICK_PAGES))
def test_the_blocks_of_a_page_run_and_print_what_it_shows(page: str, folder: Path) -> None:
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.language not in LANGUAGES or block.reason_not_run:
            continue
        printed = run_python(block, names) if block.language == "python" else run_commands(block)
        expected = block.expected_output
        if expected is not None:
            assert CHECKER.check_output(expected, printed, FLAGS), f"{block} prints:\n{printed}\nnot:\n{expected}"


@pytest.mark.parametrize("page", PAGES)
def test_a_block_that_is_not_run_has_existing_options_and_names(page: str) -> None:
    for block in blocks(page):
        if not block.reason_not_run:
            continue
        if block.language == "bash":
            for words in commands(block):
                if words[0] in MODULES:
                    check_options(words)
        elif block.language == "python":
            check_imports(block)


def test_the_blocks_that_are_not_run_are_counted() -> None:
    found = Counter(block.page for page in PAGES for block in blocks(page) if block.reason_not_run)
    reasons = "\n".join(f"{b}: {b.reason_not_run}" for page in PAGES for b in blocks(page) if b.reason_not_run)
    assert dict(found) == NOT_RUN, reasons


def run_python(block: Block, names: dict[str, Any]) -> str:
    """Run a Python block with the names of the blocks before it; return what it prints."""
    if ">>>" in block.text:
        test = doctest.DocTestParser().get_doctest(block.text, names, str(block), block.page, block.line - 1)
        report = io.StringIO()
        assert not doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.write, clear_globs=False).failed, (
            report.getvalue()
        )
        names.update(test.globs)
        return ""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.text, str(block), "exec"), names)
    return printed.getvalue()


def run_commands(block: Block) -> str:
    """Run the commands of a block, training ones with fewer and smaller steps; return what they print."""
    return "".join(run_command(block, words) for words in commands(block))


def run_command(block: Block, words: list[str]) -> str:
    line = " ".join(words)
    if words[0] == "make":  # what the target does is what CI runs
        run_process(["make", "-n", *words[1:]], cwd=ROOT)
        return ""
    if SET_UP.match(line):  # the environment of the tests was made like this
        check_extras(line)
        return ""
    if words[0] in MODULES:
        done = run_program(words[0], *shortened(words)[1:])
        assert done.returncode == 0 or UNTRAINED.search(done.stderr), f"{block}: {line}\n{done.stderr}"
        return done.stdout
    if words[:2] == ["python", "-c"]:
        return run_python(Block(block.page, block.line, "python", words[2]), {})
    if words[0] == "python":
        example = words[1]
        if example in EXAMPLES_WITH_TESTS:
            assert example.rpartition("/")[2] in (ROOT / "tests" / EXAMPLES_WITH_TESTS[example]).read_text()
            return ""
        return make_real_base(words) if example == REAL_BASE else run_process([sys.executable, *words[1:]])
    raise AssertionError(f"{block}: no test knows how to run {line!r}. Add `<!-- not run: REASON -->` above the block")


def make_real_base(words: list[str]) -> str:
    """Run the program that makes a real base, or skip what is left of a page without a package index."""
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
    if "CalledProcessError" in done.stderr:
        pytest.skip("no real base: the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_process(words: list[str], cwd: Path | None = None) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or UNTRAINED.search(done.stdout), done.stderr
    return done.stdout


def shortened(words: list[str]) -> list[str]:
    """Return a command with little data and few steps."""
    if words[0] != "poe-train":
        return words
    few = [
        "demo=200" if words[index - 1 : index + 1] == ["--data", "demo"] else word for index, word in enumerate(words)
    ]
    return [*few, *(part for name, value in SHORT.items() if name not in words for part in (name, value))]


def check_extras(line: str) -> None:
    """Assert that every extra that a pip line names exists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for names in re.findall(r"\[([\w,]+)\]", line):
        assert set(names.split(",")) <= project["optional-dependencies"].keys(), line


def check_imports(block: Block) -> None:
    """Assert that a Python block compiles and that what it imports from poe exists."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "poe":
            module = importlib.import_module(str(node.module))
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{block}: {node.module} has no {missing}"
