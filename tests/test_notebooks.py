"""The committed notebooks are those of their .py files, run from top to bottom, without errors, and small."""

import re
from pathlib import Path

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
MAX_KB = 300
SCRIPTS = ("application/vnd.plotly.v1+json", "application/javascript")


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem)
def source(request):
    return request.param


@pytest.fixture
def notebook(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def bundles(notebook):
    """What every output shows, by MIME type."""
    return [output.data for cell in code_cells(notebook) for output in cell.outputs if "data" in output]


def test_there_are_notebooks_and_none_without_its_source():
    assert len(SOURCES) >= 2
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == [path.stem for path in SOURCES]


def test_cells_are_those_of_the_paired_source(source, notebook):
    def told(notebook):
        return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]

    assert told(notebook) == told(jupytext.read(source)), "run `make notebooks`"
    assert notebook.metadata.jupytext.formats == "ipynb,py:percent"
    assert notebook.metadata.kernelspec.name == "python3"


def test_it_was_run_once_from_top_to_bottom_without_errors(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name") != "stderr" for output in outputs)


def test_outputs_are_small_and_show_where_no_script_runs(source, notebook):
    assert source.with_suffix(".ipynb").stat().st_size < MAX_KB * 1024
    shown = bundles(notebook)
    assert not any(kind in bundle for bundle in shown for kind in SCRIPTS)
    assert not any("<script" in bundle.get("text/html", "") for bundle in shown)
    pictures = [bundle for bundle in shown if "image/svg+xml" in bundle or "image/png" in bundle]
    assert sum(bundle["text/plain"].startswith("View(") for bundle in pictures) >= 1  # CircuitsVis
    assert sum(bundle["text/plain"].startswith("Figure(") for bundle in pictures) >= 2  # plotly


def test_it_can_be_run_on_another_model_and_in_colab(source, notebook):
    first, install, parameters, *_ = notebook.cells
    target = f"https://colab.research.google.com/github/sd-lens/sd-lens/blob/main/notebooks/{source.stem}.ipynb"
    assert f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({target})" in first.source
    assert '\nif "google.colab" in sys.modules:\n' in install.source
    assert "sd-lens" in install.source
    assert install.outputs == []  # nothing is installed elsewhere
    assert parameters.source.startswith('MODEL = "tiny"')
    assert parameters.metadata.tags == ["parameters"]
    assert any("sd_lens.load(MODEL)" in cell.source for cell in notebook.cells)


def test_what_is_said_of_tiny_is_checked_by_the_last_cell(notebook):
    last = notebook.cells[-1].source
    assert last.startswith('if MODEL == "tiny":\n    assert ')


def test_nothing_in_it_belongs_to_one_machine(source):
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w.:/])/(?:home|root|work|tmp|usr|Users)/\S*", text) == []
