"""One attention layer on random tokens: against whole attention matrices, exact identities, and what theory expects."""

import math

import pytest
import torch

from sd_lens.propagation.positions import POSITIONS
from sd_lens.propagation.synthetic import synthetic_collapse


def draws(seed, longest, d_model):
    """Query, key and value of the last token; keys and values of those before, as the function documents and draws them."""
    generator = torch.Generator().manual_seed(seed)
    last = torch.randn(3, 1, d_model, generator=generator, dtype=torch.float64)
    return last, torch.randn(longest - 1, 2, d_model, generator=generator, dtype=torch.float64)


def whole_attention(kind, queries, keys, values, n_heads):
    """The last output of causal attention, from whole matrices, token by token and dimension by dimension."""
    n, d = keys.shape
    width = d // n_heads
    if kind == "sinusoidal":
        table = [[(math.cos if c % 2 else math.sin)(pos / 10_000 ** ((c - c % 2) / d)) for c in range(d)] for pos in range(n)]
        queries, keys = queries + torch.tensor(table, dtype=torch.float64), keys + torch.tensor(table, dtype=torch.float64)
    outputs = []
    for head in range(n_heads):
        q, k, v = (x[:, head * width : (head + 1) * width] for x in (queries, keys, values))
        if kind == "rope":
            angles = torch.arange(n)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2).double() / width)
            turned = [torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angles) for x in (q, k)]
            scores = (turned[0] @ turned[1].conj().T).real
        else:
            scores = q @ k.T
        scores = scores / math.sqrt(width)
        if kind == "alibi":
            distance = torch.arange(n)[:, None] - torch.arange(n)
            scores = scores - 2.0 ** (-8 * (head + 1) / n_heads) * distance
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        outputs.append((scores.softmax(-1) @ v)[-1])
    return torch.cat(outputs)


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("n_heads", [1, 4])
def test_distances_are_those_of_whole_attention_matrices(kind, n_heads):
    found = synthetic_collapse([2, 9, 40], positions=[kind], d_model=16, n_heads=n_heads, seeds=2, dtype=torch.float64)
    for seed in range(2):
        (query, key, value), before = draws(seed, 40, 16)
        for column, n in enumerate([2, 9, 40]):
            outputs = []
            for times in (1, 2):
                keys = torch.cat([before[: n - 1, 0], key.expand(times, -1)])
                values = torch.cat([before[: n - 1, 1], value.expand(times, -1)])
                outputs.append(whole_attention(kind, query.expand(len(keys), -1), keys, values, n_heads))
            direct = float((outputs[0] - outputs[1]).abs().sum())
            assert float(found.distances[0, seed, column]) == pytest.approx(direct, rel=1e-9)


@pytest.mark.parametrize(("kind", "slope"), [("nope", 0.0), ("alibi", 1 / 256)])
def test_an_exact_identity_without_rotation(kind, slope):
    """``w |v - o| / (w + e^-m Z)``: earlier weights all shrink by the same factor, so only the last token's own weight matters."""
    found = synthetic_collapse([300], positions=[kind], d_model=8, seeds=2, dtype=torch.float64)
    for seed in range(2):
        (query, key, value), before = draws(seed, 300, 8)
        scores = before[:, 0] @ query[0] / math.sqrt(8) - slope * torch.arange(299, 0, -1)
        weights, own = scores.exp(), (key[0] @ query[0] / math.sqrt(8)).exp()
        total = weights.sum() + own
        output = (weights @ before[:, 1] + own * value[0]) / total
        distance = own * (value[0] - output).abs().sum() / (own + math.exp(-slope) * total)
        assert float(found.distances[0, seed, 0]) == pytest.approx(float(distance), rel=1e-9)


@pytest.fixture(scope="module")
def many():
    return synthetic_collapse([128, 512, 2048], seeds=16, dtype=torch.float64)


def test_what_theory_expects_is_what_happens(many):
    """Mean ratio over 16 seeds; of sinusoids, whose weights are the most uneven, the mean field promises up to a quarter too much."""
    ratio = (many.distances / many.expected).mean(1)
    error = (many.distances / many.expected).std(1) / math.sqrt(16)
    for row, (kind, slack) in enumerate([("nope", 0.04), ("sinusoidal", 0.25), ("rope", 0.04), ("alibi", 0.04)]):
        assert many.positions[row] == kind
        assert ((ratio[row, 1:] - 1).abs() < slack + 4 * error[row, 1:]).all()
        assert (error[row] < 0.1).all()


def test_exponents(many):
    assert many.decay("nope").exponent == pytest.approx(1, abs=0.03)
    assert many.decay("rope").exponent == pytest.approx(0.5, abs=0.05)
    assert many.decay("sinusoidal").exponent == pytest.approx(0.45, abs=0.1)
    assert many.decay("nope", expected=True).exponent == pytest.approx(1, abs=0.01)
    assert many.decay("rope", expected=True).exponent == pytest.approx(0.5, abs=0.02)
    assert many.decay("rope").standard_error < 0.03


def test_limits_of_what_is_expected():
    """The formulas of many tokens that the docstring gives, for a single last token."""
    found = synthetic_collapse([4096, 16_384], seeds=1, dtype=torch.float64)
    (query, key, value), _ = draws(0, 2, 64)
    q, k, v = query[0], key[0], value[0]
    s = float(q @ q) / 64
    own = math.exp(float(q @ k) / 8)
    expected = dict(zip(found.positions, found.expected[:, 0, -1].tolist(), strict=True))
    assert expected["nope"] == pytest.approx(own * float(v.abs().sum()) / (16_384 * math.exp(s / 2)), rel=0.01)
    turn = 10_000.0 ** (-torch.arange(32).double() / 32)
    same = float((q.unflatten(0, (32, 2)).square().sum(1) * turn.cos()).sum()) / 64
    spread = math.sqrt(2 * (math.exp(s) - math.exp(same)) / 16_384)
    assert expected["rope"] == pytest.approx(64 * math.sqrt(2 / math.pi) * spread, rel=0.02)
    m = 1 / 256
    share = own / (own * (1 + math.exp(-m)) + math.exp(s / 2) * math.exp(-2 * m) / (1 - math.exp(-m)))
    # What earlier values add is small beside the last token's own.
    assert expected["alibi"] == pytest.approx(share * float(v.abs().sum()), rel=0.05)
    assert found.decay("alibi", expected=True).exponent == pytest.approx(0, abs=1e-6)


def test_precisions():
    lengths = [64, 256]
    exact = synthetic_collapse(lengths, seeds=2, dtype=torch.float64)
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 0.15), (torch.float16, 0.02)):
        found = synthetic_collapse(lengths, seeds=2, dtype=dtype)
        assert found.dtype == str(dtype).removeprefix("torch.")
        assert torch.allclose(found.distances, exact.distances, rtol=close, atol=0)
        assert not torch.equal(found.distances, exact.distances)
        assert torch.equal(found.expected, exact.expected)
    table = exact.to_dataframe()
    assert list(table) == ["positions", "length", "mean", "min", "max", "expected", "same"]
    assert len(table) == 8
    assert not table["same"].any()


def test_bad_input(as_users_run_it):
    for arguments, message in (
        ({"lengths": [1]}, "lengths: got 1; allowed: whole numbers from 2"),
        ({"lengths": []}, "lengths: got"),
        ({"positions": ["learned"]}, "positions: got 'learned'"),
        ({"positions": "rope"}, "positions: got 'rope'"),
        ({"d_model": 1}, "d_model: got 1"),
        ({"n_heads": 5}, "n_heads: got 5 at d_model 64"),
        ({"seeds": 0}, "seeds: got 0"),
        ({"dtype": torch.int32}, "dtype: got torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            synthetic_collapse(**{"lengths": [8], **arguments})
