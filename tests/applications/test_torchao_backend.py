"""Fake quantisation beside torchao's int8 kernels."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import zoo
from recording import same_state, state
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from sd_lens.applications import torchao_backend
from sd_lens.applications.calibration import channel_maxima, smoothing_scales
from sd_lens.applications.perplexity import windows_of
from sd_lens.applications.quantization import quantization_study
from sd_lens.applications.texts import default_text
from sd_lens.applications.torchao_backend import torchao_quantized
from sd_lens.models.hugging_face import plain_copy
from sd_lens.models.loading import load
from sd_lens.models.projections import projections

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs sd-lens[quantization]")


@needs_torchao
@pytest.mark.parametrize(("method", "granularity"), [("rtn", "per_tensor"), ("smoothquant", "per_token")])
def test_perplexities_agree(method, granularity):
    model = load("tiny")
    options = {"methods": [method], "granularities": [granularity], "ranges": False, "each_block": False, "recommend": None}
    text = torch.tensor(model.tokenizer(default_text(), add_special_tokens=False)["input_ids"])[:254]
    fake = quantization_study(model, text, **options)
    before = state(model)
    real = quantization_study(model, text, backend="torchao", **options)
    assert same_state(before, state(model))
    assert (real.backend, fake.backend) == ("torchao", "fake")
    assert [row.spared for row in real.rows[1:]] == ["none", "explosion and decay"]
    assert real.full == fake.full
    for ours, theirs in zip(fake.rows, real.rows, strict=True):
        assert ours.names == theirs.names
        # torchao's steps are 1/127.5 of the largest number, those of the fake quantisation 1/127
        assert theirs.perplexity == pytest.approx(ours.perplexity, rel=0.01)
    if granularity == "per_tensor":
        assert real.row("rtn", "per_tensor").perplexity > 1.03 * real.full.perplexity


def by_hand(x, dims):
    """As torchao rounds: the range has 255 steps, and what would be the 128th above zero is cut off."""
    scale = x.abs().amax(dims, keepdim=True) / 127.5
    return (x * (1.0 / scale)).round().clamp(-128, 127) * scale


@needs_torchao
@pytest.mark.parametrize(
    ("name", "granularity", "smooth"),
    [
        ("llama_bias", "per_tensor", False),
        ("qwen2_moe", "per_token", True),
        ("gpt2", "per_token", False),
        ("phi3", "per_tensor", True),
    ],
)
def test_every_layer_computes_with_integers_but_those_spared(name, granularity, smooth, monkeypatch):
    model, exact = zoo.cached(name), dict(zoo.hf_model(name).named_modules())
    chosen = [one for one in projections(model) if one.block is not None]
    windows = windows_of(model, zoo.tokens(model, batch=1, pos=24)[0], window=8)
    scales = smoothing_scales(chosen, channel_maxima(model, chosen, windows)) if smooth else {}
    divisors = {one.name: scales[one.label] for one in chosen if one.label in scales}
    spared, copies, seen = {chosen[-1].name, chosen[0].name}, [], []
    monkeypatch.setattr(torchao_backend, "plain_copy", lambda own: copies.append(plain_copy(own)) or copies[0])
    with torchao_quantized(model, chosen, granularity, spared=spared, scales=scales) as logits:
        for one in exact:
            if isinstance(exact[one], nn.Linear | Conv1D):
                module = copies[0].get_submodule(one)
                module.register_forward_hook(lambda _, args, output, one=one: seen.append((one, args[0], output)))
        logits(windows.ids)
    assert {one for one, *_ in seen} == {one.name for one in chosen} | {"lm_head"}
    assert len(seen) == len({one for one, *_ in seen}) * (len(windows.ids) if granularity == "per_tensor" else 1)
    rounded = 0
    for one, x, got in seen:
        layer = exact[one]
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        if one not in {*spared, "lm_head"}:
            rounded += 1
            s = divisors.get(one, torch.ones(x.shape[-1]))
            x = by_hand(x / s, tuple(range(x.ndim)) if granularity == "per_tensor" else -1)
            weight = by_hand(weight * s, (0, 1) if granularity == "per_tensor" else 1)
        torch.testing.assert_close(got, functional.linear(x, weight, layer.bias), rtol=1e-4, atol=1e-5)
    assert rounded


@pytest.mark.usefixtures("as_users_run_it")
def test_without_torchao(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = zoo.cached("llama")
    with pytest.raises(ValueError, match=r"^backend: got 'torchao', which is not installed; allowed: 'fake', or pip install"):
        quantization_study(model, zoo.tokens(model)[0], window=8, backend="torchao")
    with (
        pytest.raises(ValueError, match=r"^backend: got 'torchao', which is not installed"),
        torchao_quantized(model, [], "per_token"),
    ):
        pass
