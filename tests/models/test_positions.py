import pytest
import torch
import zoo
from recording import same_state, state

from sd_lens.models.positions import adds_positions


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_only_families_with_learned_positions_add_them(family):
    model = zoo.cached(family)
    learned = family.removeprefix("hooked_") in ("gpt2", "gpt2_quick_gelu", "opt")
    before = state(model)
    assert adds_positions(model) is learned
    assert same_state(before, state(model))


def test_positions_that_go_elsewhere_are_not_part_of_the_stream():
    """As in a model whose positions are added to queries and keys: the hook point is reached, but the stream has nothing of it."""
    model = zoo.build("gpt2")
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda stream, hook: stream - 100 * torch.ones_like(stream))]):
        assert not adds_positions(model)
    assert adds_positions(model)
