"""Sweeps against TransformerLens' own activation patching, against planted explosions, and against one run at a time."""

import math
from functools import partial

import editing
import pytest
import torch
import zoo
from culprits import TRIGGER_TOKEN, cached
from recording import record, same_state, state
from streams import ragged
from transformer_lens import patching
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.utilities import lm_cross_entropy_loss

from sd_lens.interventions.patches import read_in_stream
from sd_lens.interventions.patching import patch_sweep
from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.interventions.sweep import PatchSweep
from sd_lens.models.ffn_input import ffn_input
from sd_lens.models.loading import load, weights_of
from sd_lens.models.planted import planted


def there(*names):
    """Those of some families that the installed TransformerLens can build."""
    return [name for name in names if name in zoo.FAMILIES]


IN_STREAM = there("gptj", "hooked_gpt2")
IN_FFN = there("gpt2", "mixtral", "hooked_gpt_neox_parallel")
PER_HEAD = there("qwen3", "hooked_phi")
ONE_OF_EACH = there("llama", "hooked_gpt2")


def pair(model, batch=2, pos=6, changed=2):
    """Clean and corrupted prompts, which differ from one position on (and at the last)."""
    clean = zoo.tokens(model, batch, pos)
    corrupted = clean.clone()
    corrupted[:, [changed, -1]] = zoo.tokens(model, batch, 2, seed=1)
    return clean, corrupted


def everything(model):
    """All of the width as a subspace: patching it is patching the activation."""
    d = model.cfg.d_model
    return ExplosionSubspace(model, 0, right=torch.eye(d), left=torch.eye(d), sigma=torch.ones(d))


def some(model, block=1, rank=2, seed=0):
    """A random subspace."""
    generator = torch.Generator().manual_seed(seed)
    right, left = (torch.linalg.qr(torch.randn(model.cfg.d_model, rank, generator=generator)).Q for _ in range(2))
    return ExplosionSubspace(model, block, right=right, left=left, sigma=torch.ones(rank))


def one_logit(logits):
    return logits[:, -1, 7].mean()


def full_width(model, clean, corrupted, **options):
    return patch_sweep(model, clean, corrupted, subspace=everything(model), metric=one_logit, controls=0, **options)


def close(got, wanted, tolerance=2e-5):
    got, wanted = got.double(), torch.as_tensor(wanted).double()
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) < tolerance * max(1.0, float(wanted.abs().max()))


# --- TransformerLens' own patching is the ground truth ----------------------------------------------------------------


@pytest.mark.parametrize("name", IN_STREAM)
def test_all_of_the_stream_is_activation_patching(name):
    model = zoo.cached(name)
    clean, corrupted = pair(model)
    _, cache = model.run_with_cache(clean)
    with torch.no_grad():
        wanted = patching.generic_activation_patch(
            model, corrupted, cache, one_logit, patching.layer_pos_patch_setter, "resid_post", index_axis_names=["layer", "pos"]
        )
        pre = patching.get_act_patch_resid_pre(model, corrupted, cache, one_logit)
    sweep = full_width(model, clean, corrupted, side="direction")
    close(sweep.values, wanted)
    close(sweep.values[:-1], pre[1:])
    assert float(sweep.effect.abs().max()) > 0.05
    assert bool((sweep.effect[:, :2] == 0).all())  # before anything differs


@pytest.mark.parametrize("name", IN_FFN)
def test_all_that_the_ffn_reads_is_activation_patching(name):
    model = zoo.cached(name)
    clean, corrupted = pair(model)
    _, cache = model.run_with_cache(clean)
    shorthand = {"hook_in": "in{}m", "hook_normalized": "normalized{}ln2"}
    wanted = torch.zeros(model.cfg.n_layers, 6)
    for block in range(model.cfg.n_layers):
        point = ffn_input(model, weights_of(model)[block]).name

        def set_one(activation, index, source):
            activation = activation.clone()
            activation[:, index[1]] = source[:, index[1]]
            return activation

        cells = patching.make_df_from_ranges([1, 6], ["layer", "pos"])
        with torch.no_grad():
            wanted[block] = patching.generic_activation_patch(
                model, corrupted, cache, one_logit, set_one, shorthand[point.split(".")[-1]].format(block), index_df=cells
            )
    sweep = full_width(model, clean, corrupted)
    close(sweep.values, wanted)
    assert float(sweep.effect.abs().max()) > 0.01


@pytest.mark.parametrize("name", PER_HEAD)
def test_all_that_a_head_adds_is_activation_patching(name):
    model = zoo.cached(name)
    clean, corrupted = pair(model)
    _, cache = model.run_with_cache(clean)
    with torch.no_grad():
        wanted = patching.get_act_patch_attn_head_out_all_pos(model, corrupted, cache, one_logit)
    sweep = full_width(model, clean, corrupted, side="direction", heads=True)
    assert (sweep.over, sweep.indices) == ("head", tuple(range(model.cfg.n_heads)))
    close(sweep.values, wanted)
    assert float(sweep.effect.abs().max()) > 0.01


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("by", ["hand", "TransformerLens"])
def test_a_subspace_is_interchanged(name, by):
    model = zoo.cached(name)
    clean, corrupted = pair(model)
    subspace = some(model)
    if by == "TransformerLens":
        analysis = pytest.importorskip("transformer_lens.tools.analysis.interchange", reason="TransformerLens 4 only")
        interchange = analysis.SubspaceInterchange(subspace.left)
    else:

        def interchange(base, source):
            return base + (source - base) @ subspace.left @ subspace.left.T

    points = [f"blocks.{block}.hook_resid_post" for block in range(model.cfg.n_layers)]
    source = record(model, clean, points)
    wanted = torch.zeros(len(points), clean.shape[1])
    for block, point in enumerate(points):
        for pos in range(clean.shape[1]):

            def edit(stream, hook, pos=pos, point=point):
                stream = stream.clone()
                stream[:, pos] = interchange(stream[:, pos], source[point][:, pos])
                return stream

            with torch.no_grad():
                wanted[block, pos] = one_logit(model.run_with_hooks(corrupted, fwd_hooks=[(point, edit)]))
    sweep = patch_sweep(model, clean, corrupted, subspace=subspace, side="direction", metric=one_logit, controls=0)
    close(sweep.values, wanted)
    assert float(sweep.effect.abs().max()) > 0.01


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_controls_are_as_long_and_beside_the_subspace(name):
    model = zoo.cached(name)
    clean, corrupted = pair(model)
    subspace, seen, n = some(model), [], len(clean)
    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", lambda stream, hook: seen.append(stream.detach().clone()))]):
        sweep = patch_sweep(
            model, clean, corrupted, subspace=subspace, side="direction", metric=one_logit, blocks=[1], positions=[3, 2], controls=4
        )
    source, base, patched = seen
    moved = (patched - base.repeat(len(patched) // n, 1, 1)).view(1 + 4, 2, n, *base.shape[1:])  # variant, cell, prompt
    for cell, pos in enumerate((3, 2)):
        wanted = (source[:, pos] - base[:, pos]) @ subspace.left @ subspace.left.T
        torch.testing.assert_close(moved[0, cell, :, pos], wanted, rtol=1e-4, atol=1e-5)
        length = wanted.norm(dim=-1)
        torch.testing.assert_close(moved[1:, cell, :, pos].norm(dim=-1), length.expand(4, n), rtol=1e-4, atol=1e-5)
        assert float((moved[1:, cell, :, pos] @ subspace.left).abs().max()) < 1e-5
        others = [p for p in range(base.shape[1]) if p != pos]
        assert float(moved[:, cell, :, others].abs().max()) == 0
        effects = []
        for by in moved[1:, cell]:
            with torch.no_grad():
                hooks = [("blocks.1.hook_resid_post", lambda stream, hook, by=by: stream + by)]
                effects.append(float(one_logit(model.run_with_hooks(corrupted, fwd_hooks=hooks))))
        effects = torch.tensor(effects, dtype=torch.float64)
        assert len(set(effects.tolist())) == 4
        assert float(sweep.control_mean[0, cell]) == pytest.approx(float(effects.mean()), abs=1e-5)
        assert float(sweep.control_std[0, cell]) == pytest.approx(float(effects.std()), rel=1e-2)


def test_controls_are_as_long_as_those_of_transformer_lens():
    analysis = pytest.importorskip("transformer_lens.tools.analysis.interchange", reason="TransformerLens 4 only")
    model = zoo.cached("llama")
    clean, corrupted = pair(model, batch=1)
    subspace, seen = some(model), []
    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", lambda stream, hook: seen.append(stream.clone()))]):
        patch_sweep(model, clean, corrupted, subspace=subspace, side="direction", blocks=[1], positions=[3], controls=3)
    source, base, patched = (stream[:, 3] for stream in seen)
    placebo = analysis.NormMatchedPlacebo(analysis.SubspaceInterchange(subspace.left), analysis.random_basis(zoo.D_MODEL, 2, 0))
    length = (placebo(base, source) - base).norm(dim=-1)
    torch.testing.assert_close((patched[1:] - base).norm(dim=-1), length.expand(3), rtol=1e-4, atol=1e-5)


# --- one prompt, one cell, one metric at a time -----------------------------------------------------------------------


METRICS = ("loss", "kl", "logit_diff", "peak_norm", "sink_rate")


def brute_force(model, clean, corrupted, hooks, answers):
    """All metrics of one corrupted prompt, unpadded, under hooks."""
    names = [f"blocks.{block}.hook_resid_post" for block in range(model.cfg.n_layers)]
    patterns = [f"blocks.{block}.attn.hook_pattern" for block in range(model.cfg.n_layers)]
    seen = {}
    keep = [(name, lambda value, hook, name=name: seen.update({name: value.double()})) for name in names + patterns]
    with torch.no_grad():
        reference = model(clean[None])[0].double().log_softmax(-1)
        logits = model.run_with_hooks(corrupted[None], fwd_hooks=[*hooks, *keep])[0].double()
    predicted = logits.log_softmax(-1)
    alpha = torch.cat([seen[name][0] for name in patterns])[:, :, 0].mean(1)  # mean over all queries
    return {
        "loss": -predicted[:-1].gather(1, clean[1:, None]).mean(),
        "kl": (reference.exp() * (reference - predicted)).sum(-1).mean(),
        "logit_diff": logits[-1, answers[0]] - logits[-1, answers[1]],
        "peak_norm": torch.stack([seen[name] for name in names]).norm(dim=-1).max(),
        "sink_rate": (alpha > 0.3).double().mean(),
    }


def mean_over_prompts(model, clean, corrupted, patches, answers):
    """All metrics of some prompts, each by itself."""
    parts = [brute_force(model, *given) for given in zip(clean, corrupted, patches, answers.tolist(), strict=True)]
    return {metric: float(sum(part[metric] for part in parts)) / len(parts) for metric in METRICS}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_metrics_of_prompts_of_different_lengths(name):
    model = zoo.cached(name)
    clean = ragged(zoo.VOCAB, [5, 8])
    corrupted = [prompt.clone() for prompt in clean]
    corrupted[0][0], corrupted[1][0] = 50, 60
    answers, blocks, positions = torch.tensor([[11, 12], [70, 3]]), [0, 2], [0, 6]
    options = {"blocks": blocks, "positions": positions, "controls": 0, "batch_tokens": 20}
    sweeps = {
        metric: patch_sweep(model, clean, corrupted, metric=metric, answers=answers if metric == "logit_diff" else None, **options)
        for metric in METRICS
    }
    for row, subspace in enumerate(ExplosionSubspace.at(model, block) for block in blocks):
        for column, pos in enumerate(positions):
            patches = [subspace.patch([one], positions=[pos]).fwd_hooks() for one in clean]
            wanted = mean_over_prompts(model, clean, corrupted, patches, answers)
            got = {metric: float(sweep.values[row, column]) for metric, sweep in sweeps.items()}
            assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    for of, given in (("clean", clean), ("corrupted", corrupted)):
        wanted = mean_over_prompts(model, clean, given, [[], []], answers)
        assert {metric: getattr(sweep, of) for metric, sweep in sweeps.items()} == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert 0.5 < sweeps["sink_rate"].corrupted <= 1  # short prompts leave little choice
    assert all(float(sweep.effect.abs().max()) > 1e-5 for metric, sweep in sweeps.items() if metric != "sink_rate")


def test_transformer_lens_metrics():
    model = zoo.cached("llama")
    clean, corrupted = pair(model)
    by_name = patch_sweep(model, clean, corrupted, metric="loss", controls=0)
    theirs = patch_sweep(model, clean, corrupted, metric=partial(lm_cross_entropy_loss, tokens=clean), controls=0)
    close(theirs.values, by_name.values)
    assert theirs.corrupted == pytest.approx(by_name.corrupted, rel=1e-5)
    assert theirs.metric == "lm_cross_entropy_loss"
    shapes = []
    patch_sweep(
        model, clean, corrupted, metric=lambda logits: shapes.append(logits.shape) or 0.0, blocks=[0], controls=1, batch_tokens=7
    )
    assert set(shapes) == {(2, 6, zoo.VOCAB)}
    assert len(shapes) == 2 + 2 * 4  # clean, corrupted; four positions from where they differ, and a control of each


def test_how_rows_are_batched_does_not_matter():
    model = zoo.cached("gpt2")
    clean, corrupted = ragged(zoo.VOCAB, [4, 3, 4]), ragged(zoo.VOCAB, [4, 3, 4], seed=1)
    for options in ({}, {"side": "direction", "heads": True}):
        options |= {"subspace": some(model), "metric": "loss", "blocks": [1], "positions": [1, 3], "controls": 1}
        wanted = patch_sweep(model, clean, corrupted, **options)
        for batch_tokens in (1, 21):
            got = patch_sweep(model, clean, corrupted, batch_tokens=batch_tokens, **options)
            close(got.values, wanted.values, 1e-5)
            close(got.control_mean, wanted.control_mean, 1e-5)
    options = {"subspace": some(model), "metric": "kl", "controls": 2}
    whole = patch_sweep(model, clean, corrupted, seed=5, **options)
    part = patch_sweep(model, clean, corrupted, seed=5, blocks=[2, 0], positions=[3, 1], **options)
    close(part.values, whole.values[[2, 0]][:, [3, 1]], 1e-5)
    close(part.control_mean, whole.control_mean[[2, 0]][:, [3, 1]], 1e-5)
    other = patch_sweep(model, clean, corrupted, seed=6, blocks=[0], **options)
    assert not torch.allclose(other.control_mean[0], whole.control_mean[0], rtol=1e-3)


# --- heads: by hand where TransformerLens has no word for it ----------------------------------------------------------


@pytest.mark.parametrize(("name", "side"), [("gemma2", "direction"), ("gpt2", "trigger"), ("llama", "trigger")])
def test_what_a_head_adds_along_a_subspace(name, side):
    model = zoo.cached(name)
    clean, corrupted = pair(model)
    subspace, block, positions = some(model, rank=1), 1, [0, 3, 4]
    attention = weights_of(model)[block].attention
    vector = subspace.left[:, 0] if side == "direction" else subspace.right[:, 0]
    if name == "gpt2":  # its LayerNorm subtracts the mean
        vector = vector - vector.mean()
        vector = vector / vector.norm()

    def added(tokens):
        """What each head adds along the vector: (batch, pos, head)."""
        z = record(model, tokens, [f"blocks.{block}.attn.hook_z"])[f"blocks.{block}.attn.hook_z"]
        each = torch.einsum("bphe,hed->bphd", z, attention.W_O)
        if attention.post_norm is not None:
            total = each.sum(2, keepdim=True)
            each = each * attention.post_norm.gain / (total.pow(2).mean(-1, keepdim=True) + attention.post_norm.eps).sqrt()
        return each @ vector

    by = (added(clean) - added(corrupted))[:, positions]
    sweep = patch_sweep(
        model,
        clean,
        corrupted,
        subspace=subspace,
        side=side,
        heads=True,
        metric=one_logit,
        blocks=[block],
        positions=positions,
        controls=0,
    )
    for head in range(model.cfg.n_heads):

        def edit(out, hook, head=head):
            out = out.clone()
            out[:, positions] += by[:, :, head, None] * vector
            return out

        with torch.no_grad():
            wanted = one_logit(model.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{block}.hook_attn_out", edit)]))
        assert float(sweep.values[0, head]) == pytest.approx(float(wanted), abs=1e-5)
    assert float(sweep.effect.abs().max()) > 1e-3


def test_right_vectors_as_directions_of_the_stream():
    centring, plain = (weights_of(zoo.cached(name))[1] for name in ("gpt2", "llama"))
    d = zoo.D_MODEL
    ones = torch.full((d, 1), d**-0.5)
    assert torch.equal(read_in_stream(plain, ones), ones)
    everything = read_in_stream(centring, torch.eye(d))
    assert everything.shape == (d, d - 1)
    torch.testing.assert_close(everything @ everything.T, torch.eye(d) - ones @ ones.T, atol=1e-5, rtol=0)
    right = some(zoo.cached("gpt2"), rank=3).right
    span, centred = read_in_stream(centring, right), right - right.mean(0)
    torch.testing.assert_close(span.T @ span, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(span @ span.T @ centred, centred, atol=1e-5, rtol=0)
    already = torch.linalg.qr(centred).Q
    torch.testing.assert_close(read_in_stream(centring, already), already, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="subspace: got right vectors that the norm's centring removes"):
        read_in_stream(centring, ones)


# --- planted explosions -----------------------------------------------------------------------------------------------


def planted_pair(trigger, length=8, at=3):
    """Two pairs of prompts: clean ones with the trigger token at a position, corrupted ones without."""
    clean = torch.stack([torch.arange(5, 5 + length), torch.arange(30, 30 + length)])
    corrupted = clean.clone()
    clean[:, at] = trigger
    return clean, corrupted


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_the_planted_block_and_position(architecture):
    truth = planted(architecture, pathway="embedding", n_kv_heads=2 if architecture == "llama" else None)
    clean, corrupted = planted_pair(truth.trigger_token, length=6)
    subspace = ExplosionSubspace.at(truth.model, truth.explosion_block)
    found = patch_sweep(truth.model, clean, corrupted, subspace=subspace, controls=2)
    place = (truth.explosion_block, 3)
    assert found.clean - found.corrupted == pytest.approx(truth.norm, rel=0.02)
    assert float(found.recovered[place]) == pytest.approx(1.0, abs=0.02)
    elsewhere = found.recovered.clone()
    elsewhere[place] = 0
    assert float(elsewhere.abs().max()) < 1e-3
    assert float((found.control_effect / (found.clean - found.corrupted)).abs().max()) < 0.01
    top = found.top(1).iloc[0]
    assert (top.block, top.position, top.token, top.clean_token) == (*place, None, f"<{truth.trigger_token}>")
    # Along each block's own vectors, the block that ends it answers as well: it takes away a norm that is not there.
    own = patch_sweep(truth.model, clean, corrupted, controls=0)
    large = {(block, pos) for block, pos in (own.recovered > 0.05).nonzero().tolist()}
    assert large == {place, (truth.decay_block, 3)}
    # On the other side, the component is the norm itself from the explosion to the block before its end.
    written = patch_sweep(truth.model, clean, corrupted, side="direction", controls=0)
    held = range(truth.explosion_block, truth.decay_block)
    assert written.subspace_block == truth.explosion_block
    assert {(block, 3) for block in held} == {(block, pos) for block, pos in (written.recovered > 0.9).nonzero().tolist()}


@pytest.mark.parametrize(("kind", "architecture"), [("head_trigger", a) for a in ("llama", "gpt_neox")] + [("attention", "gpt2")])
def test_the_planted_head(kind, architecture):
    truth = cached(kind, architecture)
    clean, corrupted = planted_pair(TRIGGER_TOKEN)
    if kind == "attention":  # the norm is a head's, so no FFN has its direction
        column = truth.direction.unsqueeze(1)
        subspace, side = ExplosionSubspace(truth.model, 1, right=column, left=column, sigma=torch.ones(1)), "direction"
    else:
        subspace, side = None, "trigger"
    found = patch_sweep(truth.model, clean, corrupted, subspace=subspace, side=side, heads=True, controls=2)
    shares = truth.norm_parts if kind == "attention" else truth.trigger_parts
    ((_, block, head),) = shares
    assert (found.top(1).iloc[0].block, found.top(1).iloc[0]["head"]) == (block, head)
    assert float(found.recovered[block, head]) == pytest.approx(1.0, abs=0.05)
    others = found.recovered.clone()
    others[block, head] = 0
    assert float(others.abs().max()) < 0.01
    if kind == "head_trigger":
        assert float((found.control_effect / (found.clean - found.corrupted)).abs().max()) < 0.05
        assert found.subspace_block == truth.block
        subspace = ExplosionSubspace.at(truth.model, truth.block)
    at = patch_sweep(truth.model, clean, corrupted, subspace=subspace, side=side, heads=True, controls=0, positions=[3])
    close(at.recovered[block, head], found.recovered[block, head], 0.01)
    none = patch_sweep(truth.model, clean, corrupted, subspace=subspace, side=side, heads=True, controls=0, positions=[0, 5])
    assert float(none.recovered.abs().max()) < 0.01


def test_the_first_token_of_the_shipped_model():
    model = load("tiny")
    clean = model.to_tokens("The cat sat.")
    corrupted = clean.clone()
    corrupted[:, 0] = 5
    found = patch_sweep(model, clean, corrupted, controls=3)
    assert (found.top(1).iloc[0].block, found.top(1).iloc[0].position) == (2, 0)
    assert found.recovered[:3, 0].tolist() == pytest.approx([0.0322, 0.3179, 0.7333], abs=1e-3)
    rest = found.recovered.clone()
    rest[:3, 0] = 0
    assert float(rest.abs().max()) < 0.05
    assert abs(float(found.control_effect[2, 0])) < 0.02 * float(found.effect[2, 0])
    # The metric itself says when it is no evidence: along the stream, any displacement of that length has that norm.
    stream = patch_sweep(model, clean, corrupted, side="direction", blocks=[2, 3], positions=[0], controls=3)
    assert bool((stream.recovered > 0.95).all())
    assert bool((stream.control_effect / stream.effect > 0.9).all())


# --- the same on every generation -------------------------------------------------------------------------------------


@pytest.mark.skipif(zoo.HookedTransformer is None, reason="HookedTransformer is gone in TransformerLens 4")
@pytest.mark.parametrize("family", ["llama", "gpt_neox_parallel"])
def test_the_same_weights_in_both_generations(family):
    pair_of_models = zoo.cached(family), editing.twin(family)
    clean, corrupted = pair(pair_of_models[0])
    for options in ({}, {"side": "direction"}, {"heads": True}, {"heads": True, "side": "direction"}):
        first, second = (
            patch_sweep(model, clean, corrupted, subspace=some(model), metric="loss", controls=2, **options)
            for model in pair_of_models
        )
        close(second.values, first.values)
        close(second.control_mean, first.control_mean)
        assert float(first.effect.abs().max()) > 1e-3


def test_half_precision():
    whole, half = zoo.cached("llama"), zoo.build("llama", dtype=torch.bfloat16)
    clean, corrupted = pair(whole)
    for options in ({}, {"heads": True, "side": "direction"}):
        wanted, got = (
            patch_sweep(model, clean, corrupted, subspace=some(model), metric="loss", controls=0, **options)
            for model in (whole, half)
        )
        close(got.values, wanted.values, 0.02)


# --- manners ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_run_it")  # the type checks of the test run draw random numbers
@pytest.mark.parametrize("fails_at", [None, 0, 4])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_model_is_left_alone(name, fails_at):
    model = zoo.build(name)
    model.train()
    clean, corrupted = pair(model)
    counted, calls = [], []
    model.add_hook("blocks.1.hook_resid_post", lambda stream, hook: counted.append(1))
    before, random = state(model), torch.get_rng_state()

    def metric(logits):
        calls.append(1)
        if len(calls) - 1 == fails_at:
            raise RuntimeError("by the caller's metric")
        return logits.mean()

    def sweep():
        return patch_sweep(model, clean, corrupted, metric=metric, controls=1, batch_tokens=20)

    if fails_at is None:
        assert isinstance(sweep(), PatchSweep)
    else:
        with pytest.raises(RuntimeError, match="by the caller's metric"):
            sweep()
    assert same_state(before, state(model))
    assert torch.equal(random, torch.get_rng_state())
    model(clean)
    assert counted


def test_prompts_that_are_the_same_change_nothing():
    model = zoo.cached("llama")
    clean, _ = pair(model)
    sweep = patch_sweep(model, clean, clean.clone(), subspace=some(model), metric="loss", controls=2)
    assert sweep.clean == sweep.corrupted
    assert bool((sweep.effect == 0).all())
    assert bool(sweep.recovered.isnan().all())
    heads = patch_sweep(model, clean, clean.clone(), subspace=some(model), metric="loss", heads=True, controls=1)
    assert float(heads.effect.abs().max()) < 1e-6  # heads are patched wherever prompts differ or not


BAD = {
    "side": ({"side": "both"}, "side: got 'both'"),
    "metric": ({"metric": "accuracy"}, "metric: got 'accuracy'; allowed: 'loss', 'logit_diff', 'kl', 'peak_norm', 'sink_rate'"),
    "no answers": ({"metric": "logit_diff"}, "answers: got none"),
    "answers in vain": ({"answers": (1, 2)}, "answers: got some with metric='peak_norm'"),
    "answers unknown": ({"metric": "logit_diff", "answers": (1, 101)}, "answers: got ids 1 to 101; allowed: .* 0 to 100"),
    "answers of one": ({"metric": "logit_diff", "answers": torch.tensor([[1, 2]])}, r"answers: got .*\(1, 2\); allowed"),
    "answers as text": ({"metric": "logit_diff", "answers": ("yes", "no")}, "answers: got"),
    "blocks": ({"blocks": [0, 3]}, "blocks: got 3; allowed: some of 0 to 2|blocks: got 3; allowed: 0 to 2"),
    "no blocks": ({"blocks": []}, r"blocks: got \[\]; allowed: at least one"),
    "blocks twice": ({"blocks": [1, 1]}, "blocks: got .* each once"),
    "positions": ({"positions": [0, 6]}, "positions: got 6; allowed: 0 to 5"),
    "negative positions": ({"positions": [-1]}, "positions: got -1"),
    "rank 0": ({"rank": 0}, "rank: got 0"),
    "rank too high": ({"rank": 33, "controls": 0}, "rank: got 33; allowed: 1 to 32"),
    "no room": ({"rank": 16}, "controls: got 5 with rank 16; allowed: 0, or a rank of at most 15"),
    "controls": ({"controls": -1}, "controls: got -1"),
    "seed": ({"seed": 0.5}, "seed: got 0.5"),
    "batch_tokens": ({"batch_tokens": 0}, "batch_tokens: got 0"),
    "subspace": ({"subspace": "block 2"}, "subspace: got str"),
}


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(case, monkeypatch):
    model = zoo.cached("llama")
    clean, corrupted = pair(model)
    monkeypatch.setattr(model, "run_with_hooks", lambda *given, **options: pytest.fail("the model was run"))
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        patch_sweep(model, clean, corrupted, **options)


@pytest.mark.usefixtures("as_users_run_it")
def test_prompts_that_do_not_pair_up_are_refused():
    model = zoo.cached("llama")
    clean = ragged(zoo.VOCAB, [4, 6, 5])
    with pytest.raises(ValueError, match="corrupted: got 2 prompts; allowed: 3"):
        patch_sweep(model, clean, clean[:2])
    with pytest.raises(ValueError, match="corrupted: got 3 tokens in prompt 1; allowed: 6"):
        patch_sweep(model, clean, [clean[0], clean[1][:3], clean[2][:2]])
    with pytest.raises(ValueError, match="clean: got prompts of one token with metric='loss'"):
        patch_sweep(model, [clean[0][:1]], [clean[1][:1]], metric="loss")
    with pytest.raises(ValueError, match="subspace: got one of another model"):
        patch_sweep(model, clean, clean, subspace=some(zoo.cached("gpt2")))
    with pytest.raises(ValueError, match="rank: got 3 with a subspace of rank 2"):
        patch_sweep(model, clean, clean, subspace=some(model), rank=3)
    with pytest.raises(ValueError, match="subspace: got none, and no block explodes"):
        patch_sweep(model, clean, clean, side="direction")
    for useless, got in ((lambda logits: logits[0], "a tensor of shape"), (lambda logits: None, "NoneType")):
        with pytest.raises(ValueError, match=f"metric: got a function that returns {got}"):
            patch_sweep(model, clean, clean, metric=useless)


def test_a_model_whose_attention_hides_its_pattern():
    hf = zoo.hf_model("opt")
    hf.set_attn_implementation("sdpa")
    model = build_bridge_from_module(hf, architecture=type(hf).__name__, hf_config=hf.config).eval()
    clean, corrupted = pair(model)
    with pytest.raises(
        ValueError, match=r"^model: its attention never shows blocks\.0\.attn\.hook_pattern.*allowed: a model whose"
    ):
        patch_sweep(model, clean, corrupted, metric="sink_rate", subspace=some(model))
    hidden, shown = (
        patch_sweep(one, clean, corrupted, metric="kl", subspace=some(one), blocks=[1], controls=0)
        for one in (model, zoo.cached("opt"))
    )
    close(hidden.values, shown.values)


# --- the result -------------------------------------------------------------------------------------------------------


def made(**changes):
    facts = {
        "model_name": "made",
        "metric": "loss",
        "side": "trigger",
        "over": "position",
        "blocks": (1, 3),
        "indices": (0, 2, 4),
        "tokens": (" a", None, "x"),
        "clean_tokens": ("<s>", "b", "x"),
        "clean": 2.0,
        "corrupted": 6.0,
        "values": torch.tensor([[6.0, 5.0, 6.5], [2.0, 6.0, 6.0]], dtype=torch.float64),
        "control_mean": torch.tensor([[6.0, 6.5, 6.0], [5.0, 6.0, 6.0]], dtype=torch.float64),
        "control_std": torch.tensor([[0.0, 0.5, 0.25], [1.0, 0.1, 0.1]], dtype=torch.float64),
        "n_controls": 3,
        "n_prompts": 2,
        "rank": 1,
        "subspace_block": None,
    }
    return PatchSweep(**(facts | changes))


def test_the_table():
    sweep = made()
    table = sweep.to_dataframe()
    wanted = ["block", "position", "token", "clean_token", "value", "effect", "recovered", "control", "control_std", "z"]
    assert list(table.columns) == wanted
    assert table.block.tolist() == [1, 1, 1, 3, 3, 3]
    assert table.position.tolist() == [0, 2, 4, 0, 2, 4]
    assert table.effect.tolist() == [0, -1, 0.5, -4, 0, 0]
    assert table.recovered.tolist() == [0, 0.25, -0.125, 1, 0, 0]
    assert table.z.tolist()[1:] == [-3, 2, -3, 0, 0]
    assert math.isnan(table.z[0])
    assert table.token.tolist()[:3] == [" a", None, "x"]
    top = sweep.top(2)
    assert top[["block", "position"]].values.tolist() == [[3, 0], [1, 2]]
    text = "PatchSweep(made, loss, trigger side: 2 blocks × 3 positions, largest effect -4 at block 3, position 0 ' a', 100% of the way to the clean run)"
    assert repr(sweep) == text
    heads = made(over="head", tokens=(None,) * 3, clean_tokens=(None,) * 3, clean=6.0)
    assert list(heads.to_dataframe().columns[:3]) == ["block", "head", "value"]
    assert repr(heads).endswith("largest effect -4 at block 3, head 0)")
    with pytest.raises(ValueError, match="k: got 0"):
        sweep.top(0)
