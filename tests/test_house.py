"""The structure of the source: rooms import from the floors below them only, there is no circle, and files stay small.

docs/explanation/design.md describes the rooms.
"""

import ast
import re
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import poe
from poe import errors

SOURCE = Path(poe.__file__).parent
ROOT = SOURCE.parents[1]
# Every room with the rooms it may import, from the lowest floor to the highest. The files of modeling travel with every
# delta, so modeling imports none of our other rooms.
ROOMS: dict[str, set[str]] = {
    "modeling": set(),
    "errors": {"modeling"},
    "files": {"modeling", "errors"},
    "calls": {"errors"},
    "demo": {"calls"},
    "loaders": {"files", "modeling", "errors"},
    "stages": {"calls", "modeling", "errors"},
    "data": {"files", "stages", "calls", "demo", "errors"},
    "decoding": {"files", "modeling", "errors"},
    "chat": {"data", "calls", "decoding", "loaders", "modeling", "errors"},
    "cascade": {"chat", "loaders", "stages", "decoding", "modeling", "errors"},
    "serving": {"cascade", "chat", "decoding", "data", "calls", "loaders", "modeling", "errors"},
    "tools": {"cascade", "chat", "data", "calls", "loaders", "errors"},
    "training": {"files", "cascade", "data", "demo", "calls", "loaders", "stages", "decoding", "modeling", "errors"},
    "evaluation": {
        *("training", "tools", "cascade", "chat", "data", "calls", "loaders", "decoding", "files", "modeling"),
        "errors",
    },
    "commands": {
        *("evaluation", "training", "serving", "tools", "cascade", "data", "calls", "demo"),
        *("loaders", "stages", "decoding", "files", "modeling", "errors"),
    },
}
MAX_LINES = 500
# They name the public objects and start the command line. No room imports them.
ENTRY_POINTS = ("__init__.py", "__main__.py")
FILES = sorted(SOURCE.rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Return the modules of poe that a file imports, for the type checker or at run time."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.ImportFrom) and node.level:
            package = path.relative_to(SOURCE.parent).parent.parts
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
            names |= {".".join(base), *(".".join([*base, alias.name]) for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("poe.")}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_every_room_is_listed_and_imports_lower_floors_only() -> None:
    found = {room_of(path) for path in FILES if str(path.relative_to(SOURCE)) not in ENTRY_POINTS}
    assert found - {"assets"} == set(ROOMS)
    below: set[str] = set()
    for room, allowed in ROOMS.items():
        assert allowed <= below, f"{room} may not import {allowed - below}"
        below.add(room)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_imports_only_rooms_that_its_room_may_import(path: Path) -> None:
    if str(path.relative_to(SOURCE)) in ENTRY_POINTS:
        return
    room = room_of(path)
    for name in imported_modules(path):
        imported = name.split(".")[1]
        assert imported in {room, "__version__", *ROOMS.get(room, ())}, f"{room} imports {name}"


def test_there_is_no_import_circle() -> None:
    """Imports for the type checker count as well."""
    files = {
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in FILES
        if path != SOURCE / "__init__.py"
    }
    graph = {name: (imported_modules(path) & files.keys()) - {name} for name, path in files.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_room_holds_more_than_a_third_of_the_source() -> None:
    lines: Counter[str] = Counter()
    for path in FILES:
        lines[room_of(path)] += len(path.read_text(encoding="utf-8").splitlines())
    room, most = lines.most_common(1)[0]
    assert most <= lines.total() / 3, f"{room}: {most} of {lines.total()} lines"


def test_modeling_imports_only_what_every_user_of_transformers_has() -> None:
    allowed = {"torch", "transformers", "safetensors", "huggingface_hub"} | set(sys.stdlib_module_names)
    for path in (SOURCE / "modeling").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, f"{path.name} imports {names}"


def test_no_file_is_too_long() -> None:
    folders = [ROOT / name for name in ("tests", "benchmarks", "examples", "docs")]
    for path in [*FILES, *(path for folder in folders for path in folder.rglob("*.py"))]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES, path


def test_no_file_unpickles_or_evaluates() -> None:
    unsafe = r"\bimport pickle|pickle\.load|torch\.load\((?!.*weights_only=True)|(?<![\w.])eval\(|(?<![\w.])exec\("
    for path in FILES:
        assert not re.search(unsafe, path.read_text(encoding="utf-8")), path


def test_every_error_derives_from_poe_error() -> None:
    classes = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
    assert len(classes) > 8
    assert all(issubclass(error, errors.PoEError) for error in classes)
