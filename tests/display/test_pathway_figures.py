"""The table of both pathways as a picture: each id's three norms, how it gets its norm, and where."""

import json
import math

import pandas as pd
import pytest

from sd_lens.display.pathway_figures import pathway_table_figure
from sd_lens.tracing.delimiters import TokenPathways

LOOKS = {
    "alone at position 0": "initial_norm",
    "alone, without attention": "no_attention_norm",
    "in the text, after the first position": "mean_norm",
}


def made(pathways, *, texts=None, **changes):
    """Ids 0, 1, ... with norms of their own; those at position 0 only have no mean over later positions."""
    count = len(pathways)
    numbers = range(count)
    rows = pd.DataFrame(
        {
            "id": list(numbers),
            "token": list(texts or (f"t{i}" for i in numbers)),
            "n": [i + 1 for i in numbers],
            "high_initial": [int(way in ("initial", "self")) for way in pathways],
            "high_later": [i if way in ("context", "self") else 0 for i, way in enumerate(pathways)],
            "initial_norm": [500.0 + i for i in numbers],
            "no_attention_norm": [400.0 + i if way == "self" else 9.0 + i for i, way in enumerate(pathways)],
            "mean_norm": [math.nan if way == "initial" else 11.0 + i for i, way in enumerate(pathways)],
            "pathway": pathways,
        }
    )
    return TokenPathways(
        **{"model_name": "made", "block": 2, "rows": rows, "reference": 10.0, "min_ratio": 6.0, "n_tokens": 99, "n_prompts": 9}
        | changes
    )


def shown(figure, name):
    """What a row's dot of this name is at, by the text of the row."""
    trace = next(trace for trace in figure.data if trace.name == name)
    assert list(trace.y) == list(figure.layout.yaxis.tickvals)
    return dict(zip(figure.layout.yaxis.ticktext, trace.x, strict=True))


def beside(figure):
    notes = [note for note in figure.layout.annotations if note.xref == "paper"]
    assert [note.y for note in notes] == list(figure.layout.yaxis.tickvals)
    return [note.text for note in notes]


def test_every_id_with_a_high_norm_has_its_three_norms():
    pathways = made(["none", "self", "initial", "none", "context"])
    figure = pathway_table_figure(pathways)
    assert list(figure.layout.yaxis.ticktext) == ["t1", "t2", "t4"]
    rows = pathways.rows.set_index("token")
    for name, column in LOOKS.items():
        for token, value in shown(figure, name).items():
            expected = rows[column][token]
            assert value == (None if math.isnan(expected) else expected)
    assert figure.layout.xaxis.type == "log"
    assert figure.layout.xaxis.title.text == "norm after block 2 (log scale)"
    assert beside(figure) == ["by itself: 2 of 2 places", "at position 0: 1 of 3 places", "through context: 4 of 5 places"]
    assert figure.layout.title.subtitle.text.startswith("3 token ids with a high norm in the text; ")
    lines = [shape.x0 for shape in figure.layout.shapes]
    assert lines == [10.0, 60.0]


def test_a_stroke_spans_the_norms_of_each_id():
    figure = pathway_table_figure(made(["self", "initial"]))
    stroke = figure.data[0]
    ends = [(stroke.x[i], stroke.x[i + 1], stroke.y[i], stroke.y[i + 1]) for i in (0, 3)]
    assert ends == [(11.0, 500.0, 0, 0), (10.0, 501.0, 1, 1)]


def test_of_many_ids_each_way_has_its_share_of_the_rows():
    figure = pathway_table_figure(made(["initial"] * 30 + ["self"] * 2 + ["context"] * 9), k=12)
    assert [text.split(":")[0] for text in beside(figure)] == ["by itself"] * 2 + ["at position 0"] * 5 + ["through context"] * 5
    assert list(figure.layout.yaxis.ticktext)[:4] == ["t30", "t31", "t0", "t1"]
    assert "41 token ids with a high norm in the text, 12 are shown" in figure.layout.title.subtitle.text


def test_where_none_has_a_high_norm_it_says_so_and_shows_the_frequent_ones():
    figure = pathway_table_figure(made(["none"] * 20))
    assert figure.layout.title.subtitle.text == "no token id has a high norm in the text; the 12 most frequent of 20 are shown"
    assert list(figure.layout.yaxis.ticktext) == [f"t{i}" for i in range(12)]
    assert beside(figure)[:2] == ["0 of 1 place", "0 of 2 places"]


def test_tokens_and_names_are_shown_as_written():
    figure = pathway_table_figure(made(["self", "self"], texts=["<b>$x$\n", "<b>$x$\n"], model_name="a <b>& c"))
    layout = json.loads(figure.to_json())["layout"]
    assert layout["yaxis"]["ticktext"] == ["&lt;b&gt;&#36;x&#36;↵"] * 2
    assert layout["title"]["text"] == "Which token ids of a &lt;b&gt;&amp; c have a high norm, and how they get it"
    assert list(figure.data[1].text) == ["&lt;b&gt;&#36;x&#36;↵"] * 2
    assert [list(data) for data in figure.data[1].customdata] == [["50", 0], ["50.1", 1]]


def test_the_result_draws_itself_and_no_row_is_refused():
    pathways = made(["self", "initial"])
    assert pathways.plot().to_json() == pathway_table_figure(pathways).to_json()
    with pytest.raises(ValueError, match="k: got 0; allowed: at least 1"):
        pathway_table_figure(pathways, 0)


def test_a_real_text_can_be_drawn():
    from sd_lens.models.loading import load
    from sd_lens.tracing.delimiters import token_pathways

    pathways = token_pathways(load("tiny"), progress=False)
    figure = pathway_table_figure(pathways)
    high = pathways.high()
    assert list(shown(figure, "alone at position 0").values()) == high.initial_norm.tolist()
    assert list(shown(figure, "alone, without attention").values()) == high.no_attention_norm.tolist()
