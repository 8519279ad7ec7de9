"""The page: complete, self-contained, well formed; what does not apply is not there; written whole or not at all."""

import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from sd_lens.display import report, sections
from sd_lens.display.labels import visible
from sd_lens.display.report import render, require_writable, write_page

VOID = {"meta", "link", "br", "hr", "img", "input"}
SCRIPTS = {"plotly": "plotly.js v", "circuitsvis": "var CircuitsVis=(()=>"}

EXPLAINED = ["components", "trigger", "massive", "scans", "text-tokens", "attention", "removal", "response"]


class Page(HTMLParser):
    """What a browser would make of a page: text, ids, sections, addresses, unclosed elements."""

    def __init__(self, page):
        super().__init__()
        self.text, self.ids, self.sections, self.loads, self.open, self.problems = "", [], [], [], [], []
        self.links = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "section":
            self.sections.append(attributes["id"])
        self.loads += [value for name, value in attributes.items() if name == "src" or (name == "href" and tag == "link")]
        if tag == "a":
            self.links.append(attributes["href"])

    def handle_endtag(self, tag):
        self.text += " " * (tag in {"td", "th", "dt", "dd", "a", "h3"})  # what stands in boxes is apart
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data


@pytest.fixture(scope="module")
def page(findings):
    return render(findings)


def words(text):
    return " ".join(text.split())


def test_the_page_is_well_formed(page):
    parsed = Page(page)
    assert parsed.problems == []
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))


def test_nothing_is_loaded_from_elsewhere(page):
    assert Page(page).loads == ["data:,"]
    assert not re.search(r"@import|url\(", page.split("<script>")[0])


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_is_there_once(page, script):
    assert page.count(SCRIPTS[script]) == 1
    assert len(page) < 8e6


def test_the_page_says_what_was_found_first(page, findings):
    parsed = Page(page)
    text = words(parsed.text)
    for sentence in findings.sentences():
        assert words(sentence) in text
        assert text.index(words(sentence)) < text.index("Norms")
    assert parsed.sections == [
        "norms",
        "tokens",
        "sublayers",
        "maps",
        *EXPLAINED,
        "quantization",
        "signature",
        "collapse",
        "sensitivity",
        "high-norm-tokens",
        "checks",
        "how-to-read",
    ]
    assert [link for link in parsed.links if link.startswith("#")] == [f"#{id}" for id in parsed.sections]
    for fact in (
        "d_model 64",
        "explosion blocks 1",
        "decay blocks 4",
        "prompts 3",
        "tokens 72",
        f"mean of {findings.defects.direction.n_vectors} vectors",
    ):
        assert fact in text


def test_tables_show_the_results(page, findings):
    text = words(Page(page).text)
    row = findings.directions.row(4)
    assert f"4 block {row.sigma1:.3g} {row.sigma2:.3g} {row.gap:.3g} {row.angle_deg:.1f}" in text
    assert "FFN fitted to N(0, I) at the projections." in text
    token = findings.defects.tokens[0]
    assert f"0 0 <s> {token.id} 1 {token.norm:.4g} {token.ratio:.4g}" in text
    assert "value vectors passed" in text


def test_hard_tokens_are_text(findings):
    trace, first = findings.defects.trace, findings.defects.tokens[0]
    hard = sorted(set(trace.texts))
    tokens = tuple(replace(first, token=text) for text in hard)
    parsed = Page(render(replace(findings, defects=replace(findings.defects, tokens=tokens))))
    assert parsed.problems == []
    for text in hard:
        assert f"0 0 {visible(text)} " in words(parsed.text)


def test_where_nothing_was_found_the_page_says_so_and_leaves_out_the_rest(not_found):
    parsed = Page(render(not_found))
    text = words(parsed.text)
    assert parsed.sections == [
        "norms",
        "tokens",
        "maps",
        "massive",
        "scans",
        "attention",
        "collapse",
        "sensitivity",
        "checks",
        "how-to-read",
    ]
    assert text.index("No explosion was found") < text.index("Norms")
    assert "explosion blocks" not in text
    assert "balance" not in text
    assert "because no direction was measured" in text


def test_without_linear_maps_the_page_gives_the_reason(findings):
    parsed = Page(render(replace(findings, directions=None, no_directions_because="a norm stands after <a> sublayer")))
    assert "The blocks' linear maps were not computed: a norm stands after <a> sublayer." in words(parsed.text)
    assert "figure-angles" not in parsed.ids
    assert parsed.problems == []


def test_without_a_subspace_to_remove_the_page_gives_the_reason(findings):
    causality = replace(
        findings.causality, consequences=None, response=None, missing={"consequences": "no <hook> point", "response": "no"}
    )
    parsed = Page(render(replace(findings, causality=causality)))
    assert "The explosion subspace was not removed: no <hook> point." in words(parsed.text)
    assert "Explosion subspace " not in words(parsed.text)
    assert "response" not in parsed.sections
    assert parsed.problems == []


def test_without_propagation_the_page_gives_the_reason(findings):
    parsed = Page(render(replace(findings, propagation=None, no_propagation_because="no <room>")))
    assert "Information propagation was not looked at: no <room>." in words(parsed.text)
    assert "sensitivity" not in parsed.sections
    assert parsed.problems == []


def test_a_model_name_is_only_text(findings):
    name = '</title><script>alert("x")</script>'
    trace = replace(findings.defects.trace, model_name=name)
    page = render(replace(findings, defects=replace(findings.defects, trace=trace)))
    assert name not in page
    assert name in Page(page).text


def test_long_lists_are_cut_off_and_say_so(findings):
    defects = findings.defects
    tokens = tuple(replace(defects.tokens[0], pos=pos) for pos in range(73))
    parsed = Page(render(replace(findings, defects=replace(defects, tokens=tokens))))
    assert "23 more are not listed." in parsed.text


def test_the_most_telling_prompt_is_drawn(findings):
    trace = findings.defects.trace
    norms = trace.norms.clone()
    norms[3, 24] = 1e6
    assert sections.telling_prompt(replace(trace, norms=norms)) == 1


def test_a_section_is_one_function(findings, monkeypatch):
    monkeypatch.setattr(sections, "_SECTIONS", [])

    @sections.section("more", "More")
    def more(findings):
        return sections.paragraph("of it")

    @sections.section("absent", "Absent")
    def absent(findings):
        return None

    built = sections.sections(findings)
    assert [(part.id, part.title, str(part.fragment)) for part in built] == [("more", "More", "<p>of it</p>\n")]


def test_nothing_is_written_when_rendering_fails(findings, tmp_path, monkeypatch):
    def broken(findings):
        raise RuntimeError("broken")

    monkeypatch.setattr(report, "sections", broken)
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="broken"):
        write_page(render(findings), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_page("new", path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_replaces_an_older_one_and_keeps_links_and_permissions(tmp_path):
    path, link = tmp_path / "page.html", tmp_path / "link.html"
    write_page("old", path)
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    path.chmod(0o640)
    link.symlink_to(path)
    require_writable(link)
    write_page("neu: ü", link)
    assert path.read_text(encoding="utf-8") == "neu: ü"
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("path", "reason"),
    [("nowhere/page.html", "whose folder does not exist"), ("file/page.html", "whose folder is a file"), ("folder", "is a folder")],
)
def test_places_that_cannot_be_written_to_are_refused(tmp_path, path, reason):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"out: got '.*{path}', .*{reason}; allowed: a file in an existing folder"):
        require_writable(tmp_path / path)
    with pytest.raises(OSError, match=reason):
        write_page("page", tmp_path / path)
    assert sorted(tmp_path.rglob("*")) == before


def test_protected_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="whose folder cannot be written to"):
        require_writable(tmp_path / "page.html")


def test_devices_are_not_replaced():
    with pytest.raises(ValueError, match="not a regular file"):
        require_writable(os.devnull, argument="json")
