"""The house: nothing imports upward, the network imports nothing of ours, the embedded base is what it claims."""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

import poe
from poe import Cascade
from poe.errors import PoEError
from poe.loaders.repository import EMBEDDED_BASE

SOURCE = Path(poe.__file__).parent
ROOT = SOURCE.parents[1]
# A room and the rooms it may import. The network (modeling) imports nothing of ours: its files travel with every delta.
HOUSE: dict[str, set[str]] = {
    "modeling": set(),
    "errors": {"modeling"},
    "calls": {"errors"},
    "demo": {"calls"},
    "loaders": {"modeling", "errors"},
    "stages": {"calls", "modeling", "errors"},
    "data": {"stages", "calls", "demo", "errors"},
    "decoding": {"modeling", "errors"},
    "cascade": {"loaders", "stages", "decoding", "modeling", "errors"},
    "training": {"cascade", "data", "demo", "calls", "loaders", "stages", "decoding", "modeling", "errors"},
    "evaluation": {"training", "cascade", "data", "calls", "decoding", "modeling", "errors"},
    "commands": {
        *("evaluation", "training", "cascade", "data", "calls", "demo"),
        *("loaders", "stages", "decoding", "modeling", "errors"),
    },
}


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, those for the type checker included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            package = ".".join(path.relative_to(SOURCE.parent).parent.parts)
            names |= {f"{package}.{node.module or alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("poe.")}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_room_imports_only_from_floors_below(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if room in ("assets", "__init__"):  # __init__ names the public objects and imports them when they are used
        return
    for name in imports(path):
        other = name.split(".")[1]
        assert other == room or other in HOUSE[room] or other == "__version__", f"{room} imports {name}"


def test_no_import_circle() -> None:
    """Not even one that only the type checker closes."""
    files = {
        ".".join(p.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): p
        for p in SOURCE.rglob("*.py")
        if p != SOURCE / "__init__.py"
    }
    graph = {name: (imports(path) & files.keys()) - {name} for name, path in files.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_room_is_over_a_third_of_the_source() -> None:
    lines: Counter[str] = Counter()
    for path in SOURCE.rglob("*.py"):
        lines[path.relative_to(SOURCE).parts[0]] += len(path.read_text().splitlines())
    room, most = lines.most_common(1)[0]
    assert most <= lines.total() / 3, f"{room}: {most} of {lines.total()} lines"


def test_the_network_imports_only_what_a_stranger_has() -> None:
    allowed = {"torch", "transformers", "safetensors", "huggingface_hub"} | set(sys.stdlib_module_names)
    for path in (SOURCE / "modeling").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert {n.split(".")[0] for n in names} <= allowed, f"{path.name} imports {names}"


def test_files_have_one_job() -> None:
    for path in [*SOURCE.rglob("*.py"), *(ROOT / "tests").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 500, path


def test_nothing_unpickles_or_evaluates() -> None:
    unsafe = r"\bimport pickle|pickle\.load|torch\.load\((?!.*weights_only=True)|(?<![\w.])eval\(|(?<![\w.])exec\("
    for path in SOURCE.rglob("*.py"):
        assert not re.search(unsafe, path.read_text()), path


def test_the_embedded_base_is_small_and_loads_by_name() -> None:
    weights = EMBEDDED_BASE / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    cascade = Cascade.from_pretrained("demo")
    assert cascade.base.dtype == torch.bfloat16
    assert cascade.tokenizer.chat_template
    record = json.loads((EMBEDDED_BASE / "training.json").read_text())
    assert (record["recipe"]["data"], record["recipe"]["learning"]) == ("demo:2,notations", "local")
    assert cascade.base.config.boundaries == [1, 7]
    assert not [p for end in ("bin", "pkl", "pt") for p in EMBEDDED_BASE.glob(f"*.{end}")]


def test_the_embedded_base_copies_words_it_has_never_seen() -> None:
    """What the demo stands on: a form is filled with an invented name."""
    text = (
        "Forms:\nbook_zorvex(person: string, days: integer) - Book a zorvex\n"
        "Note: Please book a zorvex for Plumkirk for 37 days.\nbook_zorvex: person"
    )
    cascade = Cascade.from_pretrained("demo", dtype=torch.float32)
    ids = cascade.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    output = cascade.generate(**ids, max_new_tokens=14, do_sample=False, eos_token_id=None)
    said = cascade.tokenizer.decode(output[0, ids["input_ids"].shape[1] :])
    assert said.startswith(' = "Plumkirk"; days = 37'), said


def test_every_error_is_one_of_ours() -> None:
    from poe import errors

    classes = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
    assert len(classes) > 8
    assert all(issubclass(c, PoEError) for c in classes)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_readmes_make_commands_exist() -> None:
    for line in "\n".join(blocks("bash")).splitlines():
        if line.startswith("make "):
            done = subprocess.run(
                ["make", "-n", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_readmes_commands_run(tmp_path: Path) -> None:
    """Every command as it stands, but training is cut short."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    programs = {"poe": "poe.commands.poe", "poe-train": "poe.commands.train"}
    ran = 0
    for line in "\n".join(blocks("bash")).splitlines():
        program = line.split()[0] if line.split() else ""
        if program not in programs:
            continue
        shortened = line.replace("--data demo ", "--data demo=200 ")
        extra = " --max-steps 2 --eval-rows 1 --tokens-per-step 1024" if program == "poe-train" else ""
        command = f"{sys.executable} -m {programs[program]} {shortened.removeprefix(program)}{extra}"
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
        # An untrained stage may well answer without a call that fits: that is exit code 1 and one message.
        assert done.returncode == 0 or (program == "poe" and "not accepted" in done.stderr), (line, done.stderr)
        ran += 1
    assert ran >= 4
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[0]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "trainable" in done.stdout
