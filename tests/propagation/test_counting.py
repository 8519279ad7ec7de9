"""Ratios and counts: a random transformer against torch's own layers, and what theory says of it."""

import math

import pytest
import torch
from torch import nn

from sd_lens.propagation.count_collapse import CountingCollapse, counting_collapse
from sd_lens.propagation.counting import counting_gap, ratio_blindness
from sd_lens.propagation.positions import POSITIONS, sinusoids
from sd_lens.propagation.random_transformer import RandomTransformer


def torch_layers(model):
    """The same model of torch's own encoder layers."""
    layers = []
    for block in model._blocks:
        layer = nn.TransformerEncoderLayer(
            model.d_model, model.n_heads, 4 * model.d_model, 0.0, "gelu", norm_first=True, bias=False, dtype=torch.float64
        )
        layer.self_attn.in_proj_weight.data = block.qkv.T
        layer.self_attn.out_proj.weight.data = block.out.T
        layer.linear1.weight.data, layer.linear2.weight.data = block.up.T, block.down.T
        layers.append(layer)
    return layers


@pytest.mark.parametrize("positions", ["nope", "sinusoidal"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_model_is_what_torch_makes_of_its_weights(positions, causal):
    model = RandomTransformer(positions=positions, causal=causal, dtype=torch.float64, seed=3)
    digits = "1101230"
    stream = model._embedding[[int(digit) for digit in digits]]
    if positions == "sinusoidal":
        stream = stream + sinusoids(torch.arange(7), model.d_model)
    stream = stream[:, None]
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64) if causal else None
    with torch.no_grad():
        for layer in torch_layers(model):
            stream = layer(stream, src_mask=mask)
        reference = nn.functional.layer_norm(stream[:, 0], (model.d_model,))
    assert torch.allclose(model(digits), reference, atol=1e-10)


@pytest.mark.parametrize("positions", POSITIONS)
def test_tokens_may_follow_on_the_keys_and_values_of_earlier_ones(positions):
    model = RandomTransformer(positions=positions, dtype=torch.float64)
    whole = model("1110210")
    first, past = model.run("1110")
    second, _ = model.run("210", past)
    assert torch.allclose(torch.cat([first, second]), whole, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_without_mask_and_positions_only_the_ratio_is_left(seed):
    gap = counting_gap("10", "1100", seed=seed)
    assert max(gap.last, gap.mean) < 1e-6
    gap = counting_gap("1100", "010101010", seed=seed)  # another ratio
    assert min(gap.last, gap.mean) > 1e-3
    gap = counting_gap("1100", "0110", seed=seed, dtype=torch.float64)  # another order
    assert max(gap.last, gap.mean) < 1e-12
    for causal in (False, True):
        for positions in POSITIONS:
            if causal or positions != "nope":
                gap = counting_gap("10", "1100", causal=causal, positions=positions, seed=seed)
                assert min(gap.last, gap.mean) > 1e-2


def test_the_table_of_ratios():
    found = ratio_blindness([(1, 1), (2, 1)], times=[2, 4], seeds=1)
    assert found.blind() == ("NoPE, no mask",)
    table = found.to_dataframe()
    assert len(table) == 4 * 2 * 2 * 2
    unseen = table[(table["positions"] == "nope") & ~table["causal"]]
    assert unseen[["last", "mean"]].to_numpy().max() < 1e-12
    row = table[(table["positions"] == "rope") & table["causal"] & (table["ones"] == 2) & (table["times"] == 2)].iloc[0]
    direct = counting_gap("110", "111100", positions="rope", causal=True, dtype=torch.float64)
    assert row["last"] == direct.last
    assert row["mean"] == direct.mean
    assert repr(found) == "RatioBlindness(8 settings, 3 layers; only ratios: NoPE, no mask)"


def test_in_a_single_layer_a_mask_alone_does_not_help_the_last_token():
    """It sees every token, mask or not; only from the second layer on do tokens that saw less tell it."""
    one = counting_gap("10", "1100", causal=True, n_layers=1, dtype=torch.float64)
    assert one.last < 1e-12 < 1e-2 < one.mean
    assert counting_gap("10", "1100", causal=True, n_layers=2, dtype=torch.float64).last > 1e-2


@pytest.fixture(scope="module")
def collapse():
    counts = [32, 128, 256, 512]
    return counting_collapse(counts, dtypes=[torch.float64, torch.bfloat16], seeds=2, n_layers=2, d_model=16, n_heads=2)


def test_counts_are_those_of_separate_runs(collapse):
    for i, positions in enumerate(collapse.positions):
        model = RandomTransformer(positions=positions, n_layers=2, d_model=16, n_heads=2, seed=1, dtype=torch.float64)
        direct = (model("1" * 32 + "0")[-1] - model("1" * 33 + "0")[-1]).abs().max()
        assert float(collapse.distances[i, 0, 1, 0]) == pytest.approx(float(direct), rel=1e-9)


def test_counts_fade_as_theory_says(collapse):
    """Squared without positions and with RoPE, by a hyperbolic sine with ALiBi (smallest slope 1/256), not at all with sinusoids."""
    assert collapse.decay("nope", start=256).exponent == pytest.approx(2, abs=0.02)
    assert collapse.decay("rope", start=32).exponent == pytest.approx(2, abs=0.6)  # its weights oscillate with the distance
    alibi = collapse.exact[collapse.positions.index("alibi"), 0]
    for column, n in enumerate(collapse.counts[2:], start=2):
        law = (math.sinh(128 / 512) / math.sinh(n / 512)) ** 2
        assert (alibi[:, column] / alibi[:, 1]).tolist() == pytest.approx([law] * 2, rel=0.05)
    assert collapse.exact[collapse.positions.index("sinusoidal"), 0].min() > 0.05


def test_a_low_precision_loses_count_first(collapse):
    for positions in ("nope", "rope", "alibi"):
        lost = collapse.critical_count(positions, "bfloat16")
        assert lost is not None
        assert lost <= 256
        assert collapse.critical_count(positions, "float64") is None
    assert collapse.critical_count("sinusoidal", "bfloat16") is None
    table = collapse.to_dataframe()
    full = table[table["dtype"] == "float64"]
    assert (full["mean"] == full["exact"]).all()
    assert (full["rounding"] == 0).all()
    with pytest.raises(ValueError, match="dtype: got 'float16'; allowed: float64, bfloat16"):
        collapse.critical_count("nope", "float16")


def test_the_critical_count_is_the_last_crossing():
    exact = torch.tensor([[[[4.0, 0.1, 3.0, 0.1], [4.0, 0.1, 0.1, 0.1]]]], dtype=torch.float64)
    same = torch.tensor([[[[False, True, False, False], [False, True, True, True]]]])
    made = CountingCollapse((1, 2, 3, 4), ("nope",), ("bfloat16",), exact, exact, torch.ones_like(exact), same, "0")
    assert made.critical_count("nope", "bfloat16") == 4
    assert made.critical_count("nope", "bfloat16", by="bits") is None
    assert repr(made) == "CountingCollapse(nope; bfloat16; counts 1 to 4, 2 seeds)"


def test_bad_input(as_users_run_it):
    for arguments, message in (
        ({"a": ""}, "a: got ''; allowed: a string of digits"),
        ({"b": "1x"}, "b: got '1x'"),
        ({"positions": "learned"}, "positions: got 'learned'"),
        ({"n_layers": 0}, "n_layers: got 0"),
        ({"n_heads": 3}, "n_heads: got 3 at d_model 32"),
        ({"seed": -1}, "seed: got -1"),
        ({"dtype": torch.int8}, "dtype: got torch.int8"),
    ):
        with pytest.raises(ValueError, match=message):
            counting_gap(**{"a": "10", "b": "1100", **arguments})
    for arguments, message in (
        ({"ratios": []}, r"ratios: got \[\]"),
        ({"ratios": [(0, 0)]}, r"ratios: got \(0, 0\)"),
        ({"ratios": [(1, 2, 3)]}, "ratios: got"),
        ({"times": [1]}, "times: got 1"),
        ({"positions": []}, "positions: got"),
        ({"causal": [None]}, "causal: got None"),
        ({"seeds": 0}, "seeds: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ratio_blindness(**arguments)
    for arguments, message in (
        ({"counts": [0]}, "counts: got 0"),
        ({"end": "?"}, r"end: got '\?'"),
        ({"dtypes": ["float32"]}, "dtypes: got 'float32'"),
        ({"seeds": 0}, "seeds: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            counting_collapse(**{"counts": [4], **arguments})
