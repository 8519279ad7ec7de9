"""Sliding windows: found, switched off, and back afterwards."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
import zoo

from sd_lens.models import hook_names
from sd_lens.models.windows import sliding_window, without_window

WINDOWED = [name for name in zoo.FAMILIES if name.removeprefix("hooked_") in ("mistral", "gemma2", "gemma3")]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_which_models_have_one(family):
    assert sliding_window(zoo.cached(family)) == (zoo.WINDOW if family in WINDOWED else None)


@pytest.mark.parametrize("family", WINDOWED)
def test_without_it_every_token_is_seen(family):
    model, tokens = zoo.cached(family), torch.arange(3, 23).unsqueeze(0)
    seen = []
    reading = [(hook_names.pattern(0), lambda pattern, hook: seen.append(int((pattern[0, 0, -1] > 0).sum())))]
    with torch.no_grad():
        before = model.run_with_hooks(tokens, fwd_hooks=reading)
        with suppress(KeyError), without_window(model):
            model.run_with_hooks(tokens, fwd_hooks=reading)
            raise KeyError
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=reading), before)
    assert seen == [zoo.WINDOW, 20, zoo.WINDOW]


def test_the_mask_is_all_that_changes():
    """A model built with a window as wide as its context, and the same weights."""
    tokens = torch.arange(3, 23).unsqueeze(0)
    wide = zoo.boot("Mistral", **zoo.SIZES, head_dim=zoo.D_HEAD, sliding_window=zoo.CONTEXT)
    narrow = zoo.boot("Mistral", **zoo.SIZES, head_dim=zoo.D_HEAD, sliding_window=zoo.WINDOW)
    with torch.no_grad(), without_window(narrow):
        assert torch.equal(narrow(tokens), wide(tokens))
