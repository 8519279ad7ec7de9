"""The over-squashing bound against Jacobians, against the theorem's formula written out, and what it says of itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import zoo
from recording import record
from scipy.stats import spearmanr
from torch import Tensor

from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.models import hook_names
from sd_lens.models.gradients import frozen
from sd_lens.models.planted import planted
from sd_lens.propagation.sensitivity import sensitivity
from sd_lens.propagation.sensitivity_result import Sensitivity
from sd_lens.propagation.squashing import squashing_bound

N = 7
FAMILIES = [name for name in ("llama", "gpt_neox_parallel", "gemma2", "olmo2", "hooked_gpt2") if name in zoo.FAMILIES]


def true_norms(model, tokens: Tensor, position: int, *, patterns: dict[str, Tensor] | None = None) -> Tensor:
    """Spectral norms of the Jacobian of one position's final representation with respect to every block's input, (source, pos).

    With patterns, attention is kept at them.
    """
    streams: dict[int, Tensor] = {}
    last = model.cfg.n_layers - 1

    def enter(block):
        def hook(stream, hook):
            if block == 0:
                stream = stream.detach().requires_grad_()
            streams[block] = stream
            return stream

        return hook

    hooks = [(hook_names.resid_pre(block), enter(block)) for block in range(last + 1)]
    hooks += [(name, lambda _, hook, pattern=pattern: pattern) for name, pattern in (patterns or {}).items()]
    hooks.append((hook_names.resid_post(last), lambda stream, hook: streams.update({last + 1: stream})))
    with frozen(model):
        model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)
        y = model.ln_final(streams[last + 1])[0, position]
    sources = [streams[block] for block in range(last + 2)]
    rows = [torch.autograd.grad(entry, sources, retain_graph=True) for entry in y]
    stacked = [torch.stack([row[source][0] for row in rows], dim=1) for source in range(last + 2)]  # (pos, out, in)
    return torch.stack([torch.linalg.matrix_norm(jacobian.double(), ord=2) for jacobian in stacked])


def measured(found, norms: Tensor, **fields) -> Sensitivity:
    """Jacobian norms as `sensitivity` gives them."""
    blank = torch.zeros(len(norms), N)
    made = Sensitivity(
        model_name=found.model_name,
        of="final",
        position=found.position,
        sources=tuple(range(len(norms))),
        frobenius=norms,
        spectral=norms,
        standard_error=blank,
        stream_norm=blank,
        tokens=found.tokens,
        texts=found.texts,
        high_norm=torch.zeros(N, dtype=torch.bool),
        sinks=torch.zeros(N, dtype=torch.bool),
        method="exact",
        n_products=1,
    )
    return replace(made, **fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_its_patterns_kept_a_models_jacobian_is_bounded(family):
    """By all three ways to combine heads, at every depth; and bounds with constants of every token's own are sharper."""
    model = zoo.cached(family)
    tokens = zoo.tokens(model, 1, N)
    names = [hook_names.pattern(block) for block in range(model.cfg.n_layers)]
    patterns = record(model, tokens, names)
    position = 3 if family == "olmo2" else -1
    norms = true_norms(model, tokens, position, patterns=patterns)
    bounds = []
    for heads in ("weighted", "mean", "max") if family == "llama" else ("weighted",):
        found = squashing_bound(model, tokens, heads=heads, position=position)
        truth = measured(found, norms)
        for which in ("theorem", "token"):
            slack = found.log10_slack(truth, which=which).nan_to_num(nan=0.0)  # what a window hides has neither
            assert float(slack.min()) > -1e-6
        assert bool((found.token_bound <= found.bound * (1 + 1e-9)).all())
        assert float(found.log10_slack(truth)[-1, -1]) == pytest.approx(0.0, abs=1e-4)  # no block: the final norm alone
        bounds.append(found.bound)
    assert all(bool((bounds[0] <= other * (1 + 1e-6)).all()) for other in bounds)
    assert not bool(norms[:, found.position + 1 :].any())


def test_attention_that_asks_nothing_meets_the_theorems_assumption():
    """Queries of zero look everywhere alike, whatever the tokens: then the bound is one of the model's true Jacobian."""
    model = zoo.build("llama")
    tokens = zoo.tokens(model, 1, N)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.weight.zero_()
    pattern = record(model, tokens, [hook_names.pattern(1)])[hook_names.pattern(1)][0, 0]
    torch.testing.assert_close(pattern[-1], torch.full((N,), 1 / N))
    found = squashing_bound(model, tokens)
    slack = found.log10_slack(sensitivity(model, tokens, sources=range(model.cfg.n_layers)))
    assert float(slack.min()) > 0
    assert float(slack[0].max()) < 6


@pytest.fixture(scope="module")
def plain():
    """The bound of a small model at its last token."""
    model = zoo.cached("gpt2")
    return squashing_bound(model, zoo.tokens(model, 1, N))


def test_given_constants_are_the_theorems_formula():
    model = zoo.cached("gpt2")
    tokens = zoo.tokens(model, 1, N)
    found = squashing_bound(model, tokens, beta1=0.7, beta2=2.0, beta3=4.0, sigma_psi=3.0, position=-2)
    row = torch.eye(N, dtype=torch.float64)
    names = [hook_names.pattern(block) for block in range(model.cfg.n_layers)]
    patterns = record(model, tokens, names)
    for name in names:
        row = (patterns[name][0].double().mean(0) / 0.7 + torch.eye(N)) @ row
    constant = (3.0 / 2.0 + 1) ** len(names) / 4.0
    torch.testing.assert_close(found.path_weights, row[N - 2], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found.bound, constant * row[N - 2], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found.token_bound, found.bound, rtol=1e-6, atol=0.0)
    assert found.first_column() == pytest.approx(float(row[N - 2, 0] / row[N - 2].sum()))
    assert [found.first_column(0), found.first_column(0, which="token")] == [0.0, 0.0]
    assert found.given == ("beta1", "beta2", "beta3", "sigma_psi")
    assert all((row.beta1, row.beta2, row.sigma_psi, row.ffn_gain) == (0.7, 2.0, 3.0, 1.5) for row in found.constants)


def test_measured_constants_make_up_the_bound():
    model = zoo.cached("olmo2")
    tokens = zoo.tokens(model, 1, N)
    found = squashing_bound(model, tokens)
    assert found.given == ()
    for row in found.constants:
        assert row.beta1 == pytest.approx(row.norm_scale / (row.head_factor * row.post_gain))
        assert row.ffn_gain <= row.sigma_psi / row.beta2 * (1 + 1e-12)
    constant = math.prod(1 + row.ffn_gain for row in found.constants) / found.beta3
    torch.testing.assert_close(found.bound, constant * found.path_weights)
    half = squashing_bound(model, tokens, beta2=found.constants[1].beta2)
    assert half.constants[1].sigma_psi == pytest.approx(found.constants[1].sigma_psi)
    assert half.constants[1].ffn_gain == pytest.approx(found.constants[1].sigma_psi / found.constants[1].beta2)


def test_what_stands_after_the_position_has_no_part_in_it():
    model = zoo.cached("gpt2")
    tokens = zoo.tokens(model, 1, N)
    found, cut = squashing_bound(model, tokens, position=3), squashing_bound(model, tokens[:, :4])
    assert (found.constants, found.beta3) == (cut.constants, cut.beta3)
    for which in ("theorem", "token"):
        torch.testing.assert_close(found.log10_bounds(which)[:, :4], cut.log10_bounds(which))
    assert not bool(found.shares[:, 4:].any() | found.token_shares[:, 4:].any())
    assert (found.shares.shape, len(found.texts)) == ((model.cfg.n_layers + 1, N), N)


def test_rank_correlation_and_slack():
    model = zoo.cached("llama")
    tokens = zoo.tokens(model, 1, N)
    found = squashing_bound(model, tokens, position=4)
    norms = torch.rand(2, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    norms[:, 5:] = 0.0
    truth = measured(found, norms, frobenius=norms.flip(0), sources=(0, 2))
    bounds = found.rows[[3, 1], :5]
    for norm, wanted in (("spectral", norms), ("frobenius", norms.flip(0))):
        by_hand = [spearmanr(bound, true).statistic for bound, true in zip(bounds, wanted[:, :5], strict=True)]
        torch.testing.assert_close(found.correlation(truth, norm=norm), torch.tensor(by_hand, dtype=torch.float64))
    slack = found.log10_slack(truth)
    torch.testing.assert_close(10 ** slack[0], found.bound[:5] / norms[0, :5].double())
    assert bool(found.correlation(measured(found, torch.ones(1, N))).isnan().all())


def test_a_token_of_high_norm_is_shielded_by_its_norm():
    """Attention alone says that the first token is heard most; dividing it by its norm says that it is hardly heard after the explosion."""
    truth = planted()
    tokens = torch.arange(20).unsqueeze(0)
    found = squashing_bound(truth.model, tokens)
    depth = truth.model.cfg.n_layers - truth.explosion_block - 1  # what enters the block after the explosion
    assert found.first_column(depth) > 10 * found.first_column(depth, which="token")
    subspace = ExplosionSubspace.at(truth.model, truth.explosion_block)
    without = squashing_bound(truth.model, tokens, intervention=subspace.ablate())
    assert without.first_column(depth, which="token") > 5 * found.first_column(depth, which="token")
    assert without.intervention == subspace.ablate().name
    # The FFN's derivative is taken where the edit puts its input: without the explosion it is small.
    gains = [bound.constants[truth.explosion_block].sigma_psi for bound in (found, without)]
    assert gains[0] != pytest.approx(gains[1], rel=0.01)


def test_table_and_repr(plain):
    found, model = plain, zoo.cached("gpt2")
    table = found.to_dataframe()
    assert len(table) == (model.cfg.n_layers + 1) * N
    row = table[(table.source == 1) & (table.pos == 2)].iloc[0]
    assert row.depth == model.cfg.n_layers - 1
    assert row.share == float(found.shares[row.depth, 2])
    assert row.log10_bound == float(found.log10_bound[row.depth, 2])
    assert row.log10_token_bound == float(found.log10_bounds("token")[row.depth, 2])
    assert list(found.constants_table().block) == list(range(model.cfg.n_layers))
    assert repr(found).startswith("SquashingBound(")
    assert "\n" not in repr(found)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"heads": "sum"}, "heads: got 'sum'; allowed: 'mean', 'max', 'weighted'"),
        ({"beta1": 0}, "beta1: got 0; allowed: a finite number above 0, or None"),
        ({"beta2": -1.0}, "beta2: got -1.0; allowed"),
        ({"beta3": math.inf}, "beta3: got inf; allowed"),
        ({"sigma_psi": -0.1}, "sigma_psi: got -0.1; allowed: a finite number from 0, or None"),
        ({"beta1": "1"}, "beta1: got '1'; allowed"),
        ({"position": N}, f"position: got {N}; allowed: -{N} to {N - 1}"),
        ({"prompt": torch.ones(2, 3, dtype=torch.long)}, "prompt: got 2; allowed: one"),
        ({"intervention": "x"}, "intervention: got str; allowed: an Intervention of this model, or None"),
    ],
)
def test_bad_input(options, complaint):
    model = zoo.cached("gpt2")
    prompt = options.pop("prompt", zoo.tokens(model, 1, N))
    with pytest.raises(ValueError, match=complaint):
        squashing_bound(model, prompt, **options)


def test_a_model_that_shows_no_pattern(monkeypatch):
    model = zoo.cached("gpt2")
    monkeypatch.setattr("sd_lens.models.running.not_shown", lambda *_: [hook_names.pattern(0)])
    with pytest.raises(ValueError, match="model: its attention never shows blocks"):
        squashing_bound(model, zoo.tokens(model, 1, N))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda found: found.first_column(9), "depth: got 9; allowed: 0 to 3"),
        (lambda found: found.log10_bounds("paper"), "which: got 'paper'; allowed"),
        (lambda found: found.first_column(which="paper"), "which: got 'paper'; allowed"),
        (lambda found: found.correlation(measured(found, torch.ones(1, N), position=2)), "sensitivity: got position=2; allowed: 6"),
        (
            lambda found: found.correlation(measured(found, torch.ones(1, N), of="logits")),
            "sensitivity: got of='logits'; allowed: 'final'",
        ),
        (
            lambda found: found.log10_slack(measured(found, torch.ones(1, N), intervention="x")),
            "got intervention='x'; allowed: None",
        ),
        (
            lambda found: found.correlation(measured(found, torch.ones(1, N), tokens=torch.ones(N))),
            "sensitivity: got one of another prompt",
        ),
        (lambda found: found.correlation(measured(found, torch.ones(1, N)), norm="max"), "norm: got 'max'; allowed"),
    ],
)
def test_bad_questions(plain, call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call(plain)
