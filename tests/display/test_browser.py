"""The page in a real browser, offline: scripts run, plots and tokens appear as written."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from sd_lens.display.attention import attention_patterns
from sd_lens.display.report import render, write_page
from sd_lens.display.tokens import token_view
from sd_lens.display.visuals import together

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian package: chromium)")


def opened(page, folder):
    """The page's elements after its scripts have run; fails if they say anything to the console."""
    path = folder / "page.html"
    write_page(page, path)
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}",
        "--proxy-server=127.0.0.1:9",  # whatever is fetched fails
        "--virtual-time-budget=15000",
        "--enable-logging=stderr",
        "--v=0",
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    log = done.stderr.decode(errors="replace")
    assert not re.findall(r".*(?:Uncaught|SEVERE|CONSOLE).*", log)
    return done.stdout.decode()


def shown_tokens(dom):
    """Text of every coloured token, as a reader sees it."""
    views = re.findall(r'<div class="colored-tokens".*?</div>', dom, re.DOTALL)
    spans = [re.findall(r"<span><span style=[^>]*>(.*?)</span>", view, re.DOTALL) for view in views]
    return [[html.unescape(text).replace("\xa0", " ") for text in view] for view in spans]


def test_plots_tokens_and_sentences_are_on_the_page(findings, tmp_path):
    dom = opened(render(findings), tmp_path)
    for name in ("norm-lines", "norm-heatmap", "sublayers", "angles", "eigenvalues"):
        plot = dom[dom.index(f'id="figure-{name}"') :]
        assert "main-svg" in plot[: plot.index("</figure>")]
    expected = [
        "<s>",
        "</script>",
        "·\"quoted\"·&·'more'",
        "🙂",
        "↵ ",
        "⇥if",
        "·the",
        "∅",
        "<b>bold</b>",
        "$x$",
        "{{·7·*·7·}}",
        "\\u200b",
    ]
    assert shown_tokens(dom) == [expected * 2] * 3
    for sentence in findings.sentences():
        assert html.escape(sentence, quote=False) in dom
    assert all(f">{name}</text>" in dom for name in ("&lt;s&gt;", "$x$"))  # named below the heat map as well


def test_two_token_views_on_one_page_do_not_disturb_each_other(tmp_path):
    first, second = token_view(["<s>", " a"], [0.0, 1.0]), token_view(["</div>", "b"], [1.0, 0.0])
    dom = opened(f"<!DOCTYPE html><html><body>{first.html()}<p>between</p>{second.body}<p>after</p></body></html>", tmp_path)
    assert shown_tokens(dom) == [["<s>", "·a"], ["</div>", "b"]]
    assert "<p>between</p>" in dom
    assert "<p>after</p>" in dom


def test_the_tooltip_shows_the_token_as_written(tmp_path):
    hover = 'document.querySelector(".colored-tokens > span").dispatchEvent(new MouseEvent("mouseenter"))'
    view = token_view(["<s>", "a"], [3.65432, 0.0])
    page = f"<!DOCTYPE html><html><body>{view.html()}<script>setTimeout(() => {hover}, 500)</script></body></html>"
    assert "<strong>&lt;s&gt;</strong><br>3.654" in opened(page, tmp_path)


HARD = (
    "<s>",
    "</script>",
    "<!--<script>",
    " \"quoted\" & 'more'",
    "\n",
    "日本語",
    "Ελλάδα",
    "🙂",
    "",
    "<b>bold</b>",
    "\u2028",
    "\\n",
)
AS_WRITTEN = [
    "<s>",
    "</script>",
    "<!--<script>",
    "·\"quoted\"·&·'more'",
    "↵",
    "日本語",
    "Ελλάδα",
    "🙂",
    "∅",
    "<b>bold</b>",
    "\\u2028",
    "\\n",
]

FULL, GREY, WHITE = "242,142,43,255", "200,200,200,255", "255,255,255,255"

RECORD = """<script>
const drawn = new Map(), fillText = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
  drawn.set(this.canvas, (drawn.get(this.canvas) ?? new Set()).add(String(text)));
  return fillText.call(this, text, ...rest);
};
function colours(canvas) {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data, shares = {};
  for (let i = 0; i < pixels.length; i += 4) {
    const colour = pixels.slice(i, i + 4).join(",");
    shares[colour] = (shares[colour] ?? 0) + 4 / pixels.length;
  }
  return shares;
}
setTimeout(() => {
  const maps = [...document.querySelectorAll(".attention-view")].map((view) => [...view.querySelectorAll("canvas")].map((canvas) =>
    ({ texts: [...(drawn.get(canvas) ?? [])], colours: colours(canvas) })));
  document.body.append(Object.assign(document.createElement("pre"), { id: "maps", textContent: JSON.stringify(maps) }));
}, 3000);
</script>"""


def shown_maps(dom):
    """What every heat map shows, per attention view: the texts drawn on it, and the share of each colour."""
    return json.loads(html.unescape(re.search(r'<pre id="maps">(.*?)</pre>', dom, re.DOTALL)[1]))


def head_names(dom):
    """Text of the small maps' names, per attention view."""
    views = dom.split('<div class="attention-view">')[1:]
    return [[html.unescape(name) for name in re.findall(r"<h4[^>]*>(.*?)</h4>", view)] for view in views]


def test_tokens_and_attention_on_one_page_show_everything_as_written(tmp_path):
    n = len(HARD)
    patterns = torch.zeros(2, n, n)
    patterns[0, :, 0] = 1.0  # all attention to the first token: full colour and white
    patterns[1] = torch.eye(n) * 0.5
    tokens = token_view(HARD, [float(i) for i in range(n)])
    attention = attention_patterns(patterns, HARD, ["L0H1", "</h4><i>"])
    second = attention_patterns(torch.ones(1, 1, 1), ["<s>"], ["L5H0"])
    page = together(tokens, attention, tokens, second, captions=["one", "two", "<three>", "four"]).page()
    dom = opened(page.replace("<body>", f"<body>{RECORD}", 1), tmp_path)

    expected = [text + " " if text == "↵" else text for text in AS_WRITTEN]
    assert shown_tokens(dom) == [expected] * 2
    for caption in ("one", "two", "&lt;three&gt;", "four"):
        assert f"<p>{caption}</p>" in dom
    assert head_names(dom) == [["L0H1", "</h4><i>"], ["L5H0"]]

    first_view, second_view = shown_maps(dom)
    small_first, small_second, large = first_view
    assert set(large["texts"]) >= {f"{text} ({i})" for i, text in enumerate(AS_WRITTEN)}
    assert small_first["texts"] == small_second["texts"] == []
    # Of n² squares those above the diagonal are grey, and in the first map those of the first column have the full colour.
    # Their edges are blended.
    for picture, coloured in ((small_first, 1 / n), (small_second, 0.0)):
        assert 0.6 * (n - 1) / (2 * n) < picture["colours"][GREY] < (n - 1) / (2 * n)
        assert 0.6 * coloured <= picture["colours"].get(FULL, 0.0) <= coloured
    pale = max(small_second["colours"].keys() - {GREY, WHITE}, key=small_second["colours"].__getitem__)
    assert FULL < pale < WHITE  # half the attention, on the diagonal
    assert large["colours"][FULL] > 0.5 / n  # the rest of the canvas has the labels
    assert "<s> (0)" in second_view[-1]["texts"]
    assert second_view[-1]["colours"][FULL] > 0.1  # one token is drawn small


def test_outputs_of_a_notebook_work_in_any_order(tmp_path):
    view = attention_patterns(torch.ones(1, 1, 1), ["<s>"], ["L5H0"])
    tokens = token_view(["<s>", " a"], [1.0, 0.0])
    outputs = "".join(f"<div>{shown._repr_html_()}</div>" for shown in (view, tokens, view, tokens))
    dom = opened(f'<!DOCTYPE html><html><head><meta charset="utf-8"></head><body>{RECORD}{outputs}</body></html>', tmp_path)
    assert shown_tokens(dom) == [["<s>", "·a"]] * 2
    assert head_names(dom) == [["L5H0"]] * 2
    assert ["<s> (0)" in picture[-1]["texts"] for picture in shown_maps(dom)] == [True, True]
