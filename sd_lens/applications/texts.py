"""The text that perplexities are measured on where the caller gives none."""

from __future__ import annotations

from importlib.resources import files


def default_text() -> str:
    """A text in plain English that ships with the package, written for it: the handbook of a library that does not exist.

    Returns:
        The text.

    Example:
        >>> len(default_text().split()) > 2000
        True
    """
    return files("sd_lens.applications").joinpath("text.txt").read_text(encoding="utf-8")
