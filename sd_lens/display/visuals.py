"""CircuitsVis behind an adapter: offline, closed elements, the script once, several visuals on a page.

What it works around (circuitsvis 1.43.3): ``_repr_html_`` probes the network, its other forms load a script from a CDN; the root
``<div>`` is never closed, so that a second visual swallows what follows; every visual holds the whole script; a token such as
``</script>`` ends the call.
"""

from __future__ import annotations

import functools
import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from sd_lens.models.files import write_text


@dataclass(frozen=True)
class View:
    """One visual of CircuitsVis, or several one below the other.

    A notebook shows it by itself, also where each output is a frame of its own: its HTML there holds the script, 1.3 MB.

    Attributes:
        body: Its HTML without the script, which `script_bundle` gives once per page and before the first body. A page can hold the same body
            once; `html` and `together` name the elements anew each time.
        ids: The elements that the script fills.
        shows: What is shown, for the one-line representation.
    """

    body: str
    ids: tuple[str, ...]
    shows: str

    def renamed(self) -> View:
        """The same with fresh ids, so that it can stand on a page more than once."""
        body, fresh = self.body, tuple(f"view-{uuid4()}" for _ in self.ids)
        for old, new in zip(self.ids, fresh, strict=True):  # drawn at random: no token can be mistaken for one
            body = body.replace(old, new)
        return View(body, fresh, self.shows)

    def html(self) -> str:
        """All that is needed to show it on its own, to be put into a page."""
        return script_bundle() + self.renamed().body

    def page(self, title: str = "sd_lens") -> str:
        """A whole HTML page of its own, which needs no network.

        Args:
            title: The page's title, as text.
        """
        head = f'<meta charset="utf-8"><link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
        return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{self.html()}</body></html>\n'

    def save(self, path: str | os.PathLike[str], *, title: str = "sd_lens") -> None:
        """Writes its page, whole or not at all.

        Args:
            path: The file, replaced if it exists.
            title: The page's title, as text.

        Raises:
            OSError: It cannot be written there.
        """
        write_text(self.page(title), path)

    def _repr_html_(self) -> str:
        return self.html()

    def __repr__(self) -> str:
        return f"View({self.shows})"


def together(*views: View, captions: Sequence[str] | None = None) -> View:
    """Several views one below the other, as one: the script stands on the page, or in the notebook's output, once.

    Args:
        views: The views; the same one may occur again.
        captions: A line of text above each.

    Returns:
        A view.

    Raises:
        ValueError: There is no view, or there are not as many captions as views.

    Example:
        >>> from sd_lens.display.tokens import token_view
        >>> together(token_view(["a", "b"], [0.0, 1.0]), token_view(["c"], [1.0]), captions=["first", "second"])
        View(2 coloured tokens; 1 coloured token)
    """
    if not views:
        raise ValueError("views: got none; allowed: at least one")
    if captions is not None and len(captions) != len(views):
        raise ValueError(f"captions: got {len(captions)} for {len(views)} views; allowed: one caption per view")
    above = [""] * len(views) if captions is None else [f"<p>{html.escape(caption)}</p>\n" for caption in captions]
    fresh = [view.renamed() for view in views]
    return View(
        body="".join(line + view.body for line, view in zip(above, fresh, strict=True)),
        ids=tuple(name for view in fresh for name in view.ids),
        shows="; ".join(view.shows for view in fresh),
    )


@functools.cache
def script_bundle() -> str:
    """CircuitsVis' script (1.3 MB), to stand on a page once; where it does more often, only the first is run."""
    import circuitsvis

    source = (Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    source = re.sub(r"//# sourceMappingURL=\S+\s*$", "", source)  # a file that is not there
    # The tooltip shows the token as text, although the tokens themselves are HTML: an escaped one would show its entities.
    source = source.replace('createElement("strong",null,e)', 'createElement("strong",{dangerouslySetInnerHTML:{__html:e}})')
    source = source.replace("</script", "<\\/script")
    # Run twice, it complains on the console about what it registered before.
    return f"<script>self.CircuitsVis ||= (function () {{{source}\nreturn CircuitsVis;}})();</script>\n"


def view_of(source: str, *, kind: str, shows: str) -> View:
    """CircuitsVis' offline HTML as a closed element and the call that fills it, without the script between them.

    Args:
        source: ``local_src`` of what a function of CircuitsVis returns.
        kind: CSS class of the element around it.
        shows: What is shown, in a few words.

    Raises:
        RuntimeError: The HTML is built in another way than that of circuitsvis 1.43.
    """
    match = re.match(r'\s*<div id="([\w-]+)"', source)
    # The root's id is drawn at random and named last by the call: no token can be mistaken for either.
    start = -1 if match is None else source.rfind("CircuitsVis.render(", 0, source.rfind(match[1]))
    end = source.rfind("</script>")
    if match is None or not 0 <= start < end:
        raise RuntimeError("circuitsvis: its HTML is built in an unknown way; allowed: circuitsvis 1.43")
    # In JavaScript an escaped "<" is the same, but ends no script and begins no comment.
    call = source[start:end].strip().replace("<", "\\u003c")
    return View(f'<div class="{kind}"><div id="{match[1]}"></div></div>\n<script>{call}</script>\n', (match[1],), shows)
