"""Every notebook runs from its text, in a kernel of its own, and has the pictures it promises."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.py"))
QUICK = "read_a_trace"
PARAMETERS = [
    pytest.param(path, id=path.stem, marks=[] if path.stem == QUICK else [pytest.mark.slow])
    for path in NOTEBOOKS
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("path", PARAMETERS)
def test_a_notebook_runs_and_draws(path: Path, tmp_path: Path) -> None:
    book = jupytext.read(path)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=200, kernel_name="python3", resources=where).execute()
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    images = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    drawn = sum(bool(re.match(r"plots\.\w+\(", cell.source.strip().splitlines()[-1])) for cell in code)
    multiline = sum(bool(re.search(r"^plots\.\w+\(\n", cell.source, re.MULTILINE)) for cell in code)
    assert len(images) == drawn + multiline >= 3
    assert not [
        output
        for cell in code
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr"
    ], "nothing was complained of"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_text_that_reads(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "formats: ipynb,py:percent" in text
    book = jupytext.reads(text, fmt="py:percent")
    kinds = [cell.cell_type for cell in book.cells]
    assert kinds[0] == "markdown"
    assert kinds.count("markdown") >= 4
    assert "Notebook" not in text
