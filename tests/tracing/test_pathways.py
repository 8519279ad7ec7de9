import math

import pytest
import torch
import zoo
from culprits import culprit
from dense import ffn_matrix
from recording import same_state, state
from streams import ragged

from sd_lens.models.loading import load, weights_of
from sd_lens.models.planted import planted
from sd_lens.tracing.alone import Alone
from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.pathways import scan_vocabulary

IDS = torch.tensor([90, 3, 41])
PATHWAYS = ("initial", "no_attention", "second")


def cached(model, tokens, blocks=2):
    """The stream around the first blocks in TransformerLens' own cache of one prompt, float64."""
    names = [f"blocks.{b}.hook_{part}" for b in range(blocks) for part in ("resid_pre", "attn_out", "resid_post")]
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.as_tensor(tokens).unsqueeze(0), names_filter=lambda name: name in names)
    return {name: cache[name][0].double() for name in names}


def entering_ffn(weights, cache):
    before = cache[f"blocks.{weights.block}.hook_resid_pre"]
    return before if weights.parallel else before + cache[f"blocks.{weights.block}.hook_attn_out"]


def trigger_by_hand(weights):
    """The leading right singular vector of the dense map, with the sign that the layer answers to, and how sensitive it is."""
    ffn, d = weights.ffn, weights.d_model
    _, s, vh = torch.linalg.svd(ffn_matrix(ffn))
    x = math.sqrt(d) * torch.stack([vh[0], -vh[0]])
    if ffn.norm is not None:
        x = x * ffn.norm.gain + (0 if ffn.norm.bias is None else ffn.norm.bias)
    shared = {"post_norm": None, "output_scale": 1.0}
    ffn = type(ffn)(**(vars(ffn) | shared))
    x = x.float()
    plus, minus = (ffn.output(x) if hasattr(ffn, "experts") else ffn.output(ffn.hidden(x))).norm(dim=-1).tolist()
    return (vh[0] if plus >= minus else -vh[0]), float(s[0] / (s[0] - s[1]))


def coefficient_by_hand(weights, vector, entering):
    norm = weights.ffn.norm
    if norm is None:
        return entering @ vector
    centred = entering - entering.mean(-1, keepdim=True) if norm.kind == "layer" else entering
    return centred @ vector / (centred.square().mean(-1) + norm.eps).sqrt()


def without_attention(weights, embedded):
    """The stream entering the last block's FFN and leaving the block, by recursion through the FFNs."""
    stream = embedded.float()
    for block in weights[:-1]:
        stream = stream + block.ffn(stream)
    return stream.double(), (stream + weights[-1].ffn(stream)).double()


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_norms_and_coefficients_are_those_of_each_id_alone(family):
    model, prompts = zoo.cached(family), ragged(zoo.VOCAB, (9, 6))
    weights = [weights_of(model)[block] for block in (0, 1)]
    vector, sensitivity = trigger_by_hand(weights[1])
    scans = {
        pathway: scan_vocabulary(model, pathway, ids=IDS, block=1, prompts=prompts, control=0, batch_tokens=4)
        for pathway in PATHWAYS
    }
    reference = float(trace_norms(model, prompts).reference[2])

    def agrees(scan, place, entering, after):
        assert float(scan.norms[place]) == pytest.approx(float(after.norm()), rel=1e-5)
        wanted = coefficient_by_hand(weights[1], vector, entering)
        # The less its singular value stands out, the less sure a vector is.
        assert float(scan.coefficients[place]) == pytest.approx(float(wanted), abs=1e-4 * sensitivity)

    learned = family.removeprefix("hooked_") in (
        "gpt2",
        "gpt2_quick_gelu",
        "opt",
    )  # positions, and then not the one that is like no other
    for place, token in enumerate(IDS.tolist()):
        embedded = cached(model, [token, token])["blocks.0.hook_resid_pre"][1 if learned else 0]
        agrees(scans["no_attention"], place, *without_attention(weights, embedded))
        cache = cached(model, [token])
        agrees(scans["initial"], place, entering_ffn(weights[1], cache)[-1], cache["blocks.1.hook_resid_post"][-1])
        cache = cached(model, [int(scans["second"].others[place]), token])
        agrees(scans["second"], place, entering_ffn(weights[1], cache)[-1], cache["blocks.1.hook_resid_post"][-1])
    for pathway, scan in scans.items():
        assert torch.equal(scan.ids, IDS)
        assert (scan.pathway, scan.block, scan.control, scan.tokenizer) == (pathway, 1, None, None)
        assert scan.reference == pytest.approx(reference, rel=1e-6)
        assert bool(scan.trained.all())
    first, second = scans["initial"], scans["second"]
    torch.testing.assert_close(second.initial_norms, first.norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(second.initial_coefficients, first.coefficients, rtol=0, atol=1e-4)
    assert sorted(second.others.tolist()) == sorted(IDS.tolist())
    assert not bool((second.others == IDS).any())


def test_what_explodes_in_the_planted_models(planted_model):
    """A planted head makes every id explode at position 0 and needs attention for it; a planted embedding makes one explode anywhere."""
    model, truth = planted_model.model, planted_model
    everything, one = set(range(97)), {truth.trigger_token}
    wanted = {
        "initial": everything if truth.pathway == "head" else one,
        "no_attention": set() if truth.pathway == "head" else one,
        "second": set() if truth.pathway == "head" else one,
    }
    for pathway, ids in wanted.items():
        scan = scan_vocabulary(model, pathway, control=16)
        assert scan.block == truth.explosion_block
        assert scan.explosion_found == (truth.pathway == "head")  # the trigger token is not in random prompts
        assert bool(scan.notes) != scan.explosion_found
        assert set(scan.self_exploding().id) == ids
        assert scan.share_exploding == pytest.approx(len(ids) / 97)
        if ids:
            row = scan.top(1).iloc[0]
            assert row.norm == pytest.approx(truth.norm, rel=0.01)
            assert row["rank"] == 1
        if pathway == "no_attention":
            # What a token's coefficient is without attention: the trigger's share of its embedding.
            share = torch.full((97,), 1e-3) if truth.pathway == "head" else 0.8 * (scan.ids == 96).float()
            torch.testing.assert_close(scan.coefficients, share * math.sqrt(64), rtol=1e-2, atol=1e-4)
        if pathway == "second":
            alone = scan.initial_norms / scan.reference >= 6
            assert set(scan.ids[alone].tolist()) == wanted["initial"]


def test_the_shipped_model_has_one_such_token():
    model = load("tiny")
    for pathway in PATHWAYS:
        scan = scan_vocabulary(model, pathway, control=512)
        assert (scan.block, scan.explosion_found, scan.notes) == (2, True, ())
        assert scan.self_exploding().token.tolist() == ["<s>"]
        assert scan.self_exploding(20.0).empty
        assert scan.control_share < 0.01
        assert scan.top(3, by="coefficient").token.tolist()[0] == "<s>"
        assert repr(scan).startswith(
            f"VocabularyScan(tiny, {pathway}: 1 of 1024 trained ids reach 6 times the ordinary norm after block 2;"
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox_parallel", "mixtral"])
def test_an_untrained_model_has_none(family):
    model = zoo.cached(family)
    for pathway in PATHWAYS:
        scan = scan_vocabulary(model, pathway, control=64)
        assert scan.self_exploding().empty
        assert (scan.share_exploding, scan.control_share, scan.explosion_found) == (0, 0, False)
        assert repr(scan).endswith("random embeddings 0 %; no explosion in the prompts up to there)")


def test_a_loud_position_0_makes_no_id_explode_by_itself():
    """Without attention too, a learned position 0 can set any id off; that is not the id's doing."""
    truth = culprit("position", "gpt2")
    scans = {pathway: scan_vocabulary(truth.model, pathway, block=truth.block, control=0) for pathway in PATHWAYS}
    assert scans["initial"].share_exploding == 1
    assert len(scans["no_attention"].self_exploding()) == 0
    assert len(scans["second"].self_exploding()) == 0


# --- random embeddings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "pathway", "scale"),
    [
        ("llama", "second", 1.0),
        ("gpt2", "initial", 1.0),
        ("gpt2", "no_attention", 1.0),
        ("opt", "second", 1.0),
        ("gemma2", "initial", math.sqrt(zoo.D_MODEL)),
    ],
)
def test_random_embeddings_run_as_if_they_were_the_vocabularys(family, pathway, scale, monkeypatch):
    model, given = zoo.build(family), {}
    norms = Alone.norms

    def spy(self, sequences, blocks, **options):
        if options.get("embeddings") is not None:
            given.update(sequences=sequences, vectors=options["embeddings"])
        return norms(self, sequences, blocks, **options)

    monkeypatch.setattr(Alone, "norms", spy)
    scan = scan_vocabulary(model, pathway, block=1, control=40, batch_tokens=8, seed=3)
    vectors = given["vectors"]
    joining = scale * model.W_E.detach().norm(dim=-1)
    torch.testing.assert_close(vectors.norm(dim=-1), joining.mean().expand(40), rtol=1e-5, atol=0)
    cosines = vectors @ vectors.T / vectors.norm(dim=-1).square()
    assert cosines.fill_diagonal_(0).abs().max() < 0.9
    assert cosines.mean().abs() < 0.05
    # The same vectors as rows of the embedding matrix.
    for number in range(0, 40, 8):
        others, free = given["sequences"][number, :-1], 5
        free = next(token for token in range(5, 9) if token not in others.tolist())
        with torch.no_grad():
            model.W_E[free] = vectors[number] / scale
        cache = cached(model, [*others.tolist(), free])
        wanted = cache["blocks.1.hook_resid_post"][-1]
        if pathway == "no_attention":
            assert len(others) == 1  # position 0 of a model with learned positions is like no other
            wanted = without_attention([weights_of(model)[0], weights_of(model)[1]], cache["blocks.0.hook_resid_pre"][1])[1]
        assert float(scan.control[number]) == pytest.approx(float(wanted.norm()), rel=1e-5)


def test_how_many_random_embeddings_and_which():
    model, options = zoo.cached("llama"), {"ids": [5, 6], "block": 1}
    first = scan_vocabulary(model, control=30, **options)
    assert first.control.shape == (30,)
    assert len(first.control.unique()) > 25
    assert torch.equal(scan_vocabulary(model, control=30, **options).control, first.control)
    assert not torch.equal(scan_vocabulary(model, control=30, seed=1, **options).control, first.control)
    none = scan_vocabulary(model, control=0, **options)
    assert none.control is None
    assert math.isnan(none.control_share)
    assert "random" not in repr(none)
    ratios = (first.control / first.reference).sort().values
    assert ratios[24] > 1
    scan = scan_vocabulary(model, control=30, min_ratio=float(ratios[23:25].mean()), **options)
    assert scan.control_share == pytest.approx(6 / 30)
    assert repr(scan).endswith("random embeddings 20 %)")


# --- which ids, which block --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pathway", PATHWAYS)
def test_batches_of_any_size_and_subsets_give_the_same(pathway):
    model = zoo.cached("gpt2")
    options = {"ids": torch.arange(60, 80), "block": 1, "prompts": ragged(zoo.VOCAB, (5, 5))}
    whole = scan_vocabulary(model, pathway, control=10, **options)
    for batch_tokens, control in ((1, 0), (7, 10)):
        other = scan_vocabulary(model, pathway, control=control, batch_tokens=batch_tokens, **options)
        torch.testing.assert_close(other.norms, whole.norms, rtol=1e-5, atol=0)
        torch.testing.assert_close(other.coefficients, whole.coefficients, rtol=0, atol=1e-4)
        if control:
            torch.testing.assert_close(other.control, whole.control, rtol=1e-5, atol=0)
    if pathway != "second":
        part = scan_vocabulary(model, pathway, control=10, **(options | {"ids": [65, 79, 60]}))
        torch.testing.assert_close(part.norms, whole.norms[[5, 19, 0]], rtol=1e-5, atol=0)
        torch.testing.assert_close(part.control, whole.control, rtol=1e-5, atol=0)


def test_what_ids_come_after():
    model = zoo.build("llama")
    untrained = [20, 21, 22]
    with torch.no_grad():
        model.W_E[untrained] *= 0.01
    scan = scan_vocabulary(model, "second", block=1, control=0)
    trained = scan.trained
    assert (~trained).nonzero().flatten().tolist() == untrained
    assert sorted(scan.others[trained].tolist()) == scan.ids[trained].tolist()  # each once
    assert not bool((scan.others == scan.ids).any())
    assert not set(scan.others.tolist()) & set(untrained)
    again, different = (scan_vocabulary(model, "second", block=1, control=0, seed=seed) for seed in (0, 1))
    assert torch.equal(again.others, scan.others)
    assert float((different.others == scan.others).float().mean()) < 0.2
    torch.testing.assert_close(different.initial_norms, scan.initial_norms, rtol=1e-5, atol=0)
    alone = scan_vocabulary(model, "initial", block=1, control=0)
    torch.testing.assert_close(scan.initial_norms, alone.norms, rtol=1e-5, atol=0)  # those of untrained ids too
    for ids in ([7], [21], [21, 22], [7, 21]):
        few = scan_vocabulary(model, "second", ids=ids, block=1, control=0)
        assert not set(few.others.tolist()) & {*untrained, *(ids if len(ids) == 1 else [])}
        torch.testing.assert_close(few.initial_norms, alone.norms[ids], rtol=1e-5, atol=0)
        for place, token in enumerate(ids):
            wanted = cached(model, [int(few.others[place]), token])["blocks.1.hook_resid_post"][-1].norm()
            assert float(few.norms[place]) == pytest.approx(float(wanted), rel=1e-5)


def test_the_block_is_the_last_explosion_blocks_of_the_prompts():
    truth = planted("llama", pathway="embedding", explosion_block=2)
    with_trigger = torch.tensor([[1, 2, 96, 4, 5, 6]])
    scan = scan_vocabulary(truth.model, "initial", prompts=with_trigger, control=0)
    assert (scan.block, scan.explosion_found, scan.notes) == (2, True, ())
    elsewhere = scan_vocabulary(truth.model, "initial", prompts=with_trigger, control=0, block=1)
    assert (elsewhere.block, elsewhere.explosion_found) == (1, False)  # within the blocks looked at
    assert elsewhere.self_exploding().empty
    model = load("tiny")
    defects = find_defects(trace_norms(model, "One text, another."))
    assert scan_vocabulary(model, prompts="One text, another.", ids=[1], control=0).block == defects.explosion_blocks[-1]


def test_without_an_explosion_in_the_prompts_the_scan_finds_the_block_itself():
    truth = planted("llama", pathway="embedding", explosion_block=3, decay_block=5, n_blocks=7)
    ran = []
    hooks = [(f"blocks.{b}.hook_attn_out", lambda x, hook, b=b: ran.append((b, tuple(x.shape[:2])))) for b in range(7)]
    with truth.model.hooks(fwd_hooks=hooks):
        scan = scan_vocabulary(truth.model, "no_attention", control=0, batch_tokens=32)
    assert scan.block == 3
    assert scan.notes == ("no explosion in the prompts; block 3 is the first after which an id's ratio is nearly at its largest",)
    assert max(batch * pos for _, (batch, pos) in ran) <= 32
    # An id that is not trained does not decide it, and a scan of such ids alone ends after the last block.
    with torch.no_grad():
        truth.model.W_E[96] *= 0.05
    assert float(scan_vocabulary(truth.model, "no_attention", control=0).norms.max()) < 2
    assert scan_vocabulary(truth.model, "no_attention", ids=[96], control=0).block == 6


def test_it_settles_on_ratios_and_on_the_first_of_blocks_that_hardly_differ():
    model = zoo.cached("gpt2")
    after = [scan_vocabulary(model, block=block, control=0) for block in range(3)]
    ratios = [float(scan.ratios.max()) for scan in after]
    assert 0.9 * ratios[1] < ratios[0] < ratios[1]
    assert after[0].norms.max() < 0.9 * after[2].norms.max()
    assert scan_vocabulary(model, control=0).block == 0


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pathway": "third"}, r"pathway: got 'third'; allowed: 'initial', 'no_attention', 'second'"),
        ({"block": 3}, "block: got 3; allowed: 0 to 2"),
        ({"block": -1}, "block: got -1; allowed: 0 to 2"),
        ({"control": -1}, "control: got -1; allowed: at least 0"),
        ({"batch_tokens": 0}, "batch_tokens: got 0; allowed: at least 1"),
        ({"min_ratio": 1.0}, r"min_ratio: got 1\.0; allowed: above 1"),
        ({"ids": []}, r"ids: got shape \(0,\); allowed: at least one id"),
        ({"ids": torch.zeros(2, 2, dtype=torch.long)}, r"ids: got shape \(2, 2\); allowed: at least one id, in one dimension"),
        ({"ids": [3, 101]}, "ids: got 3 to 101; allowed: 0 to 100"),
        ({"ids": [-1, 5]}, "ids: got -1 to 5; allowed: 0 to 100"),
        ({"ids": [5, 6, 5, 5]}, "ids: got 5 3 times; allowed: each id once"),
        ({"ids": torch.tensor([0.5])}, r"ids: got dtype torch\.float32; allowed: integer token ids"),
        ({"ids": torch.tensor([True])}, r"ids: got dtype torch\.bool; allowed: integer token ids"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(options, message):
    model = zoo.cached("llama")
    never = [("hook_embed", lambda stream, hook: pytest.fail("the model was run"))]
    with model.hooks(fwd_hooks=never), pytest.raises(ValueError, match=f"^{message}"):
        scan_vocabulary(model, **options)


def test_weights_that_are_not_usable_are_refused():
    model = zoo.build("llama")
    with torch.no_grad():
        model.blocks[1].mlp.W_out[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^model: its residual stream is NaN or infinite after block 1"):
        scan_vocabulary(model)
    model = zoo.build("llama")
    with torch.no_grad():
        model.W_E[50] = float("inf")
    with pytest.raises(ValueError, match=r"^model: the embedding of id 50 is NaN or infinite"):
        scan_vocabulary(model, ids=[3])
    with torch.no_grad():
        model.W_E.zero_()
    with pytest.raises(ValueError, match=r"^model: all of its embeddings are zero"):
        scan_vocabulary(model)
    with torch.no_grad():
        model.W_E[7] = 1.0
    with pytest.raises(ValueError, match=r"^model: only one id of its vocabulary was trained; allowed: at least two"):
        scan_vocabulary(model, "second")


@pytest.mark.usefixtures("as_users_run_it")  # the type checks draw random numbers themselves
def test_nothing_is_left_behind():
    for family in ("llama", "gpt2"):
        model = zoo.cached(family)
        torch.manual_seed(5)
        before, random = state(model), torch.get_rng_state()
        tokens = zoo.tokens(model)
        with torch.no_grad():
            logits = model(tokens)
        for pathway in PATHWAYS:
            scan = scan_vocabulary(model, pathway, control=10)
            assert not scan.norms.requires_grad
            assert not scan.coefficients.requires_grad
        assert same_state(before, state(model))
        assert torch.equal(torch.get_rng_state(), random)
        with torch.no_grad():
            assert torch.equal(model(tokens), logits)
