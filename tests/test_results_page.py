"""The page of results and the table of the README come from the files in docs/results."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
METRICS = {"exact": {"title": "exact calls", "digits": 2}, "speed": {"title": "speed", "digits": 1, "unit": "x"}}
ROWS = [
    {"method": "stage", "seed": 0, "metrics": {"exact": 0.5, "speed": [2, 1.5, 2.5]}},
    {"method": "stage", "seed": 1, "metrics": {"exact": [0.7, 0.6, 0.8]}},
    {"method": "base", "metrics": {"exact": 0.0}},
]
RESULT: dict[str, Any] = {
    "title": "T",
    "about": "A.",
    "order": 1,
    "date": "2026-11-28",
    "machine": "2 CPU cores",
    "versions": {"torch": "2"},
    "commands": ["poe eval x"],
    "metrics": METRICS,
    "rows": ROWS,
    "plot": ["exact"],
    "readme": [["what", "{stage|exact} at {stage|speed:.0f}", "{base|exact:.1f}"]],
}


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_page", ROOT / "docs" / "results_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, result: dict[str, Any]) -> None:
    (folder / "r.json").write_text(json.dumps(result))


def test_a_result_becomes_a_table_a_chart_and_a_line_of_the_readme(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    write(tmp_path, RESULT)
    text = page.write_page()
    assert "| method | seeds | exact calls | speed |" in text
    assert "| stage | 2 | 0.60 [0.50, 0.70] | 2.0x [1.5, 2.5] |" in text
    assert "| base | 1 | 0.00 |  |" in text
    assert "poe eval x" in text
    assert "2026-11-28, 2 CPU cores; torch 2." in text
    assert "| what | 0.60 [0.50, 0.70] at 2 | 0.0 |" in page.write_readme_table()
    (chart,) = page.draw_charts().values()
    assert ">0.60 [0.50, 0.70]<" in chart


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"command": []}, "unknown \\['command'\\]"),
        ({"rows": [{"method": "stage", "metrics": {"exakt": 1}}]}, "metrics that are declared"),
        ({"readme": [["what", "{stge|exact}", ""]]}, "there is no value {stge|exact}"),
    ],
)
def test_a_file_without_the_form_is_refused(
    page: ModuleType, change: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    write(tmp_path, {**RESULT, **change})
    with pytest.raises(SystemExit, match=words):
        page.write_readme_table()
