"""The notebook runs from its first cell to its last, and its specialist answers what the base cannot."""

import os
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_specialist.ipynb"


def outputs(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.slow
def test_the_notebook_trains_a_specialist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(NOTEBOOK.parents[1] / "src")])))
    monkeypatch.setenv("POE_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    before, after = (cell for cell in notebook.cells if "cascade.call(question, TOOLS)" in cell.source)
    assert "Call(name='rent_boat'" not in outputs(before)
    for call in ("{'person': 'Zoe', 'days': 41}", "{'harbor': 'Trieste'}"):
        assert call in outputs(after), outputs(after)
    assert any(outputs(cell).strip() == "True" for cell in notebook.cells if cell.cell_type == "code")
