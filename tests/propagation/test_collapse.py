"""Collapse curves against two plain passes per pair, and against a model whose collapse is known."""

from __future__ import annotations

import math

import pytest
import torch
import zoo

from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.models.loading import load
from sd_lens.models.precision import running_in
from sd_lens.propagation.collapse import collapse_curve, default_lengths
from sd_lens.propagation.critical import critical_length
from sd_lens.propagation.probes import probe

SYMBOLS = {"zero": 40, "one": 41, "plus": 42, "separator": 43}
LENGTHS = [1, 2, 5, 12]


def probe_of(model, name="repeat-last", **options):
    return probe(model, name, symbols=SYMBOLS, prepend_bos=False, **options)


def brute_force(model, one, lengths, dtype, layer, edits=()):
    """L∞ of the difference between two separate passes, per sample and length."""
    name = f"blocks.{layer}.hook_resid_post" if isinstance(layer, int) else "unembed.hook_in"
    rows = []
    for sample in range(one.samples):
        rows.append([])
        for length in lengths:
            seen = []
            read = [(name, lambda value, hook: seen.append(value[0, -1].double()))]  # noqa: B023
            for sequence in one.pair(length, sample):
                with torch.no_grad(), running_in(model, dtype):
                    model.run_with_hooks(sequence.unsqueeze(0), fwd_hooks=[*edits, *read])
            rows[-1].append(float((seen[0] - seen[1]).abs().max()))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("family", "shared"), [("llama", None), ("llama", False), ("gpt2", True), ("gemma2", True)])
def test_against_plain_passes(family, shared):
    model = zoo.cached(family)
    one = probe_of(model, "bernoulli", samples=2, separator_every=3)
    curve = collapse_curve(model, one, LENGTHS, layers=[1, "final"], metrics="linf", dtypes=["float32", "bfloat16"], shared=shared)
    assert curve.shared is (shared is not False)
    for layer in (1, "final"):
        exact = brute_force(model, one, LENGTHS, torch.float32, layer)
        torch.testing.assert_close(curve.values["float32", layer, "linf"][..., 0], exact, rtol=0, atol=1e-5)
        # In half precision passes of other shapes round differently.
        torch.testing.assert_close(curve.values["bfloat16", layer, "linf"][..., 0], exact, rtol=0.1, atol=0.1)


def test_every_metric_from_the_same_runs():
    model = zoo.cached("llama")
    one, metrics = probe_of(model), ["l1", "l2", "linf", "l1_heads", "l2_heads", "linf_heads", "kl", "argmax"]
    curve = collapse_curve(model, one, LENGTHS, metrics=metrics, dtypes="float32")
    assert curve.metrics == tuple(metrics)
    value = {metric: values for (_, _, metric), values in curve.values.items()}
    torch.testing.assert_close(value["l1_heads"].sum(-1), value["l1"][..., 0])
    torch.testing.assert_close(value["l2_heads"].square().sum(-1).sqrt(), value["l2"][..., 0])
    torch.testing.assert_close(value["linf_heads"].amax(-1), value["linf"][..., 0])
    assert value["l1_heads"].shape[-1] == zoo.HEADS
    for place, length in enumerate(LENGTHS):
        with torch.no_grad():
            p, q = (model(sequence.unsqueeze(0))[0, -1].double().log_softmax(-1) for sequence in one.pair(length))
        assert value["kl"][0, place, 0].item() == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-5)
        assert value["argmax"][0, place, 0].item() == float(p.argmax() != q.argmax())


def test_equal_to_the_bit_where_nothing_is_seen():
    """Without attention the last token knows nothing but itself: every pair that ends in one token is equal."""
    model = zoo.build("llama")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.o.original_component.weight.zero_()
    curve = collapse_curve(model, probe_of(model), LENGTHS, metrics=["linf", "argmax"], dtypes=["float32", "bfloat16"])
    for dtype in curve.dtypes:
        found = critical_length(curve, dtype)
        assert (found.below_epsilon, found.equal) == (1, 1)
        assert curve.values[dtype, "final", "linf"].abs().max() == 0
    changed = collapse_curve(model, probe_of(model, "copy-last", contrast="changed"), LENGTHS, metrics="linf", dtypes="float32")
    assert critical_length(changed).below_epsilon is None  # the last tokens themselves differ
    # ... and their distance does not depend on how many tokens stand before them.
    values = changed.values["float32", "final", "linf"]
    torch.testing.assert_close(values, values[:, :1].expand_as(values), rtol=0, atol=1e-6)


def test_low_precision_ends_first():
    """Attention that is the same to all tokens: what it adds differs as the share of zeros does, 1/n against 2/(n + 1)."""
    model = zoo.build("llama")
    with torch.no_grad():
        for number, block in enumerate(model.blocks):
            block.attn.q.original_component.weight.zero_()
            block.attn.v.original_component.weight.mul_(0.0 if number else 1e-3)  # one block of attention, small beside the stream
    lengths = [2, 4, 8, 16, 32, 60]
    curve = collapse_curve(model, probe_of(model), lengths, metrics="linf", dtypes=["float32", "bfloat16"])
    half, full = critical_length(curve, "bfloat16"), critical_length(curve, "float32")
    assert half.below_epsilon is not None
    assert half.equal is not None
    assert (full.below_epsilon, full.equal) == (None, None)
    shares = torch.tensor([2 / (n + 1) - 1 / n for n in lengths], dtype=torch.float64)
    ratio = curve.values["float32", "final", "linf"][0, :, 0] / shares
    assert (ratio / ratio[0]).tolist() == pytest.approx([1.0] * len(lengths), rel=0.02)


def test_an_intervention_acts_on_both():
    model = zoo.cached("llama")
    subspace = ExplosionSubspace.at(model, 1)
    edit, one = subspace.ablate(side="both"), probe_of(model)
    curve = collapse_curve(model, one, LENGTHS, metrics="linf", dtypes="float32", intervention=edit)
    wanted = brute_force(model, one, LENGTHS, torch.float32, "final", edit.fwd_hooks())
    torch.testing.assert_close(curve.values["float32", "final", "linf"][..., 0], wanted, rtol=0, atol=1e-5)
    plain = collapse_curve(model, one, LENGTHS, metrics="linf", dtypes="float32")
    assert (plain.values["float32", "final", "linf"] - curve.values["float32", "final", "linf"]).abs().max() > 1e-3
    assert curve.edited == edit.name


def test_interventions_on_windowed_models_are_run_whole():
    model = zoo.cached("gemma2")
    edit, one = ExplosionSubspace.at(model, 1).ablate(positions="initial"), probe_of(model)
    curve = collapse_curve(model, one, LENGTHS, metrics="linf", dtypes="float32", intervention=edit)
    assert not curve.shared
    wanted = brute_force(model, one, LENGTHS, torch.float32, "final", edit.fwd_hooks())
    torch.testing.assert_close(curve.values["float32", "final", "linf"][..., 0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["repeat-last", "count-ones"])
def test_tiny_in_half_precision_loses_the_pair_no_later(name):
    curve = collapse_curve(load("tiny"), name, [1, 16, 128, 256, 384, 500], metrics=["linf", "relative"])
    for metric in curve.metrics:
        for measured in (None, "float32"):
            half = critical_length(curve, "bfloat16", measured=measured, metric=metric).below_epsilon or math.inf
            assert half <= (critical_length(curve, "float32", metric=metric).below_epsilon or math.inf)
    # What float32 keeps apart, by its own epsilon, is within bfloat16's at the end: the relative distance is below 2^-7.
    assert critical_length(curve, "bfloat16", measured="float32", metric="relative").below_epsilon is not None
    assert critical_length(curve, "float32", metric="relative").below_epsilon is None


def test_default_lengths_fill_the_context():
    model = zoo.cached("llama")
    lengths = default_lengths(model, probe_of(model))
    assert lengths[:5] == (2, 3, 4, 5, 6)
    assert probe_of(model).longest([lengths[-1]]) <= zoo.CONTEXT < 1.3 * lengths[-1]


def test_bad_input(as_users_run_it):
    model, other = zoo.cached("llama"), zoo.cached("gpt2")
    one = probe_of(model)
    for arguments, message in [
        ({"lengths": [zoo.CONTEXT]}, r"^lengths: got 64, whose longest sequence has 66 tokens|^lengths: got 64.*context"),
        ({"lengths": [0]}, r"^lengths: got 0"),
        ({"lengths": []}, r"^lengths: got none"),
        ({"layers": 9}, r"^layers: got 9; allowed: 0 to 2, 'final'"),
        ({"layers": ["last"]}, r"^layers: got 'last'"),
        ({"layers": []}, r"^layers: got none"),
        ({"metrics": ["l7"]}, r"^metrics: got 'l7'"),
        ({"dtypes": ["int8"]}, r"^dtypes: got 'int8'"),
        ({"dtypes": torch.float8_e4m3fn}, r"^dtypes: got float8_e4m3fn"),
        ({"intervention": ExplosionSubspace.at(other, 1).ablate()}, r"^intervention: got one of another model"),
        ({"batch_tokens": 0}, r"^batch_tokens: got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            collapse_curve(model, one, **({"lengths": LENGTHS} | arguments))
    with pytest.raises(ValueError, match=r"^probe: got int"):
        collapse_curve(model, 3, LENGTHS)
    with pytest.raises(ValueError, match=r"'count-sheep'"):
        collapse_curve(model, "count-sheep", LENGTHS)
