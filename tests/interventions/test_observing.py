"""The numbers that runs are judged by: against the same from logits, streams and patterns computed here."""

from __future__ import annotations

import editing
import pytest
import torch
import zoo
from recording import record
from streams import ragged

from sd_lens.interventions.observing import kl, logit_difference, loss, observe, peak_norm, sink_rate
from sd_lens.models.batches import batches
from sd_lens.tracing.sinks import sink_attention

FAMILIES = [name for name in ("llama", "gpt2", "hooked_gpt2") if name in zoo.FAMILIES]
PROMPTS = ragged(zoo.VOCAB, (7, 4, 1))


@pytest.fixture(params=FAMILIES)
def model(request):
    return zoo.cached(request.param)


def seen(model, hooks=(), **what):
    (batch,) = batches(PROMPTS, batch_tokens=99)
    return observe(model, batch, hooks, **what)


@torch.no_grad()
def alone(model, hooks=()):
    """Logits of every prompt by itself, longest first."""
    return [model.run_with_hooks(prompt.unsqueeze(0), fwd_hooks=list(hooks))[0].double() for prompt in PROMPTS]


def test_loss_and_kl_and_logit_difference(model):
    hooks = editing.random_subspace(model).ablate(side="both").fwd_hooks()
    plain, edited = seen(model, logits=True), seen(model, hooks, logits=True)
    assert plain.norms is plain.alpha is None
    for observed, logits in ((plain, alone(model)), (edited, alone(model, hooks))):
        by_hand = [
            float(-one.log_softmax(-1)[:-1].gather(1, prompt[1:, None]).mean()) for one, prompt in zip(logits, PROMPTS, strict=True)
        ]
        assert loss(observed)[:2].tolist() == pytest.approx(by_hand[:2], rel=1e-4)
        assert loss(observed)[2].isnan()  # one token predicts nothing
        answers = torch.tensor([[5, 6], [7, 8], [9, 10]])
        by_hand = [float(one[-1, right] - one[-1, wrong]) for one, (right, wrong) in zip(logits, answers.tolist(), strict=True)]
        assert logit_difference(observed, answers).tolist() == pytest.approx(by_hand, rel=1e-4, abs=1e-5)
    by_hand = []
    for old, new in zip(alone(model), alone(model, hooks), strict=True):
        p, q = old.softmax(-1), new.softmax(-1)
        by_hand.append(float((p * (p / q).log()).sum(-1).mean()))
    assert kl(edited, plain.logits).tolist() == pytest.approx(by_hand, rel=1e-3)
    assert min(by_hand) > 1e-3
    assert kl(plain, plain.logits).tolist() == [0.0] * 3


def test_norms_and_attention(model):
    hooks = editing.random_subspace(model).ablate(side="direction").fwd_hooks()
    observed = seen(model, hooks, norms=True, alpha=True)
    assert observed.logits is None
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{block}.hook_resid_post" for block in range(zoo.BLOCKS))]
    for row, prompt in enumerate(PROMPTS):
        with model.hooks(fwd_hooks=hooks):
            streams = record(model, prompt.unsqueeze(0), names)
        norms = torch.stack([streams[name][0].norm(dim=-1) for name in names])
        torch.testing.assert_close(observed.norms[:, row, : len(prompt)], norms, rtol=1e-4, atol=1e-5)
        assert observed.norms[:, row, len(prompt) :].isnan().all()
        assert float(peak_norm(observed)[row]) == pytest.approx(float(norms[1:].max()), rel=1e-5)
    with model.hooks(fwd_hooks=hooks):
        sinks = sink_attention(model, PROMPTS[:2])
    torch.testing.assert_close(observed.alpha[:2].mean(0), sinks.alpha.float(), rtol=1e-4, atol=1e-5)
    assert float(sink_rate(observed)[:2].mean()) == pytest.approx(sinks.sink_rate, abs=1e-6)
    assert sink_rate(observed, epsilon=-1.0).tolist() == [1.0] * 3
    assert sink_rate(observed, epsilon=2.0).tolist() == [0.0] * 3


def test_half_precision_logits_are_judged_in_float32():
    exact, half = zoo.cached("llama"), zoo.build("llama", dtype=torch.bfloat16)
    plain, rough = seen(exact, logits=True), seen(half, logits=True)
    assert rough.logits.dtype == torch.bfloat16
    assert loss(rough).dtype == torch.float32
    assert loss(rough)[:2].tolist() == pytest.approx(loss(plain)[:2].tolist(), rel=2e-2)
