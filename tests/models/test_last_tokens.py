"""Last tokens with shared beginnings: against a pass over each sequence by itself, on every architecture."""

from __future__ import annotations

import pytest
import torch
import zoo

from sd_lens.models import hook_names, last_tokens
from sd_lens.models.last_tokens import LOGITS, can_share

BASE = torch.randint(3, 100, (23,), generator=torch.Generator().manual_seed(0))
SEQUENCES = [
    *(torch.cat([BASE[:n], torch.tensor(tail)]) for n in (1, 7, 22) for tail in ([5], [5, 5], [7, 8, 9])),
    *(BASE[:n] for n in (1, 5, 23)),
    torch.tensor([50, 51]),
    BASE[:5],
]


def found(model, points, sequences=SEQUENCES, **options):
    values = {}
    last_tokens.last_tokens(
        model, sequences, points, lambda number, point, value: values.__setitem__((number, point), value.clone()), **options
    )
    assert len(values) == len(sequences) * len(points)
    return values


def separate(model, points, sequences=SEQUENCES, edits=()):
    """The same, one pass per sequence, by `run_with_hooks`."""
    values = {}
    for number, sequence in enumerate(sequences):
        hooks = [
            (name, lambda value, hook, key=(number, point): values.__setitem__(key, value[0, -1].clone()))
            for point, name in enumerate(points)
            if name != LOGITS
        ]
        with torch.no_grad():
            logits = model.run_with_hooks(sequence.unsqueeze(0), fwd_hooks=[*edits, *hooks])
        if LOGITS in points:
            values[number, points.index(LOGITS)] = logits[0, -1]
    return values


def require_same(got, wanted):
    for key, value in got.items():
        assert float((value - wanted[key]).abs().max()) <= 1e-5 * max(1.0, float(wanted[key].abs().max()))


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_sharing_changes_nothing(family):
    model = zoo.cached(family)
    n_blocks = int(model.cfg.n_layers)
    points = [hook_names.resid_post(n_blocks - 1), hook_names.unembed_in(), LOGITS]
    some = [SEQUENCES[number] for number in (3, 4, 11)]
    shared = can_share(model)
    # On TransformerLens 3.9 a bridged MPT counts its positions anew behind a cache, which is noticed.
    assert shared or family == "mpt"
    require_same(found(model, points, some, shared=shared), separate(model, points, some))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_batches(family):
    model, points = zoo.cached(family), [hook_names.resid_post(0), hook_names.unembed_in(), LOGITS]
    wanted = separate(model, points)
    require_same(found(model, points, shared=True), wanted)
    require_same(found(model, points, shared=False, batch_tokens=40), wanted)


def test_in_segments(monkeypatch):
    model = zoo.cached("llama")
    points = [hook_names.unembed_in()]
    wanted = separate(model, points)
    monkeypatch.setattr(last_tokens, "SEGMENT", 3)
    for key, value in found(model, points).items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-5)


def test_without_logits_the_unembedding_is_not_run():
    model = zoo.cached("llama")
    calls = []
    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda value, hook: calls.append(value.shape[1]))]):
        found(model, [hook_names.unembed_in()])
        assert calls == []
        found(model, [LOGITS])
    assert set(calls) == {1}  # and with logits, for last tokens only


def test_edits_reach_what_is_read():
    model = zoo.cached("gpt2")
    edits = [(hook_names.resid_post(0), lambda value, hook: value * 1.5)]
    points = [hook_names.resid_post(0), hook_names.unembed_in()]
    wanted = separate(model, points, edits=edits)
    for key, value in found(model, points, edits=edits).items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-5)


def test_models_that_take_no_cache_are_noticed(monkeypatch):
    model = zoo.cached("llama")

    def refuse(*args, **kwargs):
        raise NotImplementedError("no cache")

    monkeypatch.setattr(last_tokens, "cached_pass", refuse)
    assert not can_share(model)


@pytest.mark.parametrize("shared", [True, False])
def test_an_error_leaves_no_hook(shared):
    model = zoo.cached("llama")

    def stop(number, point, value):
        raise KeyboardInterrupt

    before = {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}
    with pytest.raises(KeyboardInterrupt):
        last_tokens.last_tokens(model, SEQUENCES, [hook_names.unembed_in()], stop, shared=shared)
    assert {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()} == before
