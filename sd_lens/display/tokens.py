"""CircuitsVis behind an adapter: offline, tokens as written, a log scale, several on a page.

What it works around (circuitsvis 1.43.3): ``_repr_html_`` probes the network, its other forms load a script from a CDN; the root
``<div>`` is never closed; tokens are inserted as raw HTML; lengths are not compared; every visual holds the whole script.
"""

from __future__ import annotations

import functools
import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sd_lens.display.labels import visible
from sd_lens.tracing.trace import MIN_RATIO, NormTrace

_HIGH, _LOW = "#F28E2B", "#7FB8DA"  # light enough for the black text that CircuitsVis writes on them


@dataclass(frozen=True)
class TokenView:
    """Tokens coloured by a value.

    Attributes:
        body: Its HTML without the script, which `script_bundle` gives once per page and before the first body.
    """

    body: str

    def html(self) -> str:
        """All that is needed to show it on its own."""
        return script_bundle() + self.body

    def _repr_html_(self) -> str:
        return self.html()

    def __repr__(self) -> str:
        return f"TokenView({len(self.body)} characters of HTML)"


@functools.cache
def script_bundle() -> str:
    """CircuitsVis' script (1.3 MB), to stand on a page once."""
    import circuitsvis

    source = (Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    source = re.sub(r"//# sourceMappingURL=\S+\s*$", "", source)  # a file that is not there
    # The tooltip shows the token as text, although the tokens themselves are HTML: an escaped one would show its entities.
    source = source.replace('createElement("strong",null,e)', 'createElement("strong",{dangerouslySetInnerHTML:{__html:e}})')
    source = source.replace("</script", "<\\/script")
    return f"<script>{source}</script>\n"


def token_view(tokens: Sequence[str], values: Sequence[float], *, limit: float | None = None) -> TokenView:
    """Tokens coloured by values: white at 0, orange above, blue below.

    Args:
        tokens: The tokens, as the tokenizer gives them.
        values: One finite value each; NaN counts as 0.
        limit: Value of the full colour; default: the largest.

    Raises:
        ValueError: There are not as many values as tokens, or none.
    """
    if len(tokens) != len(values) or len(tokens) == 0:
        raise ValueError(
            f"values: got {len(values)} for {len(tokens)} tokens; allowed: one value per token, and at least one token"
        )
    from circuitsvis.tokens import colored_tokens as circuitsvis_tokens

    kept = [0.0 if math.isnan(value) else round(float(value), 3) for value in values]
    full = limit or max(map(abs, kept)) or 1.0
    rendered = circuitsvis_tokens(
        [_written(token) for token in tokens], kept, min_value=-full, max_value=full, negative_color=_LOW, positive_color=_HIGH
    )
    return TokenView(_without_script(rendered.local_src))


def _written(token: str) -> str:
    """A token as HTML, with a line break kept after its sign."""
    return html.escape(visible(token)).replace("↵", "↵\n" if "\n" in token else "↵")


def _without_script(source: str) -> str:
    """CircuitsVis' offline HTML as a closed element and the call that fills it, without the script between them."""
    match = re.match(r'\s*<div id="([\w-]+)"', source)
    # The root's id is drawn at random and named last by the call: no token can be mistaken for either.
    start = -1 if match is None else source.rfind("CircuitsVis.render(", 0, source.rfind(match[1]))
    end = source.rfind("</script>")
    if match is None or not 0 <= start < end:
        raise RuntimeError("circuitsvis: its HTML is built in an unknown way; allowed: circuitsvis 1.43")
    return f'<div class="token-view"><div id="{match[1]}"></div></div>\n<script>{source[start:end].strip()}</script>\n'


def colored_tokens(trace: NormTrace, prompt: int = 0, block: int | None = None) -> TokenView:
    """A prompt's tokens, coloured by the log10 of their norm after a block.

    The scale's zero is the other tokens' median norm, so that ordinary tokens stay white whatever the model's scale; its full
    colour is the largest of the trace after that block, and at least that of a high-norm token.

    Args:
        trace: The trace.
        prompt: Which of its prompts.
        block: After which block; default: the one after which some norm stands out most.

    Raises:
        ValueError: There is no such prompt or block.
    """
    blocks = len(trace.norms) - 1
    if block is not None and not 0 <= block < blocks:
        raise ValueError(f"block: got {block}; allowed: 0 to {blocks - 1}, the blocks traced")
    point = 1 + (peak_block(trace) if block is None else block)
    norms = trace.norms[point].double()
    median = trace.reference[point].double()
    logs = (norms / (median if bool(median > 0) else norms.nanmedian())).log10()
    logs = torch.where(logs.isfinite(), logs, 0.0)
    trace.of_prompt(prompt)  # refuses a prompt that is not there
    limit = max(float(logs.max()), math.log10(MIN_RATIO))
    return token_view(trace.texts_of(prompt), logs[trace.prompt == prompt].tolist(), limit=limit)


def peak_block(trace: NormTrace) -> int:
    """Block after which a norm of the trace stands out most from the median."""
    return int(trace.ratios[1:].nan_to_num(nan=0.0, posinf=0.0).max(1).values.argmax())
