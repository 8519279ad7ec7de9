"""Interventions in the caller's own workflow: beside other hooks, with caching, stopping early, starting late, and one another."""

from __future__ import annotations

import editing
import pytest
import torch
import zoo
from recording import record, relative_error, same_state, state
from tokenizer import with_tokenizer

from sd_lens.tracing.monitor import NormMonitor
from sd_lens.tracing.norms import trace_norms

BLOCK = 1
POST = f"blocks.{BLOCK}.hook_resid_post"
FAMILIES = [name for name in ("llama", "gpt2", "gpt_neox_parallel", "hooked_llama", "hooked_gpt2") if name in zoo.FAMILIES]


@pytest.fixture(params=FAMILIES)
def model(request):
    return zoo.cached(request.param)


@torch.no_grad()
def run(model, tokens, hooks, **options):
    return model.run_with_hooks(tokens, fwd_hooks=hooks, **options)


def test_the_callers_hooks_come_before_and_after_in_the_order_given(model):
    subspace, tokens = editing.random_subspace(model, BLOCK), zoo.tokens(model, 2, 5)
    ours, seen = subspace.ablate(side="direction").fwd_hooks(), []
    double = (POST, lambda stream, hook: 2 * stream + 1)
    look = (POST, lambda stream, hook: seen.append(stream.clone()))
    clean = record(model, tokens, [POST])[POST]
    run(model, tokens, [double, *ours, look])
    run(model, tokens, [*ours, double, look])
    torch.testing.assert_close(seen[0], editing.without(subspace.left, 2 * clean + 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[1], 2 * editing.without(subspace.left, clean) + 1, rtol=1e-5, atol=1e-5)


def test_contexts_and_permanent_hooks(model):
    """Whatever is around or inside, the same is computed, and only our own hooks go."""
    subspace, tokens, calls = editing.random_subspace(model, BLOCK), zoo.tokens(model, 2, 5), []
    ablate = subspace.ablate(side="both", positions="initial")
    wanted = run(model, tokens, ablate.fwd_hooks())
    model.add_hook(POST, lambda stream, hook: calls.append("permanent"), is_permanent=True)
    try:
        before = state(model)
        with torch.no_grad(), model.hooks(fwd_hooks=[(POST, lambda stream, hook: calls.append("around"))]):
            with ablate.attached() as same:
                assert same is ablate
                with model.hooks(fwd_hooks=[(POST, lambda stream, hook: calls.append("inside"))]):
                    assert torch.equal(model(tokens), wanted)
                assert calls == ["permanent", "around", "inside"]
                assert torch.equal(model(tokens), wanted)
                # The caller's analyses see the edited model ...
                edited = trace_norms(model, list(tokens))
            assert calls[3:] == ["permanent", "around"] * 2
            # ... and afterwards the one that was there.
            plain = trace_norms(model, list(tokens))
        assert same_state(before, state(model))
        assert float((edited.norms[: BLOCK + 1] - plain.norms[: BLOCK + 1]).abs().max()) < 1e-5
        assert float((edited.norms[BLOCK + 1] - plain.norms[BLOCK + 1]).abs().max()) > 1e-3
    finally:
        model.reset_hooks(including_permanent=True)


def test_two_interventions_in_either_order(model):
    tokens = zoo.tokens(model, 2, 5)
    first, second = (editing.random_subspace(model, BLOCK, seed=seed) for seed in (0, 1))
    one, other = first.ablate(side="direction"), second.steer(3.0, side="direction")
    clean = record(model, tokens, [POST])[POST].double()

    def ablated(x):
        return editing.without(first.left, x)

    def steered(x):
        return x + 2.0 * (x @ second.left.double()) @ second.left.double().T

    for pair, wanted in (((one, other), steered(ablated(clean))), ((other, one), ablated(steered(clean)))):
        with (pair[0] + pair[1]).attached():
            together = record(model, tokens, [POST])[POST]
        with pair[0].attached(), pair[1].attached():
            nested = record(model, tokens, [POST])[POST]
        assert torch.equal(together, nested)
        assert relative_error(together, wanted) < 1e-5
    assert relative_error(steered(ablated(clean)), ablated(steered(clean))) > 1e-3
    # On different blocks and sides the order of addition does not matter.
    early, late = first.ablate(), editing.random_subspace(model, BLOCK + 1).ablate(side="both")
    assert torch.equal(run(model, tokens, (early + late).fwd_hooks()), run(model, tokens, (late + early).fwd_hooks()))


def test_a_cache_shows_edited_values(model):
    subspace, tokens = editing.random_subspace(model, BLOCK), zoo.tokens(model, 2, 5)
    ablate = subspace.ablate(side="both")
    with torch.no_grad(), ablate.attached():
        logits, cache = model.run_with_cache(tokens)
    assert torch.equal(logits, run(model, tokens, ablate.fwd_hooks()))
    assert float((cache[POST] @ subspace.left).abs().max()) < 1e-4
    (trigger, direction) = subspace.sites("both")
    assert float(trigger.coefficients(cache[trigger.name]).abs().max()) < 1e-4
    assert float(direction.coefficients(cache[direction.name]).abs().max()) < 1e-4


def test_stopping_before_and_behind_the_block(model):
    subspace, tokens = editing.random_subspace(model, BLOCK, delimiters=(8, 9)), zoo.tokens(model, 2, 5)
    clean = record(model, tokens, [POST, f"blocks.{BLOCK}.hook_resid_pre"])
    for positions in ("all", "initial", "delimiters"):
        ablate = subspace.ablate(side="direction", positions=positions)
        before = run(model, tokens, ablate.fwd_hooks(), stop_at_layer=BLOCK)
        torch.testing.assert_close(before, clean[f"blocks.{BLOCK}.hook_resid_pre"], rtol=0, atol=0)
        with torch.no_grad(), ablate.attached():
            model(tokens, stop_at_layer=BLOCK)  # leaves nothing behind that the next run would take for its own
            whole = record(model, tokens, [POST])[POST]
            behind = model(tokens, stop_at_layer=BLOCK + 1)
            other = model(tokens[:1, :3], stop_at_layer=BLOCK + 1)
        assert torch.equal(behind, whole)
        assert relative_error(other, behind[:1, :3]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_starting_behind_the_embedding(family):
    if zoo.HookedTransformer is not None and zoo.FAMILIES[family].generation == "bridge":
        pytest.skip("the bridge of TransformerLens 3.9 cannot start at a block")
    model = zoo.cached(family)
    subspace, tokens = editing.random_subspace(model, BLOCK, delimiters=(8, 9)), zoo.tokens(model, 2, 5)
    with torch.no_grad():
        stream = model(tokens, stop_at_layer=BLOCK)
        for side in ("trigger", "direction"):
            for positions in ("all", "initial", [1, 3]):
                ablate = subspace.ablate(side=side, positions=positions)
                wanted = run(model, tokens, ablate.fwd_hooks())
                got = run(model, stream, ablate.fwd_hooks(), start_at_layer=BLOCK)
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
                with ablate.attached():
                    torch.testing.assert_close(model(stream, start_at_layer=BLOCK), wanted, rtol=1e-5, atol=1e-5)
        refused = r"positions: got 'delimiters', which are told by their ids, in a run that begins behind"
        by_id = subspace.ablate(positions="delimiters")
        with pytest.raises(ValueError, match=refused), by_id.attached():
            model(stream, start_at_layer=BLOCK)
        with pytest.raises(ValueError, match=refused):
            run(model, stream, by_id.fwd_hooks(), start_at_layer=BLOCK)


@pytest.mark.skipif(zoo.HookedTransformer is not None, reason="TransformerLens 4 only")
def test_without_the_batch_dimension():
    """An option of run_with_hooks that shows hooks the only row of a batch."""
    model = zoo.cached("llama")
    tokens = zoo.tokens(model, 1, 5)
    subspace = editing.random_subspace(model, BLOCK, delimiters=tuple(tokens[0, 2:4].tolist()))
    for positions in ("all", "initial", "delimiters", torch.tensor([[False, True, False, True, False]])):
        hooks = subspace.ablate(side="both", positions=positions).fwd_hooks()
        assert torch.equal(run(model, tokens, hooks, remove_batch_dim=True), run(model, tokens, hooks))


def test_in_compatibility_mode():
    """In which a bridge may call a hook once for each of its point's names."""
    model = zoo.build("llama")
    tokens, subspace = zoo.tokens(model, 2, 5), editing.random_subspace(model, BLOCK)
    steer = subspace.steer(-3.0, side="both", positions="initial")
    wanted = run(model, tokens, steer.fwd_hooks())
    model.enable_compatibility_mode(no_processing=True)
    torch.testing.assert_close(run(model, tokens, steer.fwd_hooks()), wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), steer.attached():
        torch.testing.assert_close(model(tokens), wanted, rtol=1e-5, atol=1e-5)


def test_a_monitor_around_sees_the_runs_and_nothing_else():
    model = with_tokenizer("gpt2")
    tokens, monitor = zoo.tokens(model, 2, 5), NormMonitor(model)
    subspace = editing.random_subspace(model, BLOCK, delimiters=(8,))
    with torch.no_grad(), monitor.attached():
        for positions in ("initial", "delimiters"):
            with subspace.ablate(positions=positions).attached():
                model(tokens)
    result = monitor.result()
    assert torch.bincount(result.prompt).tolist() == [5] * 4
    assert result.norms.shape[0] == zoo.BLOCKS + 1


def test_a_source_with_other_rows_is_refused_in_the_run_and_leaves_nothing(model):
    subspace, tokens = editing.random_subspace(model, BLOCK), zoo.tokens(model, 3, 5)
    patch, before = subspace.patch(tokens[:2]), state(model)
    clean = run(model, tokens, [])
    with pytest.raises(ValueError, match=r"source: got 2 rows; allowed: 3 as in the run, or 1 for all of them"):
        run(model, tokens, patch.fwd_hooks())
    with pytest.raises(ValueError, match="source: got 2 rows"), patch.attached(), torch.no_grad():
        model(tokens)
    assert same_state(before, state(model))
    assert torch.equal(run(model, tokens, []), clean)


def test_interventions_of_two_models_are_not_added():
    models = [zoo.cached("llama"), zoo.cached("gpt2")]
    with pytest.raises(ValueError, match=r"other: got one of another model; allowed: an Intervention of the same model"):
        _ = editing.random_subspace(models[0]).ablate() + editing.random_subspace(models[1]).ablate()


def test_what_is_done_is_said():
    subspace = editing.random_subspace(zoo.cached("llama"), BLOCK)
    ablate = subspace.ablate(positions="initial")
    assert repr(ablate) == "Intervention(ablate the subspace of block 1 (trigger, initial) at blocks.1.mlp.hook_in)"
    assert repr(ablate + subspace.steer(2.0, side="direction", positions=[0, 3])) == (
        "Intervention(ablate the subspace of block 1 (trigger, initial), steer by 2 the subspace of block 1 (direction, positions [0, 3]) "
        "at blocks.1.mlp.hook_in, blocks.1.hook_resid_post)"
    )
    assert ablate.control(seed=1).name == "random control of ablate the subspace of block 1 (trigger, initial)"
