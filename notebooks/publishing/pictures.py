"""Interactive outputs of a notebook, replaced by pictures of themselves.

A figure of plotly or CircuitsVis carries a script of megabytes, and most places where notebooks are read run none. A picture is
small and shows everywhere; whoever runs the cell gets the interactive figure.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageChops
from plotly.offline import get_plotlyjs

from notebooks.publishing.browser import dom, screenshot

PLOTLY = "application/vnd.plotly.v1+json"
WIDTH = 820
"""Of all pictures, in pixels."""
SCALE = 1.25
"""Pixels of a raster per pixel of the page."""
TALLEST = 2000
"""Of a view, in pixels of the page; what lies below is cut off."""
LARGEST_SVG = 60_000
"""Characters of SVG beyond which a figure becomes a PNG."""

_COLLECT = """
const done = {};
const finish = () => document.body.append(Object.assign(document.createElement("pre"), {id: "done", textContent: JSON.stringify(done)}));
"""


def draw_outputs(outputs: Iterable[dict[str, Any]]) -> None:
    """Replaces what is interactive among a notebook's outputs, in place.

    Args:
        outputs: The outputs of all cells; those with data of plotly or CircuitsVis change.
    """
    bundles = [output["data"] for output in outputs if "data" in output]
    figures = [bundle for bundle in bundles if PLOTLY in bundle]
    views = [bundle for bundle in bundles if "CircuitsVis.render(" in bundle.get("text/html", "")]
    rasters = [(bundle, screenshot(_page(bundle["text/html"]), width=WIDTH, height=TALLEST, scale=SCALE)) for bundle in views]
    for bundle, picture in zip(figures, _drawn([bundle[PLOTLY] for bundle in figures]), strict=True):
        title = html.unescape(bundle[PLOTLY]["layout"].get("title", {}).get("text") or "figure")
        bundle["text/plain"] = f"Figure({title})"
        if isinstance(picture, str):
            _replace(bundle, "image/svg+xml", picture)
        else:
            rasters.append((bundle, picture))
    for bundle, png in rasters:
        _replace(bundle, "image/png", base64.b64encode(small_png(png)).decode() + "\n")


def small_png(png: bytes, *, margin: int = 12, colours: int = 256) -> bytes:
    """A picture on white with a palette, and without the white rows at its end.

    Args:
        png: The picture, as PNG.
        margin: How many of the white rows stay.
        colours: Of the palette.
    """
    given = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", given.size, "white")
    picture = Image.alpha_composite(white, given).convert("RGB")
    drawn = ImageChops.difference(picture, white.convert("RGB")).getbbox()
    if drawn is not None:
        picture = picture.crop((0, 0, picture.width, min(picture.height, drawn[3] + margin)))
    small = io.BytesIO()
    picture.quantize(colours, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def _replace(bundle: dict[str, Any], kind: str, picture: str) -> None:
    kept = {name: value for name, value in bundle.items() if name == "text/plain"}
    bundle.clear()
    bundle.update({kind: picture, **kept})


def _drawn(figures: Sequence[Mapping[str, Any]]) -> list[str | bytes]:
    """Plotly's figures as SVG, which is sharp at any size, or as PNG where thousands of points make that large."""
    if not figures:
        return []
    calls = json.dumps([{"data": figure["data"], "layout": figure["layout"]} for figure in figures]).replace("<", "\\u003c")
    script = f"""{_COLLECT}
(async () => {{
  for (const [i, figure] of {calls}.entries()) {{
    const size = {{width: {WIDTH}, height: figure.layout.height ?? 440}};
    const element = document.body.appendChild(document.createElement("div"));
    await Plotly.newPlot(element, figure.data, {{...figure.layout, ...size}});
    const svg = decodeURIComponent((await Plotly.toImage(element, {{format: "svg", ...size}})).replace(/^.*?,/, ""));
    if (svg.length <= {LARGEST_SVG}) done[i] = {{svg}};
    else done[i] = {{png: (await Plotly.toImage(element, {{format: "png", scale: {SCALE}, ...size}})).replace(/^.*?,/, "")}};
  }}
  finish();
}})();
"""
    plotly = get_plotlyjs().replace("</script", "<\\/script")
    drawn = _done(_page(f"<script>{plotly}</script><script>{script}</script>"))
    pictures = [drawn[str(i)] for i in range(len(figures))]
    return [one["svg"] if "svg" in one else base64.b64decode(one["png"]) for one in pictures]


def _page(body: str) -> str:
    style = "body { margin: 8px; font-family: sans-serif; font-size: 14px; }"
    return f'<!DOCTYPE html>\n<html><head><meta charset="utf-8"><style>{style}</style></head><body>{body}</body></html>'


def _done(page: str) -> dict[str, Any]:
    shown = re.search(r'<pre id="done">(.*?)</pre>', dom(page, width=WIDTH), re.DOTALL)
    if shown is None:
        raise RuntimeError("chromium: it did not finish drawing; needed: a browser that runs the figures' scripts")
    return json.loads(html.unescape(shown[1]))
