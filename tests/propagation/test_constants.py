"""The bound's constants against dense Jacobians: block by block, FFN by FFN, head by head, on many architectures."""

from __future__ import annotations

import pytest
import torch
import zoo
from recording import record, same_state, state
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.gradients import frozen
from sd_lens.models.loading import weights_of
from sd_lens.propagation.constants import combine_heads, head_norms, measure_gains

N = 5
FAMILIES = [
    name
    for name in (
        *("llama", "gpt_neox_parallel", "gemma2", "granite", "mixtral", "opt"),
        *("hooked_llama", "hooked_gpt2"),
    )
    if name in zoo.FAMILIES
]


@pytest.fixture(scope="module", params=FAMILIES)
def measured(request):
    """A model, its tokens and what its hooks show, and the gains that were measured."""
    model = zoo.cached(request.param)
    tokens = zoo.tokens(model, 1, N)
    blocks = range(model.cfg.n_layers)
    names = [
        name(b) for b in blocks for name in (hook_names.resid_pre, hook_names.attn_out, hook_names.pattern, hook_names.resid_post)
    ]
    gains, final = measure_gains(model, tokens[0], heads="weighted", position=3)
    return model, tokens, record(model, tokens, names), gains, final


def jacobian(function, x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(function, x)  # pyright: ignore[reportReturnType]


def norm(jacobian: Tensor) -> float:
    return float(torch.linalg.svdvals(jacobian.double())[0])


def test_ffn_gains_are_norms_of_dense_jacobians(measured):
    model, _, seen, gains, _ = measured
    with frozen(model):
        for weights, gain in list(zip(weights_of(model), gains, strict=True))[:2]:
            block = weights.block
            stream = seen[hook_names.resid_pre(block)][0]
            entering = stream if weights.parallel else stream + seen[hook_names.attn_out(block)][0]
            ffn = weights.ffn
            wanted = [norm(jacobian(lambda x, ffn=ffn: ffn(x.unsqueeze(0))[0], token)) for token in entering]
            torch.testing.assert_close(gain.ffn, torch.tensor(wanted, dtype=torch.float64), rtol=1e-3, atol=0.0)


def test_gains_around_attention_are_norms_of_dense_jacobians(measured):
    """The norm's, without its gain, is one over its scale; the heads' have the gain in them."""
    model, _, seen, gains, final = measured
    with frozen(model):
        for weights, gain in list(zip(weights_of(model), gains, strict=True))[1:2]:
            layer, stream = weights.attention, seen[hook_names.resid_pre(weights.block)][0]
            if layer.norm is not None:
                wanted = [norm(jacobian(layer.norm.normalised, token)) for token in stream]
                torch.testing.assert_close(1 / gain.scale, torch.tensor(wanted, dtype=torch.float64), rtol=1e-4, atol=0.0)
            for head, value in enumerate(head_norms(layer)):
                reading = layer.W_V[head // layer.group_size]
                if layer.norm is not None:
                    reading = layer.norm.gain.unsqueeze(-1) * reading
                    reading = reading - reading.mean(0) if layer.norm.kind == "layer" else reading
                assert float(value) == pytest.approx(norm(reading @ layer.W_O[head]), rel=1e-4)
        last = seen[hook_names.resid_post(model.cfg.n_layers - 1)][0, 3]
        assert final == pytest.approx(norm(jacobian(lambda x: model.ln_final(x.reshape(1, 1, -1))[0, 0], last)), rel=1e-4)


def test_each_block_is_bounded_with_its_pattern_kept(measured):
    """Between every two tokens, by the model's own derivatives: nothing of a block is forgotten."""
    model, tokens, seen, gains, _ = measured
    block = model.cfg.n_layers - 1
    gain = gains[block]
    found = {}

    def enter(stream, hook, found=found):
        found["x"] = stream.detach().requires_grad_()
        return found["x"]

    def leave(stream, hook, found=found):
        found["y"] = stream

    hooks = [
        (hook_names.resid_pre(block), enter),
        (hook_names.pattern(block), lambda _, hook, block=block: seen[hook_names.pattern(block)]),
        (hook_names.resid_post(block), leave),
    ]
    with frozen(model):
        model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)
    rows = [torch.autograd.grad(found["y"].flatten()[i], found["x"], retain_graph=True)[0][0] for i in range(found["y"].numel())]
    dense = torch.stack(rows).reshape(N, -1, *found["x"].shape[1:])
    norms = torch.linalg.matrix_norm(dense.double().transpose(1, 2), ord=2)
    attention = gain.heads * gain.post.unsqueeze(-1) * gain.attention.double() / gain.scale
    bound = (1 + gain.ffn).unsqueeze(-1) * (attention + torch.eye(N, dtype=torch.float64))
    assert bool((norms <= bound * (1 + 1e-5)).all())
    assert float((norms / bound).diagonal().min()) > 0.05  # and it is no wild guess


@pytest.mark.parametrize("heads", ["mean", "max", "weighted"])
def test_one_pattern_for_all_heads_covers_their_sum(heads):
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(3, 5, 5, generator=generator).tril()
    norms = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
    combined, factor = combine_heads(patterns, norms, heads)
    wanted = torch.einsum("hqk,h->qk", patterns.double(), norms)
    assert bool((factor * combined.double() >= wanted * (1 - 1e-6)).all())
    by_hand = {"mean": 6.0 * patterns.mean(0), "max": 3.5 * patterns.amax(0), "weighted": wanted.float()}[heads]
    torch.testing.assert_close(factor * combined, by_hand)


def test_the_model_is_as_before_also_after_an_error():
    model = zoo.build("llama")
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    model.train()
    before = state(model)
    tokens = zoo.tokens(model, 1, 4)[0]
    measure_gains(model, tokens, heads="mean")
    assert same_state(before, state(model))

    def fail(stream, hook):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_gains(model, tokens, heads="mean", edits=[(hook_names.mlp_out(1), fail)])
    assert same_state(before, state(model))
