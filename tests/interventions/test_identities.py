"""What interventions must do by their definitions: identities, fixed points, and values that can be read back."""

from __future__ import annotations

import math

import editing
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import record, relative_error
from tokenizer import with_tokenizer

from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.models.loading import load, weights_of

FAMILIES = [
    "llama",
    "gpt2",
    *(("gpt_neox_parallel", "mixtral") if zoo.HookedTransformer is None else ("hooked_llama", "hooked_gpt2")),
]
SIDES = ("trigger", "direction", "both")
BLOCK = 1


@pytest.fixture(params=FAMILIES)
def model(request):
    return zoo.cached(request.param)


@torch.no_grad()
def logits_of(model, tokens, *interventions):
    hooks = [hook for intervention in interventions for hook in intervention.fwd_hooks()]
    return model.run_with_hooks(tokens, fwd_hooks=hooks)


def coefficients(subspace, side, tokens, *interventions):
    """Coefficients on one side, read behind the interventions' hooks, by brute force."""
    (site,) = subspace.sites(side)
    kept = []
    hooks = [hook for intervention in interventions for hook in intervention.fwd_hooks()]
    with torch.no_grad():
        subspace.model.run_with_hooks(
            tokens, fwd_hooks=[*hooks, (site.name, lambda value, hook: kept.append(value.detach().clone()))]
        )
    if side == "direction":
        return kept[-1] @ subspace.left
    norm = weights_of(subspace.model)[subspace.block].ffn.norm
    x = kept[-1]
    if norm is not None and site.name.split(".", 2)[-1] != "ln2.hook_normalized":
        x = (x if norm.bias is None else x - norm.bias) / norm.gain
    return x @ subspace.right


@pytest.mark.parametrize("side", SIDES)
def test_patching_from_the_same_run_changes_nothing_to_the_bit(model, side):
    subspace, tokens = editing.random_subspace(model, BLOCK), zoo.tokens(model, 3, 8)
    with torch.no_grad():
        before, cache = model.run_with_cache(tokens)
    assert torch.equal(logits_of(model, tokens, subspace.patch(tokens, side=side)), before)
    assert torch.equal(logits_of(model, tokens, subspace.patch(list(tokens), side=side)), before)
    assert torch.equal(logits_of(model, tokens, subspace.patch(cache, side=side)), before)
    assert torch.equal(logits_of(model, tokens, subspace.patch(dict(cache.items()), side=side)), before)
    # From what adds up to the stream the coefficients are the same but for rounding.
    names = [f"blocks.{BLOCK}.hook_{name}" for name in ("resid_pre", "attn_out", "resid_post")]
    with torch.no_grad():
        _, small = model.run_with_cache(tokens, names_filter=names)
    torch.testing.assert_close(logits_of(model, tokens, subspace.patch(small, side=side)), before, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        one_row, cache = model.run_with_cache(tokens[:1], remove_batch_dim=True)
    torch.testing.assert_close(
        logits_of(model, tokens[:1], subspace.patch(cache, side=side)), one_row.view_as(before[:1]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_patching_from_the_same_text_changes_nothing_to_the_bit(family):
    model = with_tokenizer(family)
    texts = ["abc de", "x"]
    tokens = model.to_tokens(texts, padding_side="right")
    subspace = editing.random_subspace(model, BLOCK)
    for side in SIDES:
        assert torch.equal(logits_of(model, tokens, subspace.patch(texts, side=side)), logits_of(model, tokens))
        # Without BOS, the source is another one.
        other = subspace.patch(texts, side=side, prepend_bos=False)
        assert float((logits_of(model, tokens, other) - logits_of(model, tokens)).abs().max()) > 1e-3


@pytest.mark.parametrize("side", SIDES)
def test_patching_puts_the_coefficients_of_another_run(model, side):
    subspace, tokens, source = editing.random_subspace(model, BLOCK), zoo.tokens(model, 2, 6), zoo.tokens(model, 2, 6, seed=1)
    patched = subspace.patch(source, side=side)
    for read in ("trigger", "direction") if side == "both" else (side,):
        wanted, there = (coefficients(subspace, read, ids) for ids in (source, tokens))
        got = coefficients(subspace, read, tokens, patched)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert float((there - wanted).abs().max()) > 0.1
    # One row serves all, and where a source ends nothing is edited.
    got = coefficients(subspace, "direction", tokens, subspace.patch(source[:1, :4], side="direction"))
    wanted, there = (coefficients(subspace, "direction", ids) for ids in (source[:1], tokens))
    torch.testing.assert_close(got[:, :4], wanted[:, :4].expand(2, 4, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[:, 4:], there[:, 4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_ablating_twice_is_ablating_once(model, side):
    subspace, tokens = editing.random_subspace(model, BLOCK), zoo.tokens(model, 2, 6)
    ablate = subspace.ablate(side=side)
    once = logits_of(model, tokens, ablate)
    assert relative_error(logits_of(model, tokens, ablate, ablate), once) < 1e-5
    assert relative_error(logits_of(model, tokens, ablate + ablate), once) < 1e-5
    assert torch.equal(logits_of(model, tokens, subspace.steer(0.0, side=side)), once)
    assert torch.equal(logits_of(model, tokens, subspace.steer(target=0.0, side=side)), once)
    assert relative_error(logits_of(model, tokens), once) > 0.01
    for read in ("trigger", "direction") if side == "both" else (side,):
        assert float(coefficients(subspace, read, tokens, ablate).abs().max()) < 2e-5


@pytest.mark.parametrize("side", SIDES)
def test_steering_by_one_is_the_identity(model, side):
    subspace, tokens = editing.random_subspace(model, BLOCK), zoo.tokens(model, 2, 6)
    assert torch.equal(logits_of(model, tokens, subspace.steer(1.0, side=side)), logits_of(model, tokens))


@settings(max_examples=5)
@given(scale=st.floats(-4, 4), values=st.lists(st.floats(-5, 5), min_size=2, max_size=2), seed=st.integers(0, 99))
@pytest.mark.parametrize("family", [name for name in ("llama", "hooked_gpt2") if name in zoo.FAMILIES])
@pytest.mark.parametrize("side", ["trigger", "direction"])
def test_steering_gives_coefficients_the_value_asked_for(side, family, scale, values, seed):
    model = zoo.cached(family)
    subspace, tokens = editing.random_subspace(model, BLOCK, seed=seed), zoo.tokens(model, 2, 5, seed=seed)
    before = coefficients(subspace, side, tokens)
    got = coefficients(subspace, side, tokens, subspace.steer(scale, side=side))
    torch.testing.assert_close(got, scale * before, rtol=1e-4, atol=1e-4)
    target = torch.tensor(values)
    got = coefficients(subspace, side, tokens, subspace.steer(target=target, side=side))
    torch.testing.assert_close(got, target.expand_as(got), rtol=1e-4, atol=1e-4)
    got = coefficients(subspace, side, tokens, subspace.steer(target=values[0], side=side))
    torch.testing.assert_close(got, torch.full_like(got, values[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["trigger", "direction"])
def test_mean_ablation_sets_the_mean_of_reference_prompts(model, side):
    subspace, tokens = editing.random_subspace(model, BLOCK), zoo.tokens(model, 2, 6)
    references = [zoo.tokens(model, 1, length, seed=length)[0] for length in (3, 9, 5)]
    alone = [coefficients(subspace, side, reference.unsqueeze(0))[0] for reference in references]
    mean = torch.cat(alone).mean(0)  # over tokens, so that a longer prompt counts for more
    for given_ in (references, mean, mean.double()):
        got = coefficients(subspace, side, tokens, subspace.ablate(mean=given_, side=side))
        torch.testing.assert_close(got, mean.expand_as(got), rtol=1e-4, atol=1e-5)
    assert float((mean - torch.stack([one.mean(0) for one in alone]).mean(0)).abs().max()) > 1e-3
    got = coefficients(subspace, side, tokens, subspace.ablate(mean=0.5, side=side))
    torch.testing.assert_close(got, torch.full_like(got, 0.5), rtol=1e-4, atol=1e-5)


def test_mean_ablation_of_both_sides_has_a_mean_for_each(model):
    subspace, tokens = editing.random_subspace(model, BLOCK), zoo.tokens(model, 2, 6)
    reference = zoo.tokens(model, 3, 6, seed=1)
    ablate = subspace.ablate(mean=reference, side="both")
    for side in ("trigger", "direction"):
        mean = coefficients(subspace, side, reference).flatten(0, 1).mean(0)
        got = coefficients(subspace, side, tokens, ablate)
        torch.testing.assert_close(got, mean.expand_as(got), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_the_whole_space_is_activation_patching(family):
    """TransformerLens' own sweep over blocks and positions, cell by cell."""
    from transformer_lens.patching import get_act_patch_resid_pre

    model = zoo.cached(family)
    clean, corrupted = zoo.tokens(model, 2, 4), zoo.tokens(model, 2, 4, seed=1)
    weights = torch.randn(model.cfg.d_vocab, generator=torch.Generator().manual_seed(0))

    def metric(logits):
        return (logits[:, -1] @ weights).sum()

    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        cells = get_act_patch_resid_pre(model, corrupted, cache, metric)
        eye = torch.eye(model.cfg.d_model)
        for block in range(1, model.cfg.n_layers):  # what a block reads is what the one before it leaves
            whole = ExplosionSubspace(model, block - 1, eye, eye, torch.ones(len(eye)))
            for pos in range(4):
                for source in (cache, clean) if (block, pos) == (1, 2) else (cache,):
                    patched = whole.patch(source, side="direction", positions=[pos])
                    got = metric(model.run_with_hooks(corrupted, fwd_hooks=patched.fwd_hooks()))
                    assert float(got) == pytest.approx(float(cells[block, pos]), rel=1e-4, abs=1e-4)
    assert float(cells.std()) > 0.1


@pytest.mark.parametrize("family", [name for name in ("llama", "gpt2", "gpt_neox_parallel") if name in zoo.FAMILIES])
def test_patching_all_an_ffn_reads_gives_its_answer_of_the_other_run(family):
    """On the trigger side, of which TransformerLens' sweeps know nothing, the whole space patches the FFN's output."""
    model = zoo.cached(family)
    tokens, source, eye = zoo.tokens(model, 2, 5), zoo.tokens(model, 2, 5, seed=1), torch.eye(zoo.D_MODEL)
    name = f"blocks.{BLOCK}.hook_mlp_out"
    wanted = record(model, source, [name])[name]
    with ExplosionSubspace(model, BLOCK, eye, eye, torch.ones(len(eye))).patch(source).attached():
        assert relative_error(record(model, tokens, [name])[name], wanted) < 1e-5


def test_identities_on_the_shipped_model():
    model = load("tiny")
    tokens = model.to_tokens("The cat sat on the mat.\nIt purred.")
    for rank in (1, 2):
        subspace = ExplosionSubspace.at(model, 2, rank=rank)
        with torch.no_grad():
            plain = model(tokens)
        for side in SIDES:
            assert torch.equal(logits_of(model, tokens, subspace.patch("The cat sat on the mat.\nIt purred.", side=side)), plain)
            assert torch.equal(logits_of(model, tokens, subspace.steer(1.0, side=side)), plain)
            once = logits_of(model, tokens, subspace.ablate(side=side))
            assert relative_error(logits_of(model, tokens, subspace.ablate(side=side) + subspace.ablate(side=side)), once) < 1e-5
    # The largest coefficient there can be is the root of the width.
    assert float(coefficients(subspace, "trigger", tokens).abs().max()) < math.sqrt(model.cfg.d_model)
