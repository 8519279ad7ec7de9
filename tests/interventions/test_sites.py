"""What an edit reaches, and what it leaves alone, on every architecture: brute force with the block's weights."""

from __future__ import annotations

import editing
import pytest
import torch
import zoo
from recording import record, relative_error

from sd_lens.interventions.sites import Site, trigger_site
from sd_lens.models.loading import weights_of

BLOCK = 1
NAMES = [f"blocks.{BLOCK}.hook_{name}" for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
SOME = [
    name
    for name in ("llama", "gpt2", "phi", "opt", "olmo2", "gemma2", "qwen2_moe", "hooked_llama", "hooked_gpt2", "hooked_phi")
    if name in zoo.FAMILIES
]
NEXT = f"blocks.{BLOCK + 1}.hook_resid_pre"


@pytest.fixture(params=[name for name in zoo.FAMILIES if name != "hooked_olmo2"])
def model(request):
    return zoo.cached(request.param)


def runs(model, intervention, names=(*NAMES, NEXT)):
    """What a run shows without an intervention, and with it."""
    tokens = zoo.tokens(model, 2, 6)
    before = record(model, tokens, names)
    with intervention.attached():
        return before, record(model, tokens, names)


def test_the_trigger_side_reaches_the_ffn_alone(model):
    subspace, weights = editing.random_subspace(model, BLOCK), weights_of(model)[BLOCK]
    before, after = runs(model, subspace.ablate(side="trigger"))
    pre, attn, mlp, post = (after[name] for name in NAMES)
    assert torch.equal(pre, before[NAMES[0]])
    assert torch.equal(attn, before[NAMES[1]])
    wanted = editing.answer(weights, editing.without(subspace.right, editing.normalised_stream(weights, before)))
    assert relative_error(mlp, wanted) < 2e-6
    assert relative_error(before[NAMES[2]], wanted) > 0.05  # and it was another one without
    torch.testing.assert_close(post, pre + attn + mlp, rtol=1e-5, atol=1e-5)
    assert torch.equal(after[NEXT], post)


def test_the_direction_side_reaches_the_stream_behind_the_block(model):
    subspace = editing.random_subspace(model, BLOCK)
    before, after = runs(model, subspace.ablate(side="direction"))
    for name in NAMES[:3]:
        assert torch.equal(after[name], before[name])
    wanted = editing.without(subspace.left, before[NAMES[3]])
    assert relative_error(after[NAMES[3]], wanted) < 2e-6
    assert torch.equal(after[NEXT], after[NAMES[3]])
    assert relative_error(before[NEXT], wanted) > 0.05


@pytest.mark.parametrize("family", SOME)
def test_both_sides_are_the_one_after_the_other(family):
    model = zoo.cached(family)
    subspace, weights = editing.random_subspace(model, BLOCK), weights_of(model)[BLOCK]
    before, after = runs(model, subspace.ablate(side="both"))
    mlp = editing.answer(weights, editing.without(subspace.right, editing.normalised_stream(weights, before)))
    assert relative_error(after[NAMES[2]], mlp) < 2e-6
    wanted = editing.without(subspace.left, before[NAMES[0]] + before[NAMES[1]] + mlp)
    assert relative_error(after[NEXT], wanted) < 5e-6


@pytest.mark.parametrize("family", SOME)
def test_a_control_moves_what_the_ffn_reads_as_far_and_elsewhere(family):
    model = zoo.cached(family)
    subspace, weights = editing.random_subspace(model, BLOCK), weights_of(model)[BLOCK]
    before, after = runs(model, subspace.ablate().control(seed=4))
    x = editing.normalised_stream(weights, before)
    along = subspace.ablate().control(seed=4).edits[0].site.along
    assert float((along.T @ along - torch.eye(2)).abs().max()) < 1e-6
    assert float((subspace.right.T @ along).abs().max()) < 1e-6
    if weights.ffn.norm is not None and weights.ffn.norm.kind == "layer":
        assert float(along.sum(0).abs().max()) < 1e-5  # a LayerNorm's input has none of the all-ones vector
    moved = -(x @ subspace.right) @ along.T
    torch.testing.assert_close(moved.norm(dim=-1), (x - editing.without(subspace.right, x)).norm(dim=-1), rtol=1e-5, atol=1e-5)
    wanted = editing.answer(weights, x + moved)
    assert relative_error(after[NAMES[2]], wanted) < 2e-6
    assert torch.equal(after[NAMES[1]], before[NAMES[1]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox_parallel"])
def test_the_last_blocks_edit_reaches_the_logits(family):
    model = zoo.cached(family)
    tokens, last = zoo.tokens(model, 2, 6), zoo.BLOCKS - 1
    subspace = editing.random_subspace(model, last)

    def project(stream, hook):
        return editing.without(subspace.left, stream)

    with torch.no_grad():
        wanted = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{last}.hook_resid_post", project)])
        got = model.run_with_hooks(tokens, fwd_hooks=subspace.ablate(side="direction").fwd_hooks())
        assert relative_error(got, wanted) < 1e-5
        assert relative_error(model(tokens), wanted) > 0.01


@pytest.mark.skipif("hooked_olmo2" not in zoo.FAMILIES, reason="HookedTransformer is gone in TransformerLens 4")
def test_a_model_that_must_first_be_told_to_have_a_hook_point(monkeypatch):
    """Where no norm stands before an FFN, a HookedTransformer shows what it reads only on request; the direction side needs no request."""
    model = zoo.build("hooked_olmo2")
    subspace, tokens = editing.random_subspace(model, BLOCK), zoo.tokens(model, 2, 6)
    with monkeypatch.context() as patched:
        patched.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model was run"))
        for make in (
            subspace.ablate,
            lambda: subspace.ablate(mean=tokens),
            lambda: subspace.patch(tokens),
            lambda: subspace.steer(2.0, side="both"),
        ):
            with pytest.raises(
                ValueError, match=r"model: no hook point shows what the FFN of block 1 alone reads; allowed: .*mlp_in"
            ):
                make()
    before, after = runs(model, subspace.ablate(side="direction"))
    assert relative_error(after[NEXT], editing.without(subspace.left, before[NEXT])) < 2e-6
    model.set_use_hook_mlp_in(True)
    weights = weights_of(model)[BLOCK]
    before, after = runs(model, subspace.ablate())
    wanted = editing.answer(weights, editing.without(subspace.right, editing.entering(weights, before)))
    assert relative_error(after[NAMES[2]], wanted) < 2e-6
    assert relative_error(before[NAMES[2]], wanted) > 0.05
    assert torch.equal(after[NAMES[1]], before[NAMES[1]])
    assert torch.equal(after[NAMES[0]], before[NAMES[0]])
    torch.testing.assert_close(after[NEXT], sum(after[name] for name in NAMES[:3]), rtol=1e-5, atol=1e-5)


def test_what_a_gain_of_zero_hides_counts_as_zero():
    """Such entries cannot be told from the hook's values, and the FFN does not see them either."""
    gain = torch.tensor([2.0, 0.0, 1.0, 0.5])
    x, bias = torch.tensor([[3.0, 7.0, -1.0, 2.0]]), torch.tensor([1.0, -5.0, 0.0, 2.0])
    vector = torch.nn.functional.normalize(torch.tensor([[1.0], [0.0], [2.0], [-1.0]]), dim=0)
    site = Site("somewhere", 0, vector, vector, gain, bias)
    shown = x * gain + bias
    coefficients = site.coefficients(shown)
    torch.testing.assert_close(coefficients, x @ vector)
    moved = site.moved(shown, -coefficients)
    torch.testing.assert_close(moved, (x - (x @ vector) @ vector.T) * gain + bias)
    torch.testing.assert_close(site.coefficients(moved), torch.zeros(1, 1), rtol=0, atol=1e-6)


def test_what_a_site_holds_does_not_change_with_the_model():
    """An intervention made before a training step reads and writes by the gain of its day."""
    model = zoo.build("llama")
    subspace = editing.random_subspace(model, BLOCK)
    site = trigger_site(model, weights_of(model)[BLOCK], subspace.right)
    before = site.gain.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    assert torch.equal(site.gain, before)
