"""The examples in the docstrings and in the README run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import sd_lens

MODULES = sorted(m.name for m in pkgutil.walk_packages(sd_lens.__path__, "sd_lens.") if not m.name.endswith("__main__"))
EXAMPLES = [
    test
    for name in MODULES
    for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name)
    if test.examples
]
README = Path(__file__).parent.parent / "README.md"


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name.removeprefix("sd_lens."))
def test_docstring_example(example, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=report.append)
    assert result.failed == 0, "".join(report)


def test_public_functions_have_examples():
    functions = [name for name in sd_lens.__all__ if name[0].islower()]
    missing = [name for name in functions if ">>>" not in (getattr(sd_lens, name).__doc__ or "")]
    assert missing == []


def test_everything_public_is_documented():
    """Every name that the package re-exports has a docstring, and every function says what it takes and gives."""
    for name in sd_lens.__all__:
        doc = getattr(sd_lens, name).__doc__ or ""
        assert len(doc) > 30, name
        if name[0].islower() and name != "mean_pairwise_angle":
            assert "Args:" in doc, name
            assert "Returns:" in doc, name


def test_readme_python_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["defects"].found  # pyright: ignore
    assert namespace["s"][0] >= namespace["s"][1]  # pyright: ignore
