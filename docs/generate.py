"""Write what the docs can count or list from the code: `python docs/generate.py`. A test checks that it is current.

A page holds a generated block between `<!-- generated: NAME -->` and `<!-- end -->`. The picture of the imports, the
charts of the results, and the page of the recipes are generated whole. `tests/families_page.py` writes the page of the
families, because it needs the tiny models of the tests.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path

from poe.calls.forms.call_forms import CALL_FORMS
from poe.calls.forms.tool_forms import TOOL_FORMS
from poe.commands.reference import write_reference
from poe.data.readers import READERS
from poe.modeling.families import FAMILIES

sys.path.insert(0, str(Path(__file__).parent))
import results_page

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "poe"
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->)(.*?)(<!-- end -->)", re.S)


def families() -> str:
    """Return the declared families as one sentence."""
    return f"{len(FAMILIES)} declared families: {', '.join(f'`{name}`' for name in sorted(FAMILIES))}"


def readers() -> str:
    """Return the table of the readers: Hub id, license, and the first sentence of each module."""
    lines = ["", "| reader | format | on the Hub | license |", "|---|---|---|---|"]
    for name, reader in sorted(READERS.items()):
        sentence = _first_sentence(SOURCE / "data" / "readers" / f"{name}.py").rstrip(".")
        lines.append(f"| `{name}` | {sentence} | {f'`{reader.hub_id}`' if reader.hub_id else ''} | {reader.license} |")
    return "\n".join([*lines, ""])


def reader_count() -> str:
    return f"{len(READERS)} readers"


def forms() -> str:
    """Return the names of the call forms and the tool forms."""
    calls, tools = (", ".join(f"`{name}`" for name in forms) for forms in (CALL_FORMS, TOOL_FORMS))
    return f"\n{len(CALL_FORMS)} call forms: {calls}.\n\n{len(TOOL_FORMS)} tool forms: {tools}.\n"


def rooms() -> str:
    """Return the table of the rooms, from the highest floor down: the first sentence of each, and what it imports."""
    graph, floor = imported_rooms(), floors(imported_rooms())
    lines = ["", "| room | job | imports |", "|---|---|---|"]
    for room in sorted(graph, key=lambda room: (floor[room], room)):
        package = SOURCE / room / "__init__.py"
        job = _first_sentence(package if package.is_file() else SOURCE / f"{room}.py")
        lines.append(f"| `{_label(room)}` | {job} | {', '.join(sorted(graph[room])) or 'nothing of ours'} |")
    return "\n".join([*lines, ""])


def log() -> str:
    """Return the index of the log: date, question's title and verdict of each entry, page by page."""
    lines: list[str] = []
    for page in sorted((ROOT / "docs" / "log").glob("*.md")):
        title, *entries = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.M)
        if page.name == "index.md":
            continue
        lines += ["", f"## {title.partition(': ')[2].splitlines()[0].capitalize()}", ""]
        lines += ["| date | entry | verdict |", "|---|---|---|"]
        for entry in entries:
            name, verdict = entry.splitlines()[0], re.search(r"\*\*Verdict: (.*?)\.?\*\*", entry, re.S)
            anchor = re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-")
            date = re.search(r"\d{4}-\d\d-\d\d", entry)
            if not (verdict and date):
                raise SystemExit(f"docs/log/{page.name}, {name!r}: expected a date and a bold verdict")
            lines.append(f"| {date[0]} | [{name}]({page.name}#{anchor}) | {' '.join(verdict[1].split())} |")
    return "\n".join([*lines, "", ""])


BLOCKS: dict[str, Callable[[], str]] = {
    "families": families,
    "readers": readers,
    "reader-count": reader_count,
    "forms": forms,
    "log": log,
    "rooms": rooms,
    "results": results_page.write_page,
    "results-table": results_page.write_readme_table,
}


def fill(text: str) -> str:
    """Return a page with new generated blocks."""
    return BLOCK.sub(lambda match: match[1] + BLOCKS[match[2]]() + match[4], text)


def _rooms() -> dict[str, list[Path]]:
    rooms: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(SOURCE.rglob("*.py")):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__", "assets"):
            rooms[room].append(path)
    return rooms


def imported_rooms() -> dict[str, set[str]]:
    """Return which rooms each room imports, imports for the type checker included."""
    rooms = _rooms()
    graph: dict[str, set[str]] = {room: set() for room in rooms}
    for room, paths in rooms.items():
        for path in paths:
            for node in ast.walk(ast.parse(path.read_text())):
                names: list[str] = []
                if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                graph[room] |= {
                    part[1] for part in (name.split(".") for name in names) if part[0] == "poe" and part[1:]
                }
    return {room: (others & rooms.keys()) - {room} for room, others in graph.items()}


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Return the floor of each room, counted from the top: one below the lowest room that imports it."""
    floor = dict.fromkeys(graph, 0)
    for room in reversed([*TopologicalSorter(graph).static_order()]):  # a circle is a CycleError that names it
        for other in graph[room]:
            floor[other] = max(floor[other], floor[room] + 1)
    return floor


def _reachable(graph: dict[str, set[str]], room: str) -> set[str]:
    return graph[room].union(*(_reachable(graph, other) for other in graph[room]))


def _label(room: str) -> str:
    return f"{room}/" if (SOURCE / room).is_dir() else f"{room}.py"


def _first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n\n")[0].replace("\n", " ")


def imports_picture() -> str:
    """Return the SVG of the rooms on their floors. An arrow that a longer path implies is left out."""
    graph = imported_rooms()
    floor, reach = floors(graph), {room: _reachable(graph, room) for room in graph}
    edges = [
        (room, other)
        for room in sorted(graph)
        for other in sorted(graph[room])
        if not any(other in reach[between] for between in graph[room] - {other})
    ]
    width, height, gap = 120, 34, 70
    place: dict[str, tuple[float, float]] = {}
    for level in range(max(floor.values()) + 1):
        # A room is placed under the rooms that import it; neighbors keep a distance.
        middle = {
            room: sum(xs) / len(xs) if (xs := [place[above][0] for above, below in edges if below == room]) else 330
            for room in graph
            if floor[room] == level
        }
        names = sorted(middle, key=lambda room: (middle[room], room))
        center = sum(middle.values()) / len(middle)
        for i, room in enumerate(names):
            place[room] = (center + (i - (len(names) - 1) / 2) * 160, 40 + level * gap)
    total = 80 + max(floor.values()) * gap
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 {total}" font-family="Arial, Helvetica, sans-serif" '
        'font-size="14" role="img" aria-label="The rooms of the package on their floors; arrows point to what a room '
        'imports.">',
        f'<rect width="660" height="{total}" fill="#ffffff"/>',
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#8792a2"/></marker></defs>',
    ]
    for room, other in edges:
        (x1, y1), (x2, y2) = place[room], place[other]
        below, above = y1 + height / 2, y2 - height / 2
        # A line over several floors bends outwards, so that it does not cross the rooms between.
        crossed = floor[other] - floor[room]
        bend = 0 if crossed == 1 else (1 if x1 + x2 >= 660 else -1) * (60 + 40 * crossed)
        middle = (below + above) / 2
        parts.append(
            f'<path d="M{x1:g} {below:g} C{x1 + bend:g} {middle:g} {x2 + bend:g} {middle:g} {x2:g} {above:g}" '
            'fill="none" stroke="#8792a2" stroke-width="1.5" marker-end="url(#a)"/>'
        )
    for room, (x, y) in place.items():
        parts += [
            f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width}" height="{height}" rx="5" '
            'fill="#e5e9f0" stroke="#8792a2"/>',
            f'<text x="{x:g}" y="{y + 5:g}" text-anchor="middle" fill="#1f2937">{_label(room)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def outdated() -> dict[Path, str]:
    """Return what has to be written: file -> its current content."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    wanted = {page: fill(page.read_text(encoding="utf-8")) for page in pages if page.is_file()}
    wanted[ROOT / "docs" / "explanation" / "imports.svg"] = imports_picture()
    wanted[ROOT / "docs" / "reference" / "recipes.md"] = write_reference()
    wanted |= results_page.draw_charts()
    return {
        path: text for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    }


if __name__ == "__main__":
    changes = outdated()
    for path, text in changes.items():
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
    sys.exit(bool(changes) and "--check" in sys.argv)
