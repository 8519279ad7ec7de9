"""The page in a real browser, offline: scripts run, plots and tokens appear as written."""

import html
import re
import shutil
import subprocess

import pytest

from sd_lens.display.report import render, write_page
from sd_lens.display.tokens import token_view

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
