"""Views are closed elements, the script is apart and once on a page, and nothing is fetched."""

import re

import pytest
import torch

from sd_lens.display.attention import attention_patterns
from sd_lens.display.tokens import token_view
from sd_lens.display.visuals import script_bundle, together, view_of

VIEWS = {
    "tokens": lambda: token_view(["a"], [1.0]),
    "attention": lambda: attention_patterns(torch.ones(1, 1, 1), ["</script><!--"], ["L0H0"]),
    "together": lambda: together(token_view(["a"], [1.0]), token_view(["</script>"], [1.0]), captions=["<one>", "two"]),
}


@pytest.fixture(params=VIEWS)
def view(request):
    return VIEWS[request.param]()


def test_the_body_is_closed_and_has_no_script_of_its_own(view):
    for tag in ("div", "script", "style", "p"):
        assert len(re.findall(rf"<{tag}\b", view.body)) == view.body.count(f"</{tag}>")
    assert view.body.count("<script>") == len(view.ids)
    assert "<!--" not in view.body
    assert len(view.body) < 2000
    assert "http" not in view.body
    assert "import" not in view.body


def test_html_stands_alone_without_a_network(view, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the network was probed"))
    shown = view._repr_html_()
    assert shown.startswith(script_bundle())
    assert shown.count(script_bundle()) == 1
    assert "unpkg" not in shown
    assert shown.removeprefix(script_bundle()) == _with_ids_of(view, shown)


def _with_ids_of(view, shown):
    """The view's body, with the ids that another rendering drew."""
    body = view.body
    for old, new in zip(view.ids, re.findall(r'<div id="([^"]+)"', shown.removeprefix(script_bundle())), strict=True):
        body = body.replace(old, new)
    return body


def test_every_rendering_has_ids_of_its_own(view):
    first, second = (set(re.findall(r'<div id="([^"]+)"', view.html().removeprefix(script_bundle()))) for _ in range(2))
    assert len(first) == len(second) == len(view.ids)
    assert not first & second


def test_views_together_are_their_bodies_in_order():
    view = token_view(["a"], [1.0])
    both = together(view, view, captions=["<first>", "second"])
    assert len(set(both.ids)) == 2
    assert [both.body.index(name) for name in both.ids] == sorted(both.body.index(name) for name in both.ids)
    assert both.body.startswith("<p>&lt;first&gt;</p>")
    assert both.body.count("<p>") == 2
    assert repr(together(both, view)) == "View(1 coloured token; 1 coloured token; 1 coloured token)"


def test_views_and_captions_are_counted():
    with pytest.raises(ValueError, match="views: got none; allowed: at least one"):
        together()
    with pytest.raises(ValueError, match="captions: got 2 for 1 views; allowed: one caption per view"):
        together(token_view(["a"], [1.0]), captions=["first", "second"])


def test_a_view_saves_itself_as_a_page(view, tmp_path):
    view.save(tmp_path / "view.html", title="<tiny>")
    page = (tmp_path / "view.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "<title>&lt;tiny&gt;</title>" in page
    assert script_bundle() in page


def test_the_bundle_is_one_closed_script_whose_tooltip_reads_html():
    bundle = script_bundle()
    assert bundle.startswith("<script>")
    assert bundle.count("</script") == 1
    assert "<!--" not in bundle  # after which a browser would look for further scripts inside
    assert bundle.rstrip().endswith("</script>")
    assert "sourceMappingURL" not in bundle
    assert 'createElement("strong",{dangerouslySetInnerHTML:{__html:e}})' in bundle


@pytest.mark.parametrize("source", ["", '<div id="x"/>', '<div id="x"/><script>other("x")</script>', "<p>"])
def test_html_of_another_make_is_not_guessed_at(source):
    with pytest.raises(RuntimeError, match=r"circuitsvis: its HTML is built in an unknown way; allowed: circuitsvis 1\.43"):
        view_of(source, kind="k", shows="s")
