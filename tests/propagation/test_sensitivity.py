"""Sensitivities against finite differences, whole Jacobians by torch, and estimates against their stated errors."""

import math
from types import SimpleNamespace

import pytest
import torch
import zoo
from recording import same_state, state

from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.models.planted import planted
from sd_lens.propagation.hutchinson import estimated_norms, of_samples
from sd_lens.propagation.jacobian_norms import exact_norms
from sd_lens.propagation.jacobians import Graph, chunk_of, recorded
from sd_lens.propagation.marks import SINK_QUERIES, is_sink
from sd_lens.propagation.sensitivity import sensitivity
from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.norms import trace_norms

N = 5
POINTS = {"final": "unembed.hook_in", 1: "blocks.1.hook_resid_post", 2: "blocks.2.hook_resid_post"}
FAMILIES = [name for name in ("llama", "gpt2", "gpt_neox_parallel", "gemma2", "hooked_gemma2") if name in zoo.FAMILIES]


@pytest.fixture(scope="module", params=FAMILIES)
def wide_model(request):
    return zoo.build(request.param, dtype=torch.float64)


def output(model, tokens, source, moved, of, position, hooks=()):
    """The output of one position, with the stream entering a block moved; differentiable where ``moved`` is."""
    seen = {}

    def move(stream, hook):
        return stream + moved

    def see(stream, hook):
        seen["at"] = stream

    last = [(POINTS[of], see)] if of in POINTS else []
    hooks = [*hooks, (f"blocks.{source}.hook_resid_pre", move), *last]
    logits = model.run_with_hooks(tokens.expand(len(moved), -1), fwd_hooks=hooks, return_type="logits")
    return (seen["at"] if last else logits)[:, position]


@torch.no_grad()
def finite_differences(model, tokens, source, of, position, step=0.02):
    """Jacobians (pos, out, d_model) by central differences at two steps, of which the error of fourth order is left.

    Some models compute norms and softmaxes in float32 whatever their type, so the step cannot be small.
    """
    n, d = tokens.shape[1], int(model.cfg.d_model)
    unit = torch.eye(n * d, dtype=torch.float64).view(n * d, n, d)
    at = {h: output(model, tokens, source, h * unit, of, position) for h in (step, -step, 2 * step, -2 * step)}
    slope = {h: (at[h] - at[-h]) / (2 * h) for h in (step, 2 * step)}
    return ((4 * slope[step] - slope[2 * step]) / 3).view(n, d, -1).transpose(1, 2)


def jacobian(model, tokens, source, of, position, hooks=(), vectorize=False):
    """The same by torch, one row at a time unless vectorised."""
    d = int(model.cfg.d_model)
    zero = torch.zeros(1, tokens.shape[1], d, dtype=torch.float64)
    found = torch.autograd.functional.jacobian(
        lambda moved: output(model, tokens, source, moved, of, position, hooks)[0], zero, vectorize=vectorize
    )
    return found[:, 0].transpose(0, 1)


def norms_of(jacobians):
    return jacobians.flatten(1).norm(dim=1), torch.linalg.matrix_norm(jacobians, ord=2)


@pytest.mark.parametrize(("of", "position"), [("final", -1), ("logits", -1), (1, 3)])
def test_equals_finite_differences(wide_model, of, position):
    tokens = zoo.tokens(wide_model, 1, N)
    got = sensitivity(wide_model, tokens, of=of, position=position, sources=(0, 1))
    assert got.position == position % N
    for row, source in enumerate(got.sources):
        frobenius, spectral = norms_of(finite_differences(wide_model, tokens, source, of, position))
        torch.testing.assert_close(got.frobenius[row], frobenius, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(got.spectral[row], spectral, rtol=1e-4, atol=1e-7)
    assert bool((got.frobenius[:, got.position + 1 :] == 0).all())
    assert bool((got.frobenius[:, : got.position + 1] > 0).all())


@pytest.mark.parametrize(("family", "of"), [("llama", "final"), ("llama", "logits"), ("mixtral", 2)])
def test_equals_the_jacobian_by_torch_in_any_chunks_and_memory(family, of):
    model = zoo.build(family, dtype=torch.float64)
    tokens = zoo.tokens(model, 1, N + 1)
    frobenius, spectral = norms_of(jacobian(model, tokens, 1, of, -2))
    d = int(model.cfg.d_model)
    two = 2 * 2 * d * d * 8  # the rows of two positions in half of the memory
    for options, rounds in (({}, 1), ({"chunk": 1}, 1), ({"chunk": 5, "memory": two}, 3), ({"memory": 1, "chunk": 32}, 5)):
        got = sensitivity(model, tokens, of=of, position=-2, sources=(1,), **options)
        torch.testing.assert_close(got.frobenius[0], frobenius, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(got.spectral[0], spectral, rtol=1e-6, atol=1e-12)
        assert got.n_products == d * rounds
    assert bool((got.standard_error == 0).all())


def test_either_norm_alone():
    model, tokens = zoo.cached("gpt2"), zoo.tokens(zoo.cached("gpt2"), 1, N)
    both, one, other = (
        sensitivity(model, tokens, norms=norms) for norms in (("frobenius", "spectral"), ["frobenius"], ("spectral",))
    )
    assert torch.equal(one.frobenius, both.frobenius)
    assert torch.equal(other.spectral, both.spectral)
    assert bool(one.spectral.isnan().all())
    assert bool(other.frobenius.isnan().all())
    assert bool(other.standard_error.isnan().all())
    assert bool((both.spectral < both.frobenius).all())
    assert "most to" in repr(other)


SILENT = SimpleNamespace(reset=lambda total: None, update=lambda n: None)


@pytest.mark.parametrize("of", ["final", "logits"])
def test_estimates_are_as_good_as_they_say(of):
    """Over 150 seeds, two sources and all positions; sources and positions of one seed share their probes."""
    model = zoo.cached("gpt2")
    with recorded(model, zoo.tokens(model, 1, 8)[0], sources=(0, 1), of=of) as graph:
        n = len(graph.output if graph.logits is None else graph.logits)
        rows = graph.products(torch.eye(n))

        class Known(Graph):
            """Its Jacobian is at hand, so that products are cheap."""

            def products(self, cotangents):
                return tuple(torch.einsum("ro,ops->rps", cotangents, source) for source in rows)

        known = Known(graph.inputs, graph.output, graph.logits)
        one, other = (estimated_norms(g, n_probes=4, seed=0, chunk=4, bar=SILENT) for g in (graph, known))
        torch.testing.assert_close(one.frobenius, other.frobenius, rtol=1e-5, atol=0)
        exact = exact_norms(graph, frobenius=True, spectral=False, chunk=64, memory=1, bar=SILENT).frobenius
    sizes = {}
    for n_probes, least in ((32, 0.98), (128, 0.99)):
        runs = [estimated_norms(known, n_probes=n_probes, seed=seed, chunk=128, bar=SILENT) for seed in range(150)]
        score = torch.stack([(run.frobenius - exact) / run.standard_error for run in runs])
        assert float((score.abs() <= 3).double().mean()) >= least
        assert 0.9 < float(score.square().mean().sqrt()) < 1.2  # stated neither too small nor too large
        sizes[n_probes] = torch.stack([run.standard_error for run in runs]).mean(0)
    assert 1.9 < float((sizes[32] / sizes[128]).mean()) < 2.1  # √(128 / 32)


def test_standard_error_is_that_of_the_root_of_a_mean():
    squares = 9 + torch.randn(200_000, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = of_samples(squares)
    assert float(got.frobenius) == pytest.approx(3, abs=0.01)
    assert float(got.standard_error) == pytest.approx(1 / math.sqrt(200_000) / 6, rel=0.01)
    assert float(of_samples(torch.zeros(4, 1, 1, dtype=torch.float64)).standard_error) == 0


def test_same_seed_same_estimate_whatever_the_chunk():
    model, tokens = zoo.cached("gpt2"), zoo.tokens(zoo.cached("gpt2"), 1, N)
    one, other, third = (
        sensitivity(model, tokens, method="hutchinson", n_probes=9, seed=seed, chunk=chunk)
        for seed, chunk in ((3, None), (3, 2), (4, 2))
    )
    torch.testing.assert_close(one.frobenius, other.frobenius, rtol=1e-5, atol=0)
    assert not torch.allclose(one.frobenius, third.frobenius, rtol=1e-3, atol=0)


def test_an_intervention_is_active_and_gradients_go_through_it():
    truth = planted(n_kv_heads=2)
    model = truth.model.to(torch.float64)
    tokens = torch.arange(3, 9).unsqueeze(0)
    ablate = ExplosionSubspace.at(model, truth.explosion_block).ablate(side="both")
    got = sensitivity(model, tokens, intervention=ablate, sources=(0,))
    frobenius, spectral = norms_of(jacobian(model, tokens, 0, "final", -1, ablate.fwd_hooks(), vectorize=True))
    torch.testing.assert_close(got.frobenius[0], frobenius, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.spectral[0], spectral, rtol=1e-6, atol=0)
    untouched = sensitivity(model, tokens)
    assert not torch.allclose(got.frobenius, untouched.frobenius, rtol=1e-2)
    assert got.intervention == ablate.name
    assert ablate.name in repr(got)
    assert torch.equal(got.high_norm, untouched.high_norm)
    with ablate.attached():
        attached = sensitivity(model, tokens, defects=find_defects(trace_norms(model, tokens)))
    torch.testing.assert_close(attached.frobenius, got.frobenius, rtol=1e-9, atol=0)
    assert not bool(attached.high_norm.any())


def test_a_high_norm_token_is_felt_little_per_unit_and_much_per_share_of_its_length():
    truth = planted()
    tokens = torch.arange(12).unsqueeze(0)
    got = sensitivity(truth.model, tokens, sources=(truth.explosion_block + 1,))
    assert got.high_norm.tolist() == [True] + 11 * [False]
    stream = {}
    truth.model.run_with_hooks(
        tokens, fwd_hooks=[(f"blocks.{truth.explosion_block + 1}.hook_resid_pre", lambda x, hook: stream.update(x=x.detach()))]
    )
    torch.testing.assert_close(got.stream_norm[0], stream["x"][0].double().norm(dim=-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(got.relative, got.frobenius * got.stream_norm)
    assert float(got.frobenius[0, 0]) < 0.03 * float(got.frobenius[0].median())
    assert float(got.relative[0, 0]) > float(got.relative[0].median())


def test_marks():
    model, tokens = planted().model, torch.arange(12).unsqueeze(0)
    found = find_defects(trace_norms(model, tokens))
    assert torch.equal(sensitivity(model, tokens, defects=found).high_norm, found.mask()[0])
    # By the rule's own words: ten tokens, so that position 0 and 1 have enough queries after them.
    even = torch.tensor([sum(1 / (query + 1) for query in range(key + 1, 10)) / max(1, 9 - key) for key in range(10)])
    assert not bool(is_sink(even).any())
    assert is_sink(2.01 * even).tolist() == [True] * (10 - SINK_QUERIES) + [False] * SINK_QUERIES
    assert not bool(is_sink(1.99 * even).any())
    long = torch.full((300,), 0.099)
    assert not bool(is_sink(long).any())
    long[7] = 0.101
    assert is_sink(long).nonzero().flatten().tolist() == [7]


def test_sinks_are_those_of_the_patterns():
    from sd_lens.models.loading import load

    model = load("tiny")
    tokens = model.to_tokens("Once upon a time there was a small boat. It went out to sea.")
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
    patterns = torch.cat([value[0] for value in cache.values()]).double()
    n = tokens.shape[1]
    received = torch.tensor([float(patterns[:, key + 1 :, key].mean()) if key < n - 1 else 0.0 for key in range(n)])
    got = sensitivity(model, tokens, norms=("frobenius",), method="hutchinson", n_probes=2)
    assert torch.equal(got.sinks, is_sink(received))
    assert got.sinks.nonzero().flatten().tolist() == [0]
    assert got.notes == ()


def test_without_patterns_no_sink_is_marked_and_that_is_said():
    hf = zoo.hf_model("opt")
    hf.set_attn_implementation("sdpa")
    model, tokens = zoo._bridged(hf), zoo.tokens(zoo.cached("opt"), 1, 12)
    got = sensitivity(model, tokens)
    assert got.notes == ("attention sinks are not marked: the model's attention does not show its pattern",)
    assert not bool(got.sinks.any())
    # Products go back through fused attention as well.
    torch.testing.assert_close(got.frobenius, sensitivity(zoo.cached("opt"), tokens).frobenius, rtol=1e-4, atol=0)


def test_dataframe_and_share():
    model, tokens = zoo.cached("gpt2"), zoo.tokens(zoo.cached("gpt2"), 1, N)
    got = sensitivity(model, tokens, sources=(2, 0), position=3, of="logits")
    torch.testing.assert_close(got.share.sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(got.share[0, 1], got.frobenius[0, 1] ** 2 / (got.frobenius[0] ** 2).sum())
    frame = got.to_dataframe()
    assert frame.source.tolist() == 4 * [2] + 4 * [0]
    assert frame.pos.tolist() == 2 * [0, 1, 2, 3]
    row = frame[(frame.source == 0) & (frame.pos == 2)].iloc[0]
    assert row.frobenius == float(got.frobenius[1, 2])
    assert row.relative == float(got.frobenius[1, 2] * got.stream_norm[1, 2])
    assert row.token == got.texts[2]
    assert row.id == int(tokens[0, 2])
    assert repr(got).startswith(f"Sensitivity({got.model_name}: logits at position 3 to the input of block 2, 0, most to ")


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", ["exact", "hutchinson"])
@pytest.mark.usefixtures("as_users_run_it")
def test_leaves_no_trace(method, error, monkeypatch):
    model = planted(n_kv_heads=2).model.train()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    tokens, calls = torch.arange(5).unsqueeze(0), []
    model.add_hook("blocks.1.hook_resid_post", lambda stream, hook: calls.append(1), is_permanent=True)
    before, randomness = state(model), torch.get_rng_state()
    hidden = [module.training for module in model.original_model.modules()]
    if error is not None:  # while products are taken
        monkeypatch.setattr("sd_lens.propagation.jacobians.batched_vjp", interrupt(error))
    with torch.no_grad() if error is None else pytest.raises(error, match="halfway"):
        sensitivity(model, tokens, method=method, sources=(0, 2))
    assert len(calls) >= 2  # marks, and the run itself
    assert same_state(before, state(model))
    assert [module.training for module in model.original_model.modules()] == hidden
    assert torch.equal(torch.get_rng_state(), randomness)
    assert torch.is_grad_enabled()


def interrupt(error):
    def stop(*_):
        raise error("halfway")

    return stop


def test_hooks_of_the_callers_count():
    model, tokens = zoo.cached("llama"), zoo.tokens(zoo.cached("llama"), 1, N)
    plain = sensitivity(model, tokens, of=2)
    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", lambda stream, hook: 3 * stream)]):
        torch.testing.assert_close(sensitivity(model, tokens, of=2).frobenius, 3 * plain.frobenius, rtol=1e-4, atol=0)
    cut = [("blocks.2.hook_resid_post", lambda stream, hook: stream.detach())]
    with model.hooks(fwd_hooks=cut), pytest.raises(ValueError, match="detach"):
        sensitivity(model, tokens)
    with torch.inference_mode():
        assert torch.equal(sensitivity(model, tokens, of=2).frobenius, plain.frobenius)


def test_half_precision():
    model = zoo.build("llama", dtype=torch.bfloat16)
    tokens = zoo.tokens(model, 1, N)
    got = sensitivity(model, tokens, of="logits")
    torch.testing.assert_close(got.frobenius, sensitivity(zoo.cached("llama"), tokens, of="logits").frobenius, rtol=0.1, atol=0)


def test_one_token():
    model = zoo.build("gpt2", dtype=torch.float64)
    tokens = zoo.tokens(model, 1, 1)
    got = sensitivity(model, tokens)
    frobenius, _ = norms_of(jacobian(model, tokens, 0, "final", -1))
    torch.testing.assert_close(got.frobenius[0], frobenius, rtol=1e-9, atol=0)
    assert got.high_norm.tolist() == got.sinks.tolist() == [False]


def test_chunks_shrink_with_memory_and_on_a_cpu_with_length():
    model = zoo.cached("llama")
    elsewhere, half = (torch.empty(1, device="meta", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    sizes = [chunk_of(model, 100, 1, elsewhere, memory) for memory in (2**30, 2**29, 1)]
    assert sizes[0] == pytest.approx(2 * sizes[1], abs=1)
    assert sizes[2] == 1
    assert chunk_of(model, 100, 1, half, 2**29) == pytest.approx(sizes[0], abs=1)
    assert [chunk_of(model, n, 1, torch.empty(1), 2**30) for n in (10, 100, 1000)] == [51, 5, 1]


BAD = {
    "of: got 'embed'": {"of": "embed"},
    "of: got 3; allowed: 0 to 2, 'final', 'logits'": {"of": 3},
    "of: got None": {"of": None},
    "sources: got none; allowed: some of 0 to 2": {"sources": ()},
    "sources: got 0; allowed": {"sources": 0},
    "sources: got 3; allowed: 0 to 2": {"sources": (0, 3)},
    "sources: got 2 with of=1": {"of": 1, "sources": (0, 2)},
    "position: got 5; allowed: -5 to 4": {"position": 5},
    "position: got -6": {"position": -6},
    "position: got 1.0": {"position": 1.0},
    "method: got 'lanczos'; allowed: 'exact', 'hutchinson'": {"method": "lanczos"},
    "norms: got 'l1'": {"norms": "l1"},
    r"norms: got \(\)": {"norms": ()},
    r"norms: got \('spectral',\); allowed: some of 'frobenius'": {"norms": ("spectral",), "method": "hutchinson"},
    "n_probes: got 1": {"n_probes": 1, "method": "hutchinson"},
    "seed: got -1": {"seed": -1},
    "chunk: got 0": {"chunk": 0},
    "memory: got 0": {"memory": 0},
    "intervention: got str; allowed: an Intervention of this model": {"intervention": "ablate"},
}


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    model = zoo.cached("llama")
    with pytest.raises(ValueError, match=message):
        sensitivity(model, zoo.tokens(model, 1, N), **BAD[message])


@pytest.mark.usefixtures("as_users_run_it")
def test_bad_prompts():
    model = zoo.cached("llama")
    with pytest.raises(ValueError, match="prompt: got 2; allowed: one"):
        sensitivity(model, zoo.tokens(model, 2, N))
    with pytest.raises(ValueError, match="prompts: prompt 0 is empty"):
        sensitivity(model, torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="model: got Linear"):
        sensitivity(torch.nn.Linear(2, 2), zoo.tokens(model, 1, N))
    other = planted()
    with pytest.raises(ValueError, match="intervention: got one of another model"):
        sensitivity(model, zoo.tokens(model, 1, N), intervention=ExplosionSubspace.at(other.model, 1).ablate())
    defects = find_defects(trace_norms(model, zoo.tokens(model, 2, N)))
    with pytest.raises(ValueError, match="defects: got those of 2 prompts; allowed: find_defects of a trace of this prompt"):
        sensitivity(model, zoo.tokens(model, 1, N), defects=defects)
    defects = find_defects(trace_norms(model, zoo.tokens(model, 1, N, seed=5)))
    with pytest.raises(ValueError, match="defects: got those of another prompt"):
        sensitivity(model, zoo.tokens(model, 1, N), defects=defects)
