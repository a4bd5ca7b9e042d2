"""The tutorial notebook runs in a kernel, and shows pictures and the bar."""

import json
import warnings
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


def outputs_of(cells):
    return [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]


def pictures(outputs):
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def text(outputs):
    return "".join("".join(output.get("text", "")) for output in outputs)


def test_the_notebook_is_executed(tmp_path):
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.reads(NOTEBOOK.read_text().replace("rounds=8", "rounds=2"), as_version=4)
    with warnings.catch_warnings():
        # Jupyter's own.
        warnings.simplefilter("ignore")
        nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = outputs_of(notebook.cells)
    assert len(pictures(outputs)) == 4
    assert "Rounds: 100%" in text(outputs)
    assert "2/2" in text(outputs)
    assert not list(tmp_path.iterdir()), "a reader's folder stays as it was"


def test_the_stored_outputs_are_complete():
    outputs = outputs_of(json.loads(NOTEBOOK.read_text())["cells"])
    assert len(pictures(outputs)) == 4
    assert "8/8" in text(outputs)
    assert "/venv/" not in text(outputs)
