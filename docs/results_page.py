"""Write the tables and charts of docs/results.md and of the README from docs/results/*.json; see CONTRIBUTING.md."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from poe.evaluation.chart import Panel, Point, draw_chart

FOLDER = Path(__file__).parent / "results"
MEASURED = ("title", "about", "order", "date", "machine", "versions", "commands", "metrics", "rows")
PUBLISHED = ("title", "about", "order", "source", "metrics", "rows")
OPTIONAL = ("log", "plot", "readme")
_PLACE = re.compile(r"\{([^{}|]+)\|([^{}|:]+)(?::([^{}]+))?\}")

Result = dict[str, Any]


def read_results() -> list[Result]:
    """Return the results in their order. Ends with a sentence for a file that has not the form."""
    results = []
    for path in sorted(FOLDER.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        expected = PUBLISHED if "source" in result else MEASURED
        missing, unknown = set(expected) - result.keys(), result.keys() - {*expected, *OPTIONAL}
        if missing or unknown:
            sys.exit(f"{path.name}: missing {sorted(missing)}, unknown {sorted(unknown)}")
        for row in result["rows"]:
            if not row.keys() <= {"method", "seed", "metrics"} or not row["metrics"].keys() <= result["metrics"].keys():
                sys.exit(f"{path.name}: a row has a method, a seed, and metrics that are declared, got {row}")
        results.append({**result, "name": path.stem})
    return sorted(results, key=lambda result: (result["order"], result["name"]))


def write_page() -> str:
    """Return the sections of docs/results.md."""
    return "\n".join(["", *map(_write_section, read_results())])


def write_readme_table() -> str:
    """Return the table of the README."""
    lines = ["", "| what was measured | PoE stage | compared with |", "|---|---|---|"]
    for result in read_results():
        for cells in result.get("readme", []):
            lines.append(f"| {' | '.join(_fill(result, cell) for cell in cells)} |".replace("|  |", "| |"))
    return "\n".join([*lines, ""])


def draw_charts() -> dict[Path, str]:
    """Return the chart of each result that has one."""
    return {FOLDER / f"{r['name']}.svg": _draw(r) for r in read_results() if r.get("plot")}


def _write_section(result: Result) -> str:
    parts = [f"## {result['title']}", result["about"], _write_table(result)]
    if result.get("plot"):
        parts.append(f"![{result['title']}: {_list_titles(result)}](results/{result['name']}.svg)")
    if "source" in result:
        parts.append(f"Source: {result['source']}")
    else:
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        log = f" [Set-up and verdict]({result['log']})." if result.get("log") else ""
        if result["commands"]:
            parts.append("To repeat it:\n\n```text\n" + "\n".join(result["commands"]) + "\n```")
        parts.append(f"{result['date']}, {result['machine']}{f'; {versions}' if versions else ''}.{log}")
    return "\n\n".join(parts) + "\n"


def _list_titles(result: Result) -> str:
    return ", ".join(result["metrics"][name]["title"] for name in result["plot"])


def _write_table(result: Result) -> str:
    titles = [metric["title"] for metric in result["metrics"].values()]
    seeds = _count_seeds(result)
    head = ["method", *(["seeds"] if max(seeds.values()) > 1 else []), *titles]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for method, count in seeds.items():
        cells = [_show(result, method, name) for name in result["metrics"]]
        lines.append(f"| {' | '.join([method, *([str(count)] if len(head) > len(titles) + 1 else []), *cells])} |")
    return "\n".join(lines)


def _count_seeds(result: Result) -> dict[str, int]:
    """Return the methods in the order of the rows, and how many rows, one for each seed, they have."""
    counts: dict[str, int] = {}
    for row in result["rows"]:
        counts[row["method"]] = counts.get(row["method"], 0) + 1
    return counts


def _combine(result: Result, method: str, name: str) -> Sequence[float] | None:
    """Return [value] or [value, low, high] of a method: its own interval, or mean, least and most over its seeds."""
    values = [row["metrics"][name] for row in result["rows"] if row["method"] == method and name in row["metrics"]]
    if not values:
        return None
    if len(values) == 1:
        return values[0] if isinstance(values[0], list) else [values[0]]
    points = [value[0] if isinstance(value, list) else value for value in values]
    return [sum(points) / len(points), min(points), max(points)]


def _show(result: Result, method: str, name: str, form: str | None = None) -> str:
    """Return a value with its unit and its interval, or with `form` the number alone; nothing if there is none."""
    found = _combine(result, method, name)
    if found is None:
        return ""
    if form is not None:
        return format(found[0], form)
    metric = result["metrics"][name]
    value, *bounds = (f"{number:,.{metric.get('digits', 3)}f}" for number in found)
    return f"{value}{metric.get('unit', '')}{f' [{bounds[0]}, {bounds[1]}]' if bounds else ''}"


def _fill(result: Result, cell: str) -> str:
    """Return a cell of the README with its values: `{method|metric}` or `{method|metric:format}`."""

    def show(match: re.Match[str]) -> str:
        text = _show(result, match[1], match[2], match[3]) if match[2] in result["metrics"] else ""
        if not text:
            sys.exit(f"{result['name']}: there is no value {match[0]}")
        return text

    return _PLACE.sub(show, cell)


def _draw(result: Result) -> str:
    panels = []
    for name in result["plot"]:
        rows: list[tuple[str, list[Point]]] = []
        for method in _count_seeds(result):
            if found := _combine(result, method, name):
                value, low, high = found if len(found) == 3 else (found[0], None, None)
                rows.append((method, [Point("", value, low, high, _show(result, method, name))]))
        panels.append(Panel(_title_of(result["metrics"][name]), rows))
    return draw_chart(panels, [""], f"{result['title']}: {_list_titles(result)}")


def _title_of(metric: Mapping[str, Any]) -> str:
    return f"{metric['title']} ({metric['better']} is better)" if "better" in metric else str(metric["title"])
