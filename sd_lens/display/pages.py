"""A page: a heading, what was found in sentences, a few facts, and sections; one self-contained file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sd_lens.display.fragments import environment
from sd_lens.models.files import write_text
from sd_lens.models.version import version


@dataclass(frozen=True)
class Section:
    """One section of a page.

    Attributes:
        id: Unique on the page.
        title: Its heading.
        fragment: Its content.
    """

    id: str
    title: str
    fragment: Markup


def page(
    model: str,
    sentences: Sequence[str],
    facts: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    *,
    found: bool = True,
    circuitsvis: str = "",
) -> str:
    """A page that needs no network.

    Args:
        model: The heading.
        sentences: What was found.
        facts: Name and value of what a reader looks for first.
        sections: What follows.
        found: Whether there was anything to find, for the page's colours.
        circuitsvis: The script of CircuitsVis' visuals, where there are any.

    Returns:
        HTML, nearly all of it plotly's script.
    """
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            model=model,
            found=found,
            sentences=sentences,
            facts=[*facts, ("sd_lens", version())],
            sections=sections,
            version=version(),
            plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
            circuitsvis=Markup(circuitsvis),
        )
    )


def reading(
    *,
    found: bool = False,
    maps: bool = False,
    explained: bool = False,
    edited: bool = False,
    quantized: bool = False,
    propagated: bool = False,
) -> Markup:
    """The words used on a page, and where they come from.

    Args:
        found: Whether it shows high-norm tokens.
        maps: Whether it shows linear maps.
        explained: Whether it shows attributions and pathways.
        edited: Whether it shows interventions.
        quantized: Whether it shows quantisation.
        propagated: Whether it shows how information gets to the last token.
    """
    words = environment().get_template("how_to_read.html.j2")
    shown = {
        "found": found,
        "maps": maps,
        "explained": explained,
        "edited": edited,
        "quantized": quantized,
        "propagated": propagated,
    }
    return Markup(words.render(**shown))


def write_page(page: str, path: str | os.PathLike[str]) -> None:
    """Writes a page, whole or not at all.

    Args:
        page: The page.
        path: The file, replaced if it exists; check it with `require_writable` before the analysis.

    Raises:
        OSError: It cannot be written there. Nothing is left behind.
    """
    write_text(page, path)
