"""Ranges and scales against a model's own activations, equation 4 of SmoothQuant, and errors computed directly."""

from __future__ import annotations

import functools
import gc
import math

import pytest
import torch
import zoo
from torch import Tensor
from torch.nn import functional

from sd_lens.applications import calibration
from sd_lens.applications.calibration import channel_maxima, projection_ranges, smoothing_scales
from sd_lens.applications.int8 import divided, multiplied
from sd_lens.applications.perplexity import windows_of
from sd_lens.models.hugging_face import plain_copy
from sd_lens.models.loading import load
from sd_lens.models.projections import projections, replaced

LABEL = "model.layers.{}.{}"


@functools.cache
def tiny():
    """The shipped model, its projections in blocks, and a text in three windows, the last of which is shorter."""
    model = load("tiny")
    text = torch.randint(3, 1000, (80,), generator=torch.Generator().manual_seed(0))
    return model, [one for one in projections(model) if one.block is not None], windows_of(model, text, window=32)


@functools.cache
def maxima():
    return channel_maxima(*tiny(), batch_tokens=64)


def read(names):
    """What hook points show, all windows' tokens one after the other, from TransformerLens' caches of one window each."""
    model, _, windows = tiny()
    rows = [*windows.ids, windows.last]
    with torch.no_grad():
        caches = [model.run_with_cache(row.unsqueeze(0), names_filter=list(names))[1] for row in rows]
    return {name: torch.cat([cache[name][0].flatten(1) for cache in caches]) for name in names}


def test_channel_maxima_are_those_of_the_cache():
    found = maxima()
    assert found.keys() == {one.label for one in tiny()[1]}
    points = {
        "blocks.{}.ln1.hook_out": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "blocks.{}.attn.hook_z": ("self_attn.o_proj",),
        "blocks.{}.ln2.hook_out": ("mlp.gate_proj", "mlp.up_proj"),
        "blocks.{}.mlp.out.hook_in": ("mlp.down_proj",),
    }
    seen = read([point.format(block) for point in points for block in (0, 2)])
    for block in (0, 2):
        for point, names in points.items():
            wanted = seen[point.format(block)].abs().amax(0)
            for name in names:
                torch.testing.assert_close(found[LABEL.format(block, name)], wanted, rtol=1e-5, atol=1e-6)


def test_batches_do_not_matter():
    for label, values in channel_maxima(*tiny(), batch_tokens=1).items():
        torch.testing.assert_close(values, maxima()[label], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_equation_4(alpha):
    model, chosen, _ = tiny()
    scales = smoothing_scales(chosen, maxima(), alpha)
    attention, ffn = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]
    assert scales.keys() == {LABEL.format(b, name) for b in range(model.cfg.n_layers) for name in attention + ffn}
    hf = plain_copy(model)
    for names in (attention, ffn):
        labels = [LABEL.format(3, name) for name in names]
        largest = torch.cat([hf.get_submodule(label).weight.abs() for label in labels]).amax(0)
        wanted = maxima()[labels[0]] ** alpha / largest ** (1 - alpha)
        for label in labels:
            torch.testing.assert_close(scales[label], wanted)


def test_channels_never_used_and_weights_of_zero_keep_their_scale():
    _, chosen, _ = tiny()
    group = [one for one in chosen if one.block == 1 and one.norm == "ln1"]
    silent = {one.label: torch.arange(128) * 1.0 for one in group}
    scales = smoothing_scales(group, silent)[group[0].label]
    assert scales[0] == 1
    assert bool((scales[1:] > 0).all())


def test_norms_behind_sublayers_leave_nothing_to_smooth():
    model = zoo.cached("olmo2")
    windows = windows_of(model, zoo.tokens(model, batch=1, pos=30)[0], window=16)
    chosen = projections(model)
    assert smoothing_scales(chosen, channel_maxima(model, chosen, windows)) == {}


@pytest.mark.parametrize("name", ["tiny", "gpt2", "phi3", "qwen2_moe", "gptj", "falcon_new"])
def test_smoothing_alone_changes_nothing(name):
    if name == "tiny":
        model, chosen, windows = tiny()
    else:
        model = zoo.cached(name)
        chosen = [one for one in projections(model) if one.block is not None]
        windows = windows_of(model, zoo.tokens(model, batch=1, pos=60)[0], window=16)
    scales = smoothing_scales(chosen, channel_maxima(model, chosen, windows), 0.7)
    smoothed = [one for one in chosen if one.label in scales]

    def forward(one):
        return lambda x: functional.linear(divided(x, scales[one.label]), multiplied(one.weight, scales[one.label]), one.bias)

    with torch.no_grad():
        plain = model(windows.ids)
        with replaced(smoothed, [forward(one) for one in smoothed]):
            torch.testing.assert_close(model(windows.ids), plain, rtol=0, atol=1e-4)
    assert max(float((values.log()).abs().max()) for values in scales.values()) > 0.5  # they are not all 1


def test_folded_into_the_gains_of_the_norms():
    model, chosen, windows = tiny()
    scales = smoothing_scales(chosen, maxima())
    hf = plain_copy(model)
    with torch.no_grad():
        plain = hf(windows.ids).logits
        for one in chosen:
            if one.label in scales:
                hf.get_submodule(one.name).weight.mul_(scales[one.label])
        for block, layer in enumerate(hf.model.layers):
            layer.input_layernorm.weight.div_(scales[LABEL.format(block, "self_attn.q_proj")])
            layer.post_attention_layernorm.weight.div_(scales[LABEL.format(block, "mlp.up_proj")])
        torch.testing.assert_close(hf(windows.ids).logits, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, math.nan])
def test_strengths_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"^alpha: got .*; allowed: 0 to 1"):
        smoothing_scales([], {}, alpha)


def step(x, dims):
    return x.abs().amax(dims, keepdim=True) / 127


def decibels(signal, error):
    return 10 * (signal / error).log10()


def test_ranges_and_errors():
    model, chosen, windows = tiny()
    scales = smoothing_scales(chosen, maxima())
    schemes = {"tensor": ("per_tensor", None), "token": ("per_token", None), "smooth": ("per_token", scales)}
    picked = [one for one in chosen if one.block == 2 and one.role in ("q", "out")]
    found = {one.role: one for one in projection_ranges(model, picked, windows, schemes, batch_tokens=64)}
    points = {"q": "blocks.2.ln1.hook_out", "out": "blocks.2.mlp.out.hook_in"}
    seen = read(points.values())
    lengths = [len(row) for row in [*windows.ids, windows.last]]
    for one in picked:
        x, weight, row = seen[points[one.role]].double(), one.weight.double(), found[one.role]
        assert (row.name, row.part, row.block) == (one.name, "", 2)
        largest = x.abs().amax(1)
        assert row.input_max == pytest.approx(float(largest.max()), rel=1e-5)
        assert row.input_typical == pytest.approx(float(largest.log().mean().exp()), rel=1e-5)
        assert row.weight_max == pytest.approx(float(weight.abs().max()), rel=1e-6)
        assert row.weight_typical == pytest.approx(float(weight.abs().amax(1).log().mean().exp()), rel=1e-5)
        exact = x @ weight.T
        smooth = scales[one.label].double() if one.label in scales else torch.ones(x.shape[1])
        in_windows = torch.cat([step(part, (0, 1)).expand(len(part), 1) for part in x.split(lengths)])
        for name, x_, w_, s_x, s_w in (
            ("tensor", x, weight, in_windows, step(weight, (0, 1))),
            ("token", x, weight, step(x, 1), step(weight, 1)),
            ("smooth", x / smooth, weight * smooth, step(x / smooth, 1), step(weight * smooth, 1)),
        ):
            error = ((x_ / s_x).round() * s_x) @ ((w_ / s_w).round() * s_w).T - exact
            signal, noise = exact.square().sum(1), error.square().sum(1)
            assert row.sqnr_db[name] == pytest.approx(float(decibels(signal.sum(), noise.sum())), abs=0.05)
            assert row.token_sqnr_db[name] == pytest.approx(float(decibels(signal, noise).mean()), abs=0.05)


def test_what_is_silent_is_kept_without_error():
    model = zoo.build("opt")
    chosen = [one for one in projections(model) if one.block == 1 and one.role in ("in", "out")]
    with torch.no_grad():
        chosen[0].module.bias.fill_(-1e4)  # no neuron of this ReLU ever answers
    windows = windows_of(model, zoo.tokens(model, batch=1, pos=30)[0], window=16)
    first, silent = projection_ranges(model, chosen, windows, {"rtn": ("per_token", None)})
    assert silent.input_max == 0
    assert silent.sqnr_db["rtn"] == silent.token_sqnr_db["rtn"] == 150
    assert 20 < first.sqnr_db["rtn"] < 60


def alive():
    """Bytes of all tensors that Python holds."""
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.device.type == "cpu"]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("rest", [(), ({"rtn": ("per_tensor", None)},)], ids=["maxima", "ranges"])
def test_memory_does_not_grow_with_the_text(rest, monkeypatch):
    model, chosen, _ = tiny()
    measure = projection_ranges if rest else channel_maxima
    windows = windows_of(model, torch.randint(3, 1000, (12 * 31,), generator=torch.Generator().manual_seed(1)), window=32)
    plain, counts = calibration.logits_of(model), []

    def counting(ids):
        plain(ids)
        counts.append(alive() if len(counts) in (1, 11) else 0)

    monkeypatch.setattr(calibration, "logits_of", lambda _: counting)
    measure(model, chosen[:21], windows, *rest, batch_tokens=32)
    assert len(counts) == 12
    assert counts[11] - counts[1] < 32 * 128 * 4  # less than what one of 21 projections reads in one of 10 windows
