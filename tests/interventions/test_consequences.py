"""The table of consequences against forward passes, norms and sinks computed one prompt at a time, and against planted truth."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
import zoo
from recording import record, same_state, state
from shared import planted
from streams import ragged
from transformer_lens.model_bridge.sources import build_bridge_from_module

from sd_lens.interventions.consequences import consequences
from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.models.loading import load, weights_of
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.prompts import BUILT_IN_PROMPTS
from sd_lens.tracing.sinks import sink_attention
from sd_lens.tracing.source import source_of

PLACES = {"initial": "initial", "everywhere": "all"}
MEASURES = ("loss", "kl", "peak_norm", "peak_ratio", "block_ratio", "peak_ratio_anywhere", "n_high", "sink_rate", "sink_attention")
FAMILIES = [name for name in ("qwen2", "phi", "hooked_qwen2", "hooked_phi") if name in zoo.FAMILIES]


def planted_prompts(truth):
    """Three prompts; with the trigger token at three places, one of them the first."""
    prompts = ragged(90, (12, 9, 12))
    if truth.trigger_token is not None:
        prompts[0][4] = prompts[1][7] = prompts[2][0] = truth.trigger_token
    return prompts


def values(row, names=MEASURES):
    return [getattr(row.measures, name) for name in names]


def by_hand(model, prompts, intervention=None):
    """Logits of each prompt run alone."""
    found = []
    for prompt in prompts:
        with torch.no_grad():
            if intervention is None:
                found.append(model(prompt.unsqueeze(0))[0])
            else:
                with intervention.attached():
                    found.append(model(prompt.unsqueeze(0))[0])
    return [logits.double() for logits in found]


def loss_by_hand(logits, prompts):
    losses = [
        -float(torch.log_softmax(own, -1)[place, token])
        for own, prompt in zip(logits, prompts, strict=True)
        for place, token in enumerate(prompt[1:].tolist())
    ]
    return sum(losses) / len(losses)


def kl_by_hand(old, new):
    parts = [
        (torch.softmax(a, -1) * (torch.log_softmax(a, -1) - torch.log_softmax(b, -1))).sum(-1)
        for a, b in zip(old, new, strict=True)
    ]
    return float(torch.cat(parts).mean())


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture(scope="module")
def of_tiny(tiny):
    return consequences(tiny, generate=None, progress=False)


def test_removal_removes_what_was_planted(planted_model):
    """After the explosion block nothing is left of it, and after later ones no more than in a model without the planted neuron."""
    truth, prompts = planted_model, planted_prompts(planted_model)
    found = consequences(truth.model, prompts, rank=1, where=["everywhere"], mean=False, controls=1, progress=False)
    assert (found.block, found.n_high) == (truth.explosion_block, 3)
    before = found.untouched.measures
    W_out = weights_of(truth.model)[truth.explosion_block].ffn.W_out
    kept = W_out[0].clone()
    with torch.no_grad():
        W_out[0] = 0.0
        bare = trace_norms(truth.model, prompts, direction_prompts=0)
        W_out[0] = kept
    high = trace_norms(truth.model, prompts, direction_prompts=0).high_norm().any(0)
    without = float(bare.ratios[truth.explosion_block + 1 :, high].max())
    assert without < 3.5 < 1000 < before.peak_ratio
    for side in ("trigger", "direction", "both"):
        after = found.row("ablate", side, "everywhere").measures
        assert after.block_ratio < 1.5
        assert after.peak_ratio == pytest.approx(without, rel=0.05)
        assert after.n_high == 0
        if truth.pathway == "embedding":  # the pathway through a head erases the first token, into which later blocks write
            assert after.peak_ratio < 1.5
        control = found.row("random control", side, "everywhere")
        assert control.measures.peak_ratio > 0.8 * before.peak_ratio
        assert control.measures.n_high == 3


def test_the_shipped_model(of_tiny):
    """What the report says of it, pinned; with a control that has the same effect on the sinks, which must not be hidden."""
    before = of_tiny.untouched.measures
    assert (of_tiny.block, of_tiny.rank, of_tiny.n_high, of_tiny.n_delimiters, of_tiny.n_sink_heads) == (2, 2, 6, 0, 8)
    assert (before.loss, before.kl) == (pytest.approx(4.497, abs=2e-3), 0)
    assert before.peak_ratio == before.peak_ratio_anywhere == pytest.approx(13.25, abs=0.02)
    assert before.sink_rate == pytest.approx(0.278, abs=1e-3)
    assert before.sink_attention == pytest.approx(0.403, abs=2e-3)
    for where in ("initial", "everywhere"):
        both = of_tiny.row("ablate", "both", where).measures
        assert both.peak_ratio < 1.5
        assert both.peak_ratio_anywhere == pytest.approx(3.24, abs=0.02)  # block 1 writes some of it
        assert both.n_high == 0
        for side in ("trigger", "direction", "both"):
            assert of_tiny.row("random control", side, where).measures.peak_ratio > 0.8 * before.peak_ratio
    initial = of_tiny.row("ablate", "both", "initial").measures
    assert initial.loss == pytest.approx(4.588, abs=5e-3)
    assert initial.kl == pytest.approx(0.178, abs=5e-3)
    assert (initial.sink_rate, initial.sink_attention) == (pytest.approx(0.208, abs=0.01), pytest.approx(0.366, abs=5e-3))
    everywhere = of_tiny.row("ablate", "both", "everywhere").measures
    assert (everywhere.sink_rate, everywhere.sink_attention) == (pytest.approx(0.181, abs=0.01), pytest.approx(0.314, abs=5e-3))
    trigger = of_tiny.row("ablate", "trigger", "initial").measures
    assert (trigger.sink_rate, trigger.sink_attention) == (pytest.approx(0.361, abs=0.01), pytest.approx(0.458, abs=5e-3))
    control = of_tiny.row("random control", "both", "initial").measures
    assert control.sink_attention < before.sink_attention - 0.02


def test_its_sentences(of_tiny):
    norm, cost, sinks = of_tiny.sentences()
    assert re.fullmatch(
        r"With the explosion subspace of block 2 \(rank 2, both sides\) ablated at the initial tokens, the high-norm tokens reach 1\.39 times the "
        r"median of the others from that block on, instead of 13\.3 \(random control: 18\.\d\)\.",
        norm,
    )
    assert re.fullmatch(
        r"The loss goes from 4\.497 to 4\.58\d nats per token \(random control: 4\.5\d\d\), and the predictions change by a KL divergence of "
        r"0\.17\d \(random control: 0\.\d{3}\)\.",
        cost,
    )
    assert re.match(
        r"The 8 sink heads pay position 0 37% of their attention instead of 40% \(random control: 3\d%\), and the sink rate goes from 27\.8% to "
        r"2\d\.\d% \(random control: ",
        sinks,
    )
    doubt = " What their attention falls by cannot be told from what displacing tokens by as much does."
    assert sinks.endswith(doubt)
    rows = [
        replace(row, spread=replace(row.spread, sink_attention=1e-4)) if row.intervention == "random control" else row
        for row in of_tiny.rows
    ]
    assert not replace(of_tiny, rows=tuple(rows)).sentences()[2].endswith(doubt)
    alone = replace(of_tiny, rows=tuple(row for row in of_tiny.rows if row.intervention != "random control"))
    assert "random control" not in " ".join(alone.sentences())
    assert not alone.sentences()[2].endswith(doubt)
    nothing = replace(of_tiny, n_high=0, n_sink_heads=0)
    assert nothing.sentences()[0] == "No token has a high norm that ablating the subspace of block 2 could remove."
    assert len(nothing.sentences()) == 2


@pytest.mark.parametrize(("n_delimiters", "where"), [(0, "initial"), (2, "everywhere"), (6, "delimiters")])
def test_sentences_are_about_the_fewest_edits_that_reach_all_high_norm_tokens(of_tiny, n_delimiters, where):
    main = replace(of_tiny, n_delimiters=n_delimiters).main
    assert (main.intervention, main.side, main.where) == ("ablate", "both", where)


def test_rows_are_in_order_and_count_their_tokens(of_tiny):
    table = of_tiny.to_dataframe()
    assert len(table) == 1 + 3 * 3 * 3
    assert table.iloc[0].tolist()[:4] == ["none", "none", "none", 0]
    assert table["intervention"].tolist()[1:4] == ["ablate", "mean ablate", "random control"]
    assert dict(table.groupby("where")["n_tokens"].max()) == {"none": 0, "initial": 6, "delimiters": 0, "everywhere": 265}
    assert table["kl_std"].notna().tolist() == [kind == "random control" for kind in table["intervention"]]
    for row in of_tiny.rows:
        if row.where == "delimiters":  # there are none
            assert values(row) == values(of_tiny.untouched)
    with pytest.raises(ValueError, match=r"^intervention, side, where: got 'ablate', 'both', 'nowhere'; allowed"):
        of_tiny.row("ablate", "both", "nowhere")


def test_loss_norms_and_sinks_of_the_shipped_model_by_hand(tiny, of_tiny):
    prompts = [tiny.to_tokens(prompt)[0] for prompt in BUILT_IN_PROMPTS]
    subspace = ExplosionSubspace.at(tiny, 2, rank=2)
    plain = by_hand(tiny, prompts)
    heads = sink_attention(tiny, prompts).alpha > 0.3
    high = trace_norms(tiny, prompts, direction_prompts=0).high_norm().any(0)
    for side, where in (("trigger", "everywhere"), ("both", "initial")):
        row = of_tiny.row("ablate", side, where).measures
        intervention = subspace.ablate(side=side, positions=PLACES[where])
        edited = by_hand(tiny, prompts, intervention)
        assert row.loss == pytest.approx(loss_by_hand(edited, prompts), abs=2e-5)
        assert row.kl == pytest.approx(kl_by_hand(plain, edited), abs=2e-5)
        with intervention.attached():
            trace = trace_norms(tiny, prompts, direction_prompts=0)
            sinks = sink_attention(tiny, prompts)
        assert row.peak_ratio == pytest.approx(float(trace.ratios[3:, high].max()), rel=1e-5)
        assert row.block_ratio == pytest.approx(float(trace.ratios[3, high].max()), rel=1e-5)
        assert row.peak_ratio_anywhere == pytest.approx(float(trace.ratios[1:, high].max()), rel=1e-5)
        assert row.peak_norm == pytest.approx(float(trace.norms[3:, high].max()), rel=1e-5)
        assert row.n_high == int(trace.high_norm()[3:].any(0).sum())
        assert row.sink_rate == pytest.approx(sinks.sink_rate, abs=1e-6)
        assert row.sink_attention == pytest.approx(float(sinks.alpha[heads].mean()), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_generations_by_hand(family):
    """Random models of both kinds, where what counts as high is not high at all; prompts of several lengths, one of one token."""
    model, prompts = zoo.cached(family), ragged(zoo.VOCAB, (11, 1, 7, 11))
    subspace = ExplosionSubspace.at(model, 1, rank=2)
    found = consequences(
        model, prompts, subspace=subspace, mean=False, controls=0, min_ratio=1.2, batch_tokens=25, epsilon=0.15, progress=False
    )
    trace = trace_norms(model, prompts, direction_prompts=0)
    high = trace.high_norm(1.2).any(0)
    assert found.n_high == int(high.sum()) > 0
    plain = by_hand(model, prompts)
    assert found.untouched.measures.loss == pytest.approx(loss_by_hand(plain, prompts), abs=1e-5)
    rate = sink_attention(model, prompts, epsilon=0.15)
    assert found.untouched.measures.sink_rate == pytest.approx(rate.sink_rate, abs=1e-6)
    late = high & (trace.position > 0)
    assert 0 < found.row("ablate", "both", "delimiters").n_tokens == int(late.sum()) == found.n_delimiters
    for side in ("trigger", "direction", "both"):
        edited = by_hand(model, prompts, subspace.ablate(side=side))
        row = found.row("ablate", side, "everywhere").measures
        assert row.loss == pytest.approx(loss_by_hand(edited, prompts), abs=1e-5)
        assert row.kl == pytest.approx(kl_by_hand(plain, edited), abs=1e-5)
        assert row.kl > 1e-3
        some = []
        for number, prompt in enumerate(prompts):
            mask = late[trace.prompt == number].unsqueeze(0)
            some += by_hand(model, [prompt], subspace.ablate(side=side, positions=mask))
        row = found.row("ablate", side, "delimiters").measures
        assert row.loss == pytest.approx(loss_by_hand(some, prompts), abs=1e-5)
        assert row.kl == pytest.approx(kl_by_hand(plain, some), abs=1e-5)


def test_delimiters_are_the_planted_tokens_and_no_others():
    truth = planted(pathway="embedding")
    prompts = planted_prompts(truth)
    found = consequences(truth.model, prompts, sides=["trigger"], mean=False, controls=0, progress=False)
    counts = {row.where: row.n_tokens for row in found.rows}
    assert counts == {"none": 0, "initial": 3, "delimiters": 2, "everywhere": 33}
    # Each place leaves the high norms of the others.
    assert {row.where: row.measures.n_high for row in found.rows} == {"none": 3, "initial": 2, "delimiters": 1, "everywhere": 0}
    subspace = ExplosionSubspace.at(truth.model, truth.explosion_block, rank=2)
    edited = [
        by_hand(truth.model, [prompt], subspace.ablate(positions=[place]))[0] if place else by_hand(truth.model, [prompt])[0]
        for prompt, place in zip(prompts, (4, 7, None), strict=True)
    ]
    assert found.row("ablate", "trigger", "delimiters").measures.loss == pytest.approx(loss_by_hand(edited, prompts), abs=1e-5)


def test_padding_does_not_matter():
    truth = planted("gpt2", pathway="embedding")
    prompts = planted_prompts(truth)
    options = {"sides": ["both"], "where": ["delimiters"], "rank": 1, "controls": 1, "progress": False}
    one, together = (consequences(truth.model, prompts, batch_tokens=size, **options) for size in (1, 4096))
    for row, other in zip(one.rows, together.rows, strict=True):
        assert (row.intervention, row.where, row.n_tokens) == (other.intervention, other.where, other.n_tokens)
        assert values(row) == pytest.approx(values(other), rel=2e-4, abs=1e-4, nan_ok=True)


def test_mean_ablation_sets_the_mean_over_tokens_without_a_high_norm(tiny, of_tiny):
    prompts = [tiny.to_tokens(prompt)[0] for prompt in BUILT_IN_PROMPTS]
    subspace = ExplosionSubspace.at(tiny, 2, rank=2)
    names = ["blocks.2.mlp.hook_in", "blocks.2.hook_resid_post"]
    seen = [record(tiny, prompt.unsqueeze(0), names) for prompt in prompts]
    gain = weights_of(tiny)[2].ffn.norm.gain
    read = torch.cat([one[names[0]][0, 1:] / gain for one in seen]) @ subspace.right  # all but BOS, which alone has a high norm
    left = torch.cat([one[names[1]][0, 1:] for one in seen]) @ subspace.left
    by_side = {"trigger": read.mean(0), "direction": left.mean(0)}
    interventions = {side: subspace.ablate(mean=mean, side=side) for side, mean in by_side.items()}
    interventions["both"] = interventions["trigger"] + interventions["direction"]
    for side, intervention in interventions.items():
        wanted = loss_by_hand(by_hand(tiny, prompts, intervention), prompts)
        assert of_tiny.row("mean ablate", side, "everywhere").measures.loss == pytest.approx(wanted, abs=3e-5)
        assert of_tiny.row("ablate", side, "everywhere").measures.loss != pytest.approx(wanted, abs=1e-3)


def test_controls_are_means_and_deviations_over_seeds():
    truth = planted(pathway="embedding")
    options = {"rank": 1, "where": ["everywhere"], "sides": ["both"], "mean": False, "progress": False}
    prompts = planted_prompts(truth)
    alone = [consequences(truth.model, prompts, controls=1, seed=seed, **options).rows[-1] for seed in (5, 6)]
    assert all(math.isnan(row.spread.kl) for row in alone)
    together = consequences(truth.model, prompts, controls=2, seed=5, **options).rows[-1]
    table = torch.tensor([values(row, ("loss", "kl", "peak_norm")) for row in alone], dtype=torch.float64)
    assert values(together, ("loss", "kl", "peak_norm")) == pytest.approx(table.mean(0).tolist(), rel=1e-6)
    spread = [together.spread.loss, together.spread.kl, together.spread.peak_norm]
    assert spread == pytest.approx(table.std(0).tolist(), rel=1e-5)
    assert min(spread[:2]) > 1e-3
    subspace = ExplosionSubspace.at(truth.model, truth.explosion_block)
    by_seed = loss_by_hand(by_hand(truth.model, prompts, subspace.ablate(side="both").control(6)), prompts)
    assert alone[1].measures.loss == pytest.approx(by_seed, abs=1e-5)


def test_a_model_that_shows_no_attention_patterns():
    hf = zoo.hf_model("opt")
    hf.set_attn_implementation("sdpa")
    model = build_bridge_from_module(hf, architecture=type(hf).__name__, hf_config=hf.config).eval()
    prompts, eager = ragged(zoo.VOCAB, (9, 6)), zoo.cached("opt")
    options = {
        "mean": False,
        "controls": 0,
        "min_ratio": 1.1,
        "progress": False,
        "max_new_tokens": 3,
        "generate": prompts[:1],
        "sides": ["both"],
    }
    found = consequences(model, prompts, subspace=ExplosionSubspace.at(model, 1), **options)
    wanted = consequences(eager, prompts, subspace=ExplosionSubspace.at(eager, 1), **options)
    assert "the model shows no attention patterns, so that sinks were not measured" in found.notes
    assert found.n_sink_heads == 0
    for row, other in zip(found.rows, wanted.rows, strict=True):
        assert math.isnan(row.measures.sink_rate)
        assert math.isnan(row.measures.sink_attention)
        assert values(row, MEASURES[:-2]) == pytest.approx(values(other, MEASURES[:-2]), rel=1e-4, abs=1e-5, nan_ok=True)
    assert [text.ids for text in found.continuations] == [text.ids for text in wanted.continuations]


def test_where_no_token_has_a_high_norm_there_is_no_peak():
    model, prompts = zoo.cached("llama"), ragged(zoo.VOCAB, (9, 6))
    subspace = ExplosionSubspace.at(model, 1)
    found = consequences(model, prompts, subspace=subspace, sides=["trigger"], where=["everywhere"], controls=0, progress=False)
    assert found.n_high == 0
    assert math.isnan(found.main.measures.peak_ratio)
    assert found.main.measures.kl > 0
    assert "no token has a high norm, so that there is no peak to compare" in found.notes
    assert "the model has no tokenizer, so that no text was generated" in found.notes


def test_a_source_is_shared_and_a_cache_is_refused(tiny):
    source = source_of(tiny, ["One, two."], may_need=())
    options = {"where": ["initial"], "sides": ["trigger"], "mean": False, "controls": 0, "generate": None, "progress": False}
    found = consequences(tiny, source, **options)
    assert found.rows == consequences(tiny, ["One, two."], **options).rows
    tokens = tiny.to_tokens("One, two.")
    _, cache = tiny.run_with_cache(tokens)
    with pytest.raises(ValueError, match=r"^prompts: got activations of a cache; allowed: prompts"):
        consequences(tiny, source_of(tiny, tokens, may_need=(), cache=cache), **options)


def test_where_nothing_explodes_that_is_said():
    model = zoo.cached("llama")
    with pytest.raises(ValueError, match=r"^block: got none, and no block explodes \(Defects\(.*: no high-norm token"):
        consequences(model, zoo.tokens(model), progress=False)


@pytest.mark.skipif("hooked_olmo2" not in zoo.FAMILIES, reason="TransformerLens 4 has no HookedTransformer")
def test_a_model_whose_ffn_input_has_no_hook_point_is_refused_before_any_work():
    model = zoo.build("hooked_olmo2")
    ran = []
    watch = [("blocks.0.hook_resid_pre", lambda stream, hook: ran.append(1))]
    with (
        model.hooks(fwd_hooks=watch),
        pytest.raises(ValueError, match=r"^model: no hook point shows what the FFN of block 0 alone reads"),
    ):
        consequences(model, zoo.tokens(model))
    assert ran == []


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": ["first"]}, r"^where: got \['first'\]; allowed: a list of 'initial', 'delimiters', 'everywhere'"),
        ({"where": "initial"}, r"^where: got 'initial'; allowed: a list of"),
        ({"where": []}, r"^where: got \[\]; allowed: a list of"),
        ({"sides": ["left"]}, r"^sides: got \['left'\]; allowed: a list of 'trigger', 'direction', 'both'"),
        ({"controls": -1}, r"^controls: got -1; allowed: a whole number from 0"),
        ({"controls": 1.5}, r"^controls: got 1\.5; allowed: a whole number from 0"),
        ({"max_new_tokens": 0}, r"^max_new_tokens: got 0; allowed: a whole number from 1"),
        ({"epsilon": 1.0}, r"^epsilon: got 1\.0; allowed: between 0 and 1"),
        ({"T": 0}, r"^T: got 0; allowed: a whole number from 1"),
        ({"min_ratio": 1.0}, r"^min_ratio: got 1\.0; allowed: above 1"),
        ({"batch_tokens": 0}, r"^batch_tokens: got 0; allowed: a whole number from 1"),
        ({"generate": ""}, r"^generate: prompts: got an empty prompt"),
        ({"generate": [""]}, r"^generate: prompts: got an empty prompt"),
        ({"generate": [3]}, r"^generate: prompts: got a list of int"),
        (
            {"generate": torch.zeros(1, 512, dtype=torch.long)},
            r"^generate: prompt 0 has 512 tokens; allowed: at most 511, to go on from",
        ),
        ({"prompts": ""}, r"^prompts: got an empty prompt"),
    ],
)
def test_bad_input_is_refused_before_any_work(tiny, options, message):
    ran = []
    watch = [("blocks.0.hook_resid_pre", lambda stream, hook: ran.append(1))]
    with tiny.hooks(fwd_hooks=watch), pytest.raises(ValueError, match=message):
        consequences(tiny, options.pop("prompts", None), **options)
    assert ran == []


def test_a_subspace_of_another_model_is_refused(tiny):
    with pytest.raises(ValueError, match=r"^subspace: got one of another model"):
        consequences(tiny, subspace=ExplosionSubspace.at(zoo.cached("llama"), 1))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_before_when_interrupted(tiny, error):
    runs = []

    def interrupt(stream, hook):
        runs.append(1)
        if len(runs) == stop:
            raise error("in the middle")

    before = state(tiny)
    for at in (3, 6, 12):  # tracing, in the table, while text is generated
        stop = at
        runs.clear()
        with pytest.raises(error), tiny.hooks(fwd_hooks=[("blocks.4.hook_resid_post", interrupt)]):
            consequences(tiny, ["One, two."], sides=["trigger"], where=["initial"], controls=1, max_new_tokens=3, progress=False)
        assert same_state(before, state(tiny))
