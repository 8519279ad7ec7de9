"""The study against evaluations of its own parts, and on a model whose outliers were put there by hand."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
import zoo
from recording import same_state, state
from torch import nn

from sd_lens.applications import quantization
from sd_lens.applications.calibration import channel_maxima, smoothing_scales
from sd_lens.applications.perplexity import mean_loss, windows_of
from sd_lens.applications.quantization import quantization_study
from sd_lens.applications.quantization_result import Recommendation
from sd_lens.applications.quantizing import logits_of, quantized
from sd_lens.applications.sparing import Search
from sd_lens.applications.texts import default_text
from sd_lens.models.amplified import amplified
from sd_lens.models.loading import load
from sd_lens.models.projections import projections

DOWN = "model.layers.{}.mlp.down_proj"
TWO = (DOWN.format(1), "model.layers.0.self_attn.q_proj")
SHORT = {"each_block": False, "recommend": None, "ranges": False}


@functools.cache
def text(n):
    """The first tokens of the text that ships with the package, without BOS."""
    return torch.tensor(load("tiny").tokenizer(default_text(), add_special_tokens=False)["input_ids"])[:n]


@functools.cache
def study():
    """The shipped model on a short text, every way to quantise it."""
    return quantization_study(
        load("tiny"),
        text(127),
        granularities=("per_tensor", "per_token"),
        alpha=0.6,
        spare={"two": TWO},
        each_block=False,
        recommend=None,
    )


@functools.cache
def planted_model():
    return amplified().model


@functools.cache
def planted_study():
    """The model with planted outliers; every pair of blocks is spared, too."""
    pairs = {f"{a}, {b}": (DOWN.format(a), DOWN.format(b)) for a, b in itertools.combinations(range(6), 2)}
    return quantization_study(planted_model(), text(254), methods=["rtn"], spare=pairs, each_block=False, ranges=False, budget=0.05)


def test_rows_are_what_direct_evaluation_gives():
    model, found = load("tiny"), study()
    windows = windows_of(model, text(127))
    chosen = [one for one in projections(model) if one.block is not None]
    scales = smoothing_scales(chosen, channel_maxima(model, chosen, windows), 0.6)
    assert found.full.loss == pytest.approx(mean_loss(logits_of(model), windows), rel=1e-6)
    for method, granularity in itertools.product(("rtn", "smoothquant"), ("per_tensor", "per_token")):
        row = found.row(method, granularity, "two")
        assert row.names == TWO
        smooth = scales if method == "smoothquant" else None
        with quantized(model, chosen, granularity, spared=TWO, scales=smooth) as logits:
            assert row.loss == pytest.approx(mean_loss(logits, windows), rel=1e-6)
        assert row.perplexity == pytest.approx(math.exp(row.loss))


def test_what_the_study_rests_on():
    found = study()
    assert (found.window, found.stride, found.bos, found.n_tokens, found.alpha) == (128, 127, True, 127, 0.6)
    assert (found.model_name, found.d_model, found.n_blocks, found.backend) == ("tiny", 128, 6, "fake")
    assert found.explosion_blocks == (2,)
    assert [row.spared for row in found.rows] == ["none"] + ["none", "explosion and decay", "two"] * 4
    assert len(found.ranges) == 7 * 6
    assert set(found.ranges[0].sqnr_db) == {f"{m}, {g}" for m in ("rtn", "smoothquant") for g in ("per_tensor", "per_token")}


def test_tables_hold_the_rows():
    found = study()
    frame, wide = found.to_dataframe(), found.table()
    assert list(frame["loss"]) == [row.loss for row in found.rows]
    assert list(frame["lost"]) == pytest.approx([row.loss - found.full.loss for row in found.rows])
    assert list(wide["method"]) == ["rtn", "rtn", "smoothquant", "smoothquant"]
    assert set(wide["full precision"]) == {found.full.perplexity}
    for _, line in wide.iterrows():
        assert line["two"] == found.row(line["method"], line["granularity"], "two").perplexity
    spared = found.row("rtn", "per_tensor", "explosion and decay").loss
    none = found.row("rtn", "per_tensor").loss
    assert found.recovered("rtn", "per_tensor") == pytest.approx((none - spared) / (none - found.full.loss))
    assert found.recovered("rtn", "per_tensor", "none") == 0


def own_forwards(model):
    """Modules that compute something else than their class does."""
    return {name for name, module in model.named_modules() if "forward" in module.__dict__}


def test_the_shipped_model_is_restored():
    model = load("tiny")
    before, forwards = state(model), own_forwards(model)
    quantization_study(model, text(127), **{**SHORT, "ranges": True})
    assert same_state(before, state(model))
    assert forwards == own_forwards(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_model_is_restored_after_an_error(error, monkeypatch):
    model = zoo.build("llama")
    tokens, calls = zoo.tokens(model, batch=1, pos=40)[0], []
    before, forwards = state(model), own_forwards(model)

    def failing(logits, windows, **options):
        calls.append(logits(windows.ids))
        if len(calls) == 3:
            raise error
        return mean_loss(logits, windows, **options)

    monkeypatch.setattr(quantization, "mean_loss", failing)
    with pytest.raises(error):
        quantization_study(model, tokens, window=16)
    assert not torch.equal(calls[0], calls[2])  # it was quantised then
    assert same_state(before, state(model))
    assert forwards == own_forwards(model)
    assert torch.equal(logits_of(model)(tokens[:16].unsqueeze(0)), logits_of(zoo.cached("llama"))(tokens[:16].unsqueeze(0)))


def test_sparing_the_planted_blocks_brings_back_what_was_lost():
    found = planted_study()
    assert (found.explosion_blocks, found.decay_blocks) == ((2,), (5,))
    assert found.row("rtn", "per_tensor").perplexity > 1.1 * found.full.perplexity
    assert found.recovered("rtn", "per_tensor") > 0.5
    assert found.row("rtn", "per_tensor", "explosion and decay").names == (DOWN.format(2), DOWN.format(5))
    pairs = {row.spared: row.loss for row in found.rows if ", " in row.spared}
    assert len(pairs) == 15
    assert min(pairs, key=pairs.__getitem__) == "2, 5"
    assert pairs["2, 5"] == pytest.approx(found.row("rtn", "per_tensor", "explosion and decay").loss, rel=1e-9)


def test_nor_does_smoothquant_help_the_planted_model_without_sparing():
    found = quantization_study(planted_model(), text(254), methods=["smoothquant"], **SHORT)
    assert found.row("smoothquant", "per_tensor").perplexity > 1.1 * found.full.perplexity
    assert found.recovered("smoothquant", "per_tensor") > 0.5


def test_the_planted_blocks_are_recommended_without_being_told():
    found = planted_study().recommendation
    assert found.spared == (DOWN.format(2), DOWN.format(5))
    assert found.within_budget
    assert found.ignore == ["lm_head", DOWN.format(2), DOWN.format(5)]
    layer = nn.Linear(1, 1)
    assert [found.filter_fn(layer, DOWN.format(block)) for block in range(6)] == [True, True, False, True, True, False]
    assert not found.filter_fn(layer, "lm_head")
    for source in (found.torchao(), found.llm_compressor()):
        compile(source, "settings", "exec")
        assert all(name in source for name in (f'"{DOWN.format(2)}"', f'"{DOWN.format(5)}"', '"lm_head"'))
    row = planted_study().row("rtn", "per_tensor", "recommended")
    assert row.loss == found.search.loss <= planted_study().full.loss + math.log1p(0.05)


def test_fused_layers_are_spared_whole_and_named_as_transformers_does():
    model = zoo.cached("gpt2")
    tokens, name = zoo.tokens(model, batch=1, pos=40)[0], "transformer.h.1.attn.c_attn"
    found = quantization_study(model, tokens, window=16, spare=[name], methods=["rtn"], **SHORT)
    chosen = [one for one in projections(model) if one.block is not None]
    with quantized(model, [one for one in chosen if one.name != name], "per_tensor") as logits:
        wanted = mean_loss(logits, windows_of(model, tokens, window=16))
    assert found.row("rtn", "per_tensor", "given").loss == pytest.approx(wanted, rel=1e-6)
    assert found.row("rtn", "per_tensor", "given").loss != found.row("rtn", "per_tensor").loss
    assert ["part by part" in found.notes[-2], "Conv1D" in found.notes[-1]] == [True, True]


def test_models_that_do_not_explode_and_unembeddings():
    model = zoo.cached("llama")
    options = {**SHORT, "window": 16, "methods": ["rtn"], "recommend": "rtn", "budget": 0.0, "max_spared": 1}
    found = quantization_study(model, zoo.tokens(model, batch=1, pos=60)[0], min_ratio=1e6, **options)
    assert found.explosion_blocks == found.decay_blocks == ()
    assert "no explosion or decay block with a dense FFN was found on this text" in found.notes
    assert not any(row.spared == "explosion and decay" for row in found.rows)
    assert len(found.recommendation.spared) <= 1
    assert found.recommendation.excluded == ("lm_head",)
    whole = quantization_study(model, zoo.tokens(model, batch=1, pos=60)[0], unembedding=True, **options)
    assert whole.recommendation.excluded == ()
    assert whole.row("rtn", "per_tensor").loss != found.row("rtn", "per_tensor").loss
    chosen = projections(model)
    with quantized(model, chosen, "per_tensor") as logits:
        wanted = mean_loss(logits, windows_of(model, zoo.tokens(model, batch=1, pos=60)[0], window=16))
    assert whole.row("rtn", "per_tensor").loss == pytest.approx(wanted, rel=1e-6)


def test_mixtures_of_experts_have_no_dense_ffn_to_spare():
    model = zoo.cached("qwen2_moe")
    found = quantization_study(model, zoo.tokens(model, batch=1, pos=60)[0], window=16, ranges=False)
    assert {row.spared for row in found.rows} == {"none"}
    assert found.recommendation.spared == ()


BAD = {
    "text: got 60 tokens; allowed: at least 64": {"window": 64},
    "spare: got 'model.layers.1.mlp.down_pro'; allowed: .* such as 'model.layers.1.mlp.down_proj'": {
        "spare": ["model.layers.1.mlp.down_pro"]
    },
    "spare: got 'lm_head'": {"spare": {"mine": ["lm_head"]}},
    "spare: got 'some'": {"spare": "some"},
    "spare: got 'a'; allowed: a list of names": {"spare": {"mine": "a"}},
    "spare: got a list called 'none'": {"spare": {"none": []}},
    "spare: got a list called 'block 1'": {"spare": {"block 1": []}},
    "methods: got 'rtn'": {"methods": "rtn"},
    "methods: got \\[\\]": {"methods": []},
    "granularities: got \\['per_channel'\\]": {"granularities": ["per_channel"]},
    "alpha: got 1.5": {"alpha": 1.5},
    "recommend: got 'rtn'; allowed: None, or one of the methods \\(smoothquant\\)": {"methods": ["smoothquant"]},
    "budget: got -0.1": {"budget": -0.1},
    "budget: got nan": {"budget": math.nan},
    "max_spared: got -1": {"max_spared": -1},
    "backend: got 'gguf'": {"backend": "gguf"},
}


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("message", BAD)
def test_bad_input_before_any_evaluation(message, monkeypatch):
    model = zoo.cached("llama")

    def evaluated(*_, **__):
        raise AssertionError("work was done")

    monkeypatch.setattr(quantization, "mean_loss", evaluated)
    monkeypatch.setattr(quantization, "trace_norms", evaluated)
    with pytest.raises(ValueError, match=f"^{message}"):
        quantization_study(model, zoo.tokens(model, batch=1, pos=60)[0], **{"window": 16, **BAD[message]})


def test_rows_that_are_not_there():
    with pytest.raises(
        ValueError,
        match=r"^method, granularity, spared: got rtn, per_tensor, block 9; allowed: rtn, per_tensor, explosion and decay; ",
    ):
        study().row("rtn", "per_tensor", "block 9")


def test_what_is_said_of_a_search_is_true():
    """Whether it ran into a limit, and by how much, down to the tenth of a percent."""
    full, loss = 4.0, 4.0 + math.log1p(0.0123)
    ends = {"limit": "no more than 1 projection", "gain": "brings back much", "candidates": "all down-projections"}
    for because, said in ends.items():
        search = Search((DOWN.format(2),), loss, False, because, (), 3)
        sentence = Recommendation("rtn", "per_tensor", 0.001, search, (), None, full).sentence()
        assert "within 0.1 % of" in sentence
        assert "+1.2 %" in sentence
        assert said in sentence
    there = Recommendation("smoothquant", "per_token", 0.02, Search((), full - 1e-6, True, "", (), 0), (), 0.5, full)
    assert "SmoothQuant per-token is within 2 % of full precision's perplexity (±0.0 %) when nothing is spared." in there.sentence()
    assert "SmoothQuant (alpha 0.5) is no part of this" in there.torchao()


def test_scales_and_ranges_are_of_the_calibration_text():
    model, tokens = zoo.cached("llama"), zoo.tokens(zoo.cached("llama"), batch=1, pos=60)[0]
    options = {**SHORT, "window": 16, "ranges": True, "stride": 3}
    found = quantization_study(model, tokens, calibration=tokens[:20], **options)
    assert (found.n_calibrated, quantization_study(model, tokens, **options).n_calibrated) == (20, 60)
    chosen = [one for one in projections(model) if one.block is not None]
    largest = channel_maxima(model, chosen, windows_of(model, tokens[:20], window=16))
    assert [one.input_max for one in found.ranges] == pytest.approx([float(largest[one.label].max()) for one in chosen])
    with pytest.raises(ValueError, match=r"^calibration: got 3 tokens; allowed: at least"):
        quantization_study(model, tokens, calibration=tokens[:3], **options)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    "option", [{"window": 64.5}, {"stride": 2.5}, {"spare": [3]}, {"text": b"bytes"}, {"budget": "x"}, {"max_spared": 1.5}]
)
def test_arguments_of_other_types(option):
    model = zoo.cached("llama")
    arguments = {"text": zoo.tokens(model, batch=1, pos=60)[0], "window": 16} | option
    with pytest.raises(ValueError, match=f"^{next(iter(option))}: got .*; allowed: "):
        quantization_study(model, **arguments)
