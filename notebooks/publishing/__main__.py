"""``python -m notebooks.publishing``: runs notebooks/*.py and writes each with its outputs beside it, as .ipynb."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

from notebooks.publishing.browser import chromium
from notebooks.publishing.pictures import draw_outputs

FOLDER = Path(__file__).parent.parent
TIMEOUT_S = 300


def publish(source: Path) -> Path:
    """Runs one notebook and writes it.

    Args:
        source: Its .py file, in jupytext's percent format.

    Returns:
        The .ipynb file beside it.
    """
    notebook: Any = jupytext.read(source)
    NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext draws new ones each time
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            # Progress bars and what libraries say about themselves.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    draw_outputs(output for cell in notebook.cells for output in cell.get("outputs", ()))
    notebook.metadata.pop("language_info", None)  # the version of Python that happened to run it
    target = source.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    return target


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m notebooks.publishing", description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="the .py files; default: all of them")
    chosen = parser.parse_args().notebooks or sorted(FOLDER.glob("[0-9]*.py"))
    if chromium() is None:
        print("chromium: not found; needed: Chromium on the path (Debian package: chromium)", file=sys.stderr)
        return 1
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"  # without plotly's script in every output
    for source in chosen:
        start = time.perf_counter()
        target = publish(source)
        print(f"{target.name}: {time.perf_counter() - start:.0f} s, {target.stat().st_size / 1024:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
