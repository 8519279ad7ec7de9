"""Scans of a vocabulary as dots: none that stands out is left out, however large the vocabulary."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sd_lens.display.scan_figures import MAX_EXTREME, MAX_IN_COLUMN, MAX_POINTS, scan_pathways, scan_scatter
from sd_lens.tracing.vocabulary_scan import VocabularyScan


class Tokenizer:
    """Every id is a text that is hard to show."""

    def decode(self, ids, **_):
        number = ids if isinstance(ids, int) else int(ids[0])
        return f"<b>$x$\n{number}"

    def batch_decode(self, rows, **_):
        return [self.decode(row) for row in rows]


def made(n=500, *, exploding=3, untrained=0, seed=0, **changes):
    """Norms about 10, of some 500, of some untrained ones 1."""
    generator = torch.Generator().manual_seed(seed)
    norms = 10 * torch.exp(0.1 * torch.randn(n, generator=generator))
    order = torch.randperm(n, generator=generator)
    norms[order[:exploding]] = 500 * torch.exp(0.1 * torch.randn(exploding, generator=generator))
    trained = torch.ones(n, dtype=torch.bool)
    trained[order[n - untrained :]] = False
    norms[~trained] = 1.0
    scan = VocabularyScan(
        model_name="made",
        pathway="initial",
        block=2,
        ids=torch.arange(n),
        norms=norms,
        coefficients=torch.randn(n, generator=generator),
        trained=trained,
        reference=10.0,
        control=20 * torch.exp(torch.randn(1024, generator=generator)),
        explosion_found=True,
        notes=(),
        min_ratio=6.0,
        seed=seed,
    )
    return replace(scan, **changes)


def dots(figure, start=""):
    """Id, x and y of every dot of the traces whose name starts so."""
    traces = [
        trace for trace in figure.data if trace.type == "scatter" and trace.name.startswith(start) and "random" not in trace.name
    ]
    rows = [row for trace in traces for row in zip(trace.customdata[:, 0], trace.x, trace.y, strict=True)]
    return {int(number): (float(x), float(y)) for number, x, y in rows}


def names(figure):
    return [note.text for note in figure.layout.annotations if note.showarrow is not False]


def test_every_id_of_a_small_vocabulary_is_drawn_at_its_norm():
    scan = made(exploding=7, untrained=20)
    figure = scan_scatter(scan)
    assert dots(figure) == {i: (i, pytest.approx(float(norm))) for i, norm in enumerate(scan.norms)}
    exploding = (scan.trained & (scan.ratios >= 6)).nonzero().flatten().tolist()
    assert sorted(dots(figure, "ids with 6 × the ordinary norm or more (7)")) == exploding
    assert sorted(dots(figure, "untrained ids (20)")) == (~scan.trained).nonzero().flatten().tolist()
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.title.text == "500 token ids of made, each alone at position 0"
    random = f"{100 * float((scan.control >= 60).float().mean()):.0f} % of random embeddings"
    assert figure.layout.title.subtitle.text == f"7 of 480 trained ids (1 %) explode, {random}; all are drawn"


def test_hovering_shows_all_that_is_known_of_an_id():
    scan = made(50)
    trace = next(trace for trace in scan_scatter(scan).data if trace.name.startswith("other"))
    for (number, norm, ratio, coefficient), text in zip(trace.customdata, trace.text, strict=True):
        place = int(number)
        assert norm == pytest.approx(float(scan.norms[place]))
        assert ratio == pytest.approx(float(scan.norms[place]) / 10)
        assert coefficient == pytest.approx(float(scan.coefficients[place]))
        assert text == f"&lt;{place}&gt;"
    assert "coefficient" in trace.hovertemplate
    without = scan_scatter(replace(scan, coefficients=torch.full((50,), float("nan"))))
    assert not [trace for trace in without.data if "coefficient" in (trace.hovertemplate or "")]


@pytest.mark.parametrize("exploding", [150, 59_850])
def test_of_a_large_vocabulary_the_rare_and_the_extreme_ids_are_drawn(exploding):
    scan = made(60_000, exploding=exploding, untrained=0)
    figure = scan_scatter(scan)
    drawn = dots(figure)
    assert len(drawn) == MAX_POINTS + 150
    rare = (scan.ratios >= 6) == (exploding == 150)
    assert set(rare.nonzero().flatten().tolist()) <= set(drawn)
    order = scan.norms.argsort()
    assert set(order[:MAX_EXTREME].tolist() + order[-MAX_EXTREME:].tolist()) <= set(drawn)
    assert all(drawn[i][1] == pytest.approx(float(scan.norms[i])) for i in drawn)
    assert f"{len(drawn):,} are drawn" in figure.layout.title.subtitle.text
    assert len(figure.to_json()) < 300_000
    # What is left is spread over all ids.
    assert np.diff(sorted(drawn)).max() < 20 * 60_000 / MAX_POINTS


def test_the_largest_trained_ids_are_named_as_written():
    scan = made(300, untrained=5, tokenizer=Tokenizer())
    figure = scan_scatter(scan, 4)
    largest = scan.top(4).id.tolist()
    assert names(figure) == [f"&lt;b&gt;&#36;x&#36;↵{number}" for number in largest]
    for number, note in zip(largest, [note for note in figure.layout.annotations if note.showarrow is not False], strict=True):
        assert (note.x, note.y) == (number, pytest.approx(float(scan.norms[number].log10())))
    assert names(scan_scatter(scan, 0)) == []


def test_lines_mark_ordinary_tokens_and_what_counts_as_high():
    figure = scan_scatter(made())
    assert sorted(shape.y0 for shape in figure.layout.shapes) == [10, 60]
    assert {note.text: note.y for note in figure.layout.annotations if note.showarrow is False} == {
        "ordinary<br>tokens": 1.0,
        "6 ×<br>ordinary": pytest.approx(np.log10(60)),
    }


def test_random_embeddings_stand_beside_with_the_same_quantiles():
    scan = made()
    box = next(trace for trace in scan_scatter(scan).data if trace.type == "box")
    assert len(box.y) < len(scan.control)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        assert np.quantile(box.y, share) == pytest.approx(float(scan.control.quantile(share)), rel=0.02)
    without = scan_scatter(replace(scan, control=None))
    assert not [trace for trace in without.data if trace.type == "box"]
    assert "random" not in without.layout.title.subtitle.text


def test_ids_can_be_drawn_over_what_sets_them_off():
    scan = made(30_000)
    figure = scan_scatter(scan, x="coefficient")
    drawn = dots(figure)
    assert all(x == pytest.approx(float(scan.coefficients[i])) for i, (x, _) in drawn.items())
    order = scan.coefficients.argsort()
    assert set(order[:MAX_EXTREME].tolist() + order[-MAX_EXTREME:].tolist()) <= set(drawn)
    assert "coefficient" in figure.layout.xaxis.title.text
    with pytest.raises(ValueError, match="x: got 'coefficient' of a scan without coefficients"):
        scan_scatter(replace(scan, coefficients=torch.full((30_000,), float("nan"))), x="coefficient")


def test_where_nothing_explodes_it_says_so():
    figure = scan_scatter(made(exploding=0, explosion_found=False))
    assert "0 of 500 trained ids (0 %) explode" in figure.layout.title.subtitle.text
    assert "the prompts show no explosion" in figure.layout.title.subtitle.text
    assert [trace.name for trace in figure.data] == ["other ids (500)", "random embeddings"]


def test_after_another_id_that_id_is_shown_as_well():
    scan = made(20, pathway="second", others=torch.arange(20).roll(1), tokenizer=Tokenizer())
    trace = next(trace for trace in scan_scatter(scan).data if trace.name.startswith("other"))
    for (number, *_), text in zip(trace.customdata, trace.text, strict=True):
        place = int(number)
        assert text == f"&lt;b&gt;&#36;x&#36;↵{place}</b> after <b>&lt;b&gt;&#36;x&#36;↵{(place - 1) % 20}"


@pytest.mark.parametrize("x", ["id", "coefficient"])
def test_few_ids_and_none_that_was_trained_can_be_drawn(x):
    assert dots(scan_scatter(made(1, exploding=0), x=x))
    scan = made(4, exploding=0)
    figure = scan_scatter(replace(scan, trained=torch.zeros(4, dtype=torch.bool), norms=torch.tensor([0.0, 1, 2, 3])), x=x)
    assert names(figure) == []
    assert "none of 0 trained ids" in figure.layout.title.subtitle.text


def test_pathways_stand_in_columns():
    everything, few = made(200, exploding=200), made(200, exploding=4, pathway="no_attention", reference=5.0)
    figure = scan_pathways([everything, few])
    high = "ids with 6 × the ordinary norm or more"
    columns = [trace for trace in figure.data if trace.name in (high, "other ids")]
    seen = [
        (round(float(x)), int(row[0]), y) for trace in columns for x, y, row in zip(trace.x, trace.y, trace.customdata, strict=True)
    ]
    assert len(seen) == 400
    for number, scan in enumerate((everything, few)):
        in_column = {id: y for column, id, y in seen if column == number}
        assert [in_column[i] for i in range(200)] == pytest.approx(scan.ratios.tolist(), rel=1e-5)
    exploding = [
        (round(float(x)), int(row[0])) for t in columns if t.name == high for x, row in zip(t.x, t.customdata, strict=True)
    ]
    assert sorted(id for column, id in exploding if column == 1) == (few.ratios >= 6).nonzero().flatten().tolist()
    assert [text.split("<br>")[:2] for text in figure.layout.xaxis.ticktext] == [
        ["<b>alone at position 0</b>", "200 of 200 trained ids (100 %)"],
        ["<b>alone, without attention</b>", "4 of 200 trained ids (2 %)"],
    ]
    shown = [trace.name for trace in figure.data if trace.showlegend]
    assert sorted(shown) == sorted({trace.name for trace in figure.data})
    assert "left out" not in figure.layout.title.subtitle.text


def test_large_columns_say_how_much_they_leave_out():
    scan = made(20_000, exploding=50)
    figure = scan_pathways([scan])
    drawn = sum(len(trace.x) for trace in figure.data if "random" not in trace.name)
    assert f"{20_000 - drawn:,} ordinary dots are left out" in figure.layout.title.subtitle.text
    assert drawn == MAX_IN_COLUMN + 50


def test_columns_name_their_largest_ids_where_these_are():
    scan = made(200, tokenizer=Tokenizer())
    figure = scan_pathways([scan, replace(scan, pathway="no_attention", norms=scan.norms.flip(0))], 3)
    first = scan.top(3).id.tolist()
    assert names(figure) == [f"&lt;b&gt;&#36;x&#36;↵{number}" for number in [*first, *(199 - number for number in first)]]


def test_scans_of_two_models_or_none_are_refused():
    with pytest.raises(ValueError, match="scans: got none; allowed"):
        scan_pathways([])
    with pytest.raises(ValueError, match="scans: got made with a ratio of 6, other with a ratio of 6; allowed"):
        scan_pathways([made(), made(model_name="other")])
    with pytest.raises(ValueError, match="k: got -1; allowed: 0 or more"):
        scan_pathways([made()], -1)
    with pytest.raises(ValueError, match="k: got -1; allowed: 0 or more"):
        scan_scatter(made(), -1)


def test_the_result_draws_itself():
    scan = made(30)
    assert dots(scan.plot()) == dots(scan_scatter(scan))


@pytest.mark.usefixtures("as_users_run_it")
def test_axes_that_there_are_none_of_are_refused():
    with pytest.raises(ValueError, match="x: got 'norm'; allowed: 'id', 'coefficient'"):
        scan_scatter(made(), x="norm")
