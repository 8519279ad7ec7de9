"""Pieces of HTML that the report is put together from, all escaped by jinja2."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sd_lens.display.labels import number


@functools.cache
def environment() -> Environment:
    """The templates of this folder; whatever is put into them is escaped."""
    loader = PackageLoader("sd_lens.display", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _piece(macro: str, **values: Any) -> Markup:
    return getattr(environment().get_template("fragments.html.j2").module, macro)(**values)


def texts(headings: list[str], rows: list[list[str]]) -> Markup:
    """Texts side by side, a column per heading."""
    return _piece("texts", headings=headings, rows=rows)


def paragraph(text: str) -> Markup:
    """A paragraph of plain text."""
    return Markup("<p>{}</p>\n").format(text)


def subheading(text: str) -> Markup:
    """A heading inside a section."""
    return Markup("<h3>{}</h3>\n").format(text)


def figure(drawn: go.Figure, name: str, *, min_width: int = 0) -> Markup:
    """A figure without plotly's script, its title as a caption, which wraps where plotly's own would be cut off.

    Args:
        drawn: The figure; its title moves.
        name: Unique on the page.
        min_width: Pixels below which it scrolls instead of shrinking.
    """
    layout: Any = drawn.layout  # its attributes are made at run time
    title = layout.title
    caption, note = Markup(title.text or ""), Markup(title.subtitle.text or "")  # escaped when they were made
    bare = go.Figure(drawn)
    bare.update_layout(title=None, margin_t=64 if len(list(bare.select_traces())) > 1 else 32)
    content = bare.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"figure-{name}",
        default_width="100%",
        config={"responsive": True, "displaylogo": False, "modeBarButtons": [["toImage", "resetScale2d"]]},
    )
    return _piece("figure", caption=caption, note=note, content=Markup(content), min_width=min_width)


def table(frame: pd.DataFrame, columns: Mapping[str, str], *, digits: int = 4, formats: Mapping[str, str] | None = None) -> Markup:
    """A table of some columns of a data frame.

    Args:
        frame: The rows.
        columns: Heading of each column shown, by its name.
        digits: Significant digits of numbers.
        formats: Format specifications of columns that are shown otherwise, by name.
    """
    numeric = [pd.api.types.is_numeric_dtype(frame[name]) for name in columns]
    specs = [(formats or {}).get(name) for name in columns]
    rows = [
        [
            number(value, digits) if spec is None or value != value else format(value, spec)
            for value, spec in zip(row, specs, strict=True)
        ]
        for row in frame[list(columns)].itertuples(index=False)
    ]
    return _piece("table", headings=list(zip(columns.values(), numeric, strict=True)), rows=rows)


def code(text: str) -> Markup:
    """Source code, as it is, to copy."""
    return Markup('<pre class="scroll"><code>{}</code></pre>\n').format(text.rstrip("\n"))


def joined(pieces: Iterable[Markup]) -> Markup:
    """Pieces one after the other."""
    return Markup("").join(pieces)
