"""Quantised models against Hugging Face models whose weights and inputs are rounded by hand, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
import zoo
from recording import same_state, state
from torch import nn
from transformers.pytorch_utils import Conv1D

from sd_lens.applications.int8 import GRANULARITIES
from sd_lens.applications.perplexity import mean_loss, windows_of
from sd_lens.applications.quantizing import logits_of, quantized
from sd_lens.models.projections import projections

PER_TENSOR = ["llama_bias", "qwen2_moe", "opt"]
PER_TOKEN = ["phi3", "gpt2", "gpt_neox_parallel", "gptj"]  # a row's range is the same in a fused layer
BOTH = [("per_tensor", name) for name in PER_TENSOR] + [("per_token", name) for name in PER_TOKEN]


def in_blocks(model):
    return [one for one in projections(model) if one.block is not None]


def by_hand(x, dims):
    wide = x.double() if x.dtype == torch.float64 else x.float()
    step = wide.abs().amax(dims, keepdim=True) / 127
    return ((wide / step).round() * step).to(x.dtype)


def rounded_by_hand(hf, granularity, spared):
    """A Hugging Face model with every linear layer of its blocks rounded, for one window at a time."""
    for name, module in hf.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name != "lm_head" and name not in spared:
            outputs_last = isinstance(module, Conv1D)
            with torch.no_grad():
                dims = tuple(range(2)) if granularity == "per_tensor" else (0 if outputs_last else 1)
                module.weight.copy_(by_hand(module.weight, dims))
            module.register_forward_pre_hook(
                lambda _, args: (by_hand(args[0], tuple(range(args[0].ndim)) if granularity == "per_tensor" else -1),)
            )
    return hf


@pytest.mark.parametrize(("granularity", "name"), BOTH)
def test_rounding_by_hand(granularity, name):
    # In float64 no number comes so close to the middle between two integers that it goes up here and down there.
    model = zoo.build(name, dtype=torch.float64)
    chosen, tokens = in_blocks(model), zoo.tokens(model, batch=3)
    spared = {chosen[0].name, chosen[-1].name}
    hf = rounded_by_hand(zoo.hf_model(name, dtype=torch.float64), granularity, spared)
    with torch.no_grad():
        wanted = torch.cat([hf(window.unsqueeze(0)).logits for window in tokens])
        plain = model(tokens)
    # Some bridges turn queries and keys, or take the softmax, in float32; a step of eight bits is a thousand times larger.
    exact = {"rtol": 0, "atol": 1e-5 if name in ("phi3", "gpt_neox_parallel") else 1e-9}
    with quantized(model, chosen, granularity, spared=spared) as logits:
        torch.testing.assert_close(logits(tokens), wanted, **exact)
        torch.testing.assert_close(logits(tokens[:1]), wanted[:1], **exact)
    assert float((wanted - plain).abs().max()) > 1e-3
    assert torch.equal(logits_of(model)(tokens), plain)


@pytest.mark.parametrize(("granularity", "name"), [("per_tensor", "qwen2_moe"), ("per_tensor", "opt"), ("per_token", "llama")])
def test_how_many_windows_run_at_once_does_not_matter(granularity, name):
    model = zoo.build(name, dtype=torch.float64)
    windows = windows_of(model, zoo.tokens(model, batch=1, pos=83)[0], window=11)
    with quantized(model, in_blocks(model), granularity) as logits:
        alone, together = (mean_loss(logits, windows, batch_tokens=11 * count) for count in (1, 8))
    assert alone == pytest.approx(together, rel=1e-6)  # losses are computed in float32


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_bfloat16(granularity):
    model = zoo.build("llama", dtype=torch.bfloat16)
    window = zoo.tokens(model, batch=1)
    hf = rounded_by_hand(zoo.hf_model("llama", dtype=torch.bfloat16), granularity, ())
    with quantized(model, in_blocks(model), granularity) as logits, torch.no_grad():
        assert torch.equal(logits(window), hf(window).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_everything_spared_changes_no_bit(name):
    model = zoo.cached(name)
    chosen, tokens = in_blocks(model), zoo.tokens(model)
    with torch.no_grad():
        plain = model(tokens)
    with quantized(model, chosen, "per_tensor", spared=[one.name for one in chosen]) as logits:
        assert torch.equal(logits(tokens), plain)


def raise_within(error, logits, tokens, module):
    def fail(*_):
        raise error

    with module.register_forward_pre_hook(fail):
        logits(tokens)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(("name", "error"), [("gpt2", None), ("qwen2_moe", RuntimeError), ("llama", KeyboardInterrupt)])
def test_everything_is_restored_to_the_bit(name, error):
    model = zoo.build(name)
    hf, tokens = model.original_model, zoo.tokens(model)
    with torch.no_grad():
        plain = model(tokens)  # bridges add hooks of their own in their first pass
    hooks = {key: (len(m._forward_hooks), len(m._forward_pre_hooks)) for key, m in hf.named_modules()}
    held = {key: set(m.__dict__) for key, m in hf.named_modules()}
    before, weights = state(model), {key: value.clone() for key, value in hf.state_dict().items()}
    random = torch.get_rng_state()
    chosen = in_blocks(model)
    if error is None:
        with quantized(model, chosen, "per_tensor") as logits:
            logits(tokens)
    else:
        with pytest.raises(error), quantized(model, chosen, "per_tensor") as logits:
            raise_within(error, logits, tokens, chosen[-1].module)  # while a pass runs
        with pytest.raises(error), quantized(model, chosen, "per_tensor"):
            raise error
    assert same_state(before, state(model))
    assert all(torch.equal(value, weights[key]) for key, value in hf.state_dict().items())
    assert hooks == {key: (len(m._forward_hooks), len(m._forward_pre_hooks)) for key, m in hf.named_modules()}
    assert held == {key: set(m.__dict__) for key, m in hf.named_modules()}
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        assert torch.equal(model(tokens), plain)


def test_weights_are_untouched_while_it_runs_and_gradients_off():
    model = zoo.cached("llama")
    weights = {key: value.clone() for key, value in model.original_model.state_dict().items()}
    with quantized(model, in_blocks(model), "per_token") as logits:
        assert not logits(zoo.tokens(model)).requires_grad
        assert all(torch.equal(value, weights[key]) for key, value in model.original_model.state_dict().items())


def test_the_callers_hooks_stay_and_see_the_quantised_model():
    model = zoo.build("llama")
    chosen, tokens, calls = in_blocks(model), zoo.tokens(model, batch=1), []

    def note(value, hook):
        calls.append(value.detach().clone())

    model.add_hook("blocks.1.hook_mlp_out", note)
    with torch.no_grad():
        model(tokens)
        with quantized(model, chosen, "per_tensor") as logits:
            logits(tokens)
            model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_out", note)])
        model(tokens)
    before, inside, again, own, after = calls
    assert not torch.equal(before, inside)
    assert torch.equal(inside, again)
    assert torch.equal(inside, own)
    assert torch.equal(before, after)


def test_smoothquants_scales_reach_their_projection():
    model = zoo.build("llama", dtype=torch.float64)
    chosen, tokens = in_blocks(model), zoo.tokens(model)
    one = next(one for one in chosen if one.role == "q")
    scales = torch.linspace(0.1, 3, zoo.D_MODEL, dtype=torch.float64)
    hf = zoo.hf_model("llama", dtype=torch.float64)
    layer = hf.get_submodule(one.name)
    with torch.no_grad():
        layer.weight.copy_(by_hand(layer.weight * scales, -1))
    layer.register_forward_pre_hook(lambda _, args: (by_hand(args[0] / scales, -1),))
    with torch.no_grad(), quantized(model, [one], "per_token", scales={one.label: scales}) as logits:
        torch.testing.assert_close(logits(tokens), hf(tokens).logits, rtol=1e-9, atol=1e-9)
