"""The notebook of the tour runs from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest

TOUR = Path(__file__).parents[2] / "examples" / "tour.ipynb"


def read():
    return pytest.importorskip("nbformat").read(TOUR, as_version=4)


def test_the_tour_is_a_valid_notebook_with_its_figures():
    notebook = read()
    pytest.importorskip("nbformat").validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output.output_type == "error"]
    assert "site-packages" not in TOUR.read_text(
        encoding="utf-8"
    )  # no warning with a path of someone's machine


@pytest.mark.slow
def test_the_tour_runs_in_five_minutes(tmp_path):
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = read()
    client.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
