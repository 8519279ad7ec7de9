"""Tokens and numbers as a reader should see them."""

from __future__ import annotations

import html
import math
from typing import Any

_SEEN = {"\n": "↵", "\r": "␍", "\t": "⇥", " ": "·"}
_JOINER = "\u200d"  # between the parts of one emoji


def visible(token: str) -> str:
    """A token with its white space and control characters made visible; an empty one (half a character) as ``∅``."""
    return "".join(_character(c) for c in token) or "∅"


def _character(character: str) -> str:
    if character in _SEEN:
        return _SEEN[character]
    if character.isprintable() or character == _JOINER:
        return character
    return character.encode("unicode_escape").decode()


def plotly_text(text: str, limit: int | None = None) -> str:
    """Text for a plotly label or hover, which reads a little HTML; cut off at a limit."""
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return html.escape(text, quote=False).replace("$", "&#36;")  # two dollars would make it a formula


def number(value: Any, digits: int = 4) -> str:
    """A table cell: numbers to some significant digits, ``–`` for what is missing, yes and no for truth values."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, complex):
        return number(value.real, digits) if value.imag == 0 else f"{number(value.real, digits)} {_imaginary(value.imag, digits)}"
    if isinstance(value, (bool,)) or type(value).__name__ == "bool_":
        return "yes" if value else "no"
    if math.isnan(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return str(int(value)).replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")


def _imaginary(value: float, digits: int) -> str:
    return f"{'−' if value < 0 else '+'} {number(abs(value), digits)}i"
