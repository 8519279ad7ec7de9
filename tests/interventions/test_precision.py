"""Interventions in every precision, in training mode, and with gradients: against finite differences."""

from __future__ import annotations

import editing
import pytest
import torch
import zoo
from recording import record, relative_error

BLOCK = 1
FAMILIES = [name for name in ("llama", "gpt2", "gpt_neox_parallel", "hooked_llama", "hooked_gpt2") if name in zoo.FAMILIES]
POST = f"blocks.{BLOCK}.hook_resid_post"


@pytest.mark.parametrize("family", ["llama", FAMILIES[-1] if "hooked_gpt2" in FAMILIES else "gpt2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 5e-3), (torch.float64, 1e-6)], ids=str)
def test_every_precision(family, dtype, tolerance):
    exact, model = zoo.cached(family), zoo.build(family, dtype=dtype)
    tokens, source = zoo.tokens(model, 2, 5), zoo.tokens(model, 2, 5, seed=1)
    before = record(model, tokens, [POST])[POST]
    for kind, make in editing.MAKERS.items():
        shown = []
        look = (POST, lambda stream, hook, shown=shown: shown.append(stream))
        with torch.no_grad():
            hooks = make(editing.random_subspace(model, BLOCK), source, side="both").fwd_hooks()
            logits = model.run_with_hooks(tokens, fwd_hooks=[*hooks, look])
            hooks = make(editing.random_subspace(exact, BLOCK), source, side="both").fwd_hooks()
            wanted = exact.run_with_hooks(tokens, fwd_hooks=hooks)
        assert (logits.dtype, shown[-1].dtype) == (dtype, dtype)
        assert relative_error(logits, wanted) < tolerance, kind
        assert relative_error(shown[-1], before) > 0.01
    with torch.no_grad():
        same = editing.random_subspace(model, BLOCK).patch(tokens, side="both")
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=same.fwd_hooks()), model(tokens))


def exact_norms(model):
    """Norms computed in the model's own precision, which those of a bridge in float64 are not unless told."""
    for module in model.modules():
        if hasattr(module, "use_native_layernorm_autograd"):
            module.use_native_layernorm_autograd = False
    return model


def interventions(model):
    """Every kind, on both sides, at some positions and at all."""
    subspace, source = editing.random_subspace(model, BLOCK, delimiters=(8, 9)), zoo.tokens(model, 2, 5, seed=1)
    for kind, make in editing.MAKERS.items():
        yield kind, make(subspace, source, side="both")
    yield "initial", subspace.steer(-2.0, side="both", positions="initial")
    yield "mask", subspace.patch(source, side="both", positions=torch.tensor([[False, True, True, False, True]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_edited_model(family):
    """Along a random direction of the input's stream, and of all parameters at once."""
    model = exact_norms(zoo.build(family, dtype=torch.float64))
    tokens = zoo.tokens(model, 2, 5)
    generator = torch.Generator().manual_seed(0)

    def draw(like):
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    judge, change = draw(torch.empty(2, 5, zoo.VOCAB)), draw(torch.empty(2, 5, zoo.D_MODEL))
    # A bridge may have matrices that it splits and does not use any more.
    model(tokens).sum().backward()
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert len(parameters) > 20
    moves = [draw(parameter) for parameter in parameters]
    # The softmax of Hugging Face's Llama is in float32 whatever the model is: its rounding must be small beside the step.
    step, tolerance = (5e-4, 2e-3) if family == "llama" else (1e-5, 1e-5)
    for kind, intervention in interventions(model):
        hooks = intervention.fwd_hooks()

        def value(added, hooks=hooks):
            entering = ("blocks.0.hook_resid_pre", lambda stream, hook: stream + added)
            return (model.run_with_hooks(tokens, fwd_hooks=[entering, *hooks]) * judge).sum()

        added = torch.zeros_like(change, requires_grad=True)
        gradients = torch.autograd.grad(value(added), [added, *parameters])
        slope, *slopes = (float((g * move).sum()) for g, move in zip(gradients, [change, *moves], strict=True))
        with torch.no_grad():
            ends = [float(value(sign * step * change)) for sign in (1, -1)]
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=tolerance, abs=50 * tolerance), kind
            ends = []
            for sign in (1, -2):  # forth, and back beyond where it was
                for parameter, move in zip(parameters, moves, strict=True):
                    parameter.add_(sign * step * move)
                ends.append(float(value(torch.zeros_like(change))))
            for parameter, move in zip(parameters, moves, strict=True):
                parameter.add_(step * move)
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(sum(slopes), rel=tolerance, abs=50 * tolerance), kind
        assert abs(slope) > 1e-2
        assert abs(sum(slopes)) > 1e-2


@pytest.mark.parametrize("family", [name for name in ("llama", "gpt2", "hooked_llama") if name in zoo.FAMILIES])
def test_in_training_mode_and_backwards(family):
    model = zoo.build(family)
    tokens = zoo.tokens(model, 2, 5)
    wanted = {}
    for kind, intervention in interventions(model):
        with torch.no_grad(), intervention.attached():
            wanted[kind] = model(tokens)
    model.train()
    for kind, intervention in interventions(model):
        with intervention.attached():
            logits = model(tokens)
        torch.testing.assert_close(logits, wanted[kind], rtol=1e-5, atol=1e-5)
        model.zero_grad()
        logits.pow(2).sum().backward()
        assert all(module.training for module in model.modules())
        assert sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0


def test_ablated_directions_get_no_gradient():
    """What is taken out of the stream cannot be felt behind it."""
    model = zoo.build("llama")
    subspace, tokens = editing.random_subspace(model, BLOCK), zoo.tokens(model, 1, 5)
    entered = torch.zeros(1, 5, zoo.D_MODEL, requires_grad=True)
    hooks = [(POST, lambda stream, hook: stream + entered), *subspace.ablate(side="direction").fwd_hooks()]
    model.run_with_hooks(tokens, fwd_hooks=hooks).pow(2).sum().backward()
    assert float((entered.grad @ subspace.left).abs().max()) < 1e-5 * float(entered.grad.abs().max())
    assert float(entered.grad.abs().max()) > 1e-2


def test_a_target_that_asks_for_a_gradient_gets_one():
    model, target = zoo.cached("gpt2"), torch.tensor([1.0, -2.0], requires_grad=True)
    tokens, subspace = zoo.tokens(model, 2, 5), editing.random_subspace(model, BLOCK)

    def value(values):
        return model.run_with_hooks(tokens, fwd_hooks=subspace.steer(target=values, side="direction").fwd_hooks()).pow(2).mean()

    (gradient,) = torch.autograd.grad(value(target), target)
    with torch.no_grad():
        steps = 0.01 * torch.eye(2)
        slopes = [float(value(target + step) - value(target - step)) / 0.02 for step in steps]
    assert gradient.tolist() == pytest.approx(slopes, rel=2e-2)
