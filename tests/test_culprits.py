"""What is said to be to blame is to blame: every component's part by hand, from TransformerLens' cache, without attributions."""

import pytest
import torch
from culprits import BLOCKS, CASES, DECAY_BLOCK, TRIGGER_TOKEN, Component, cached, components, culprit
from dense import angle, ffn_matrix
from recording import record

from sd_lens.models.check import check
from sd_lens.models.loading import load, weights_of
from sd_lens.models.weights import FFNWeights
from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.norms import trace_norms

LARGEST_ERROR = 0.005
"""Of a share that is said to be planted: half of what is demanded of attributions."""


class ByHand:
    """What every component writes at the exploding tokens, in float64.

    Streams are ``(token, d_model)``, over the exploding tokens of the prompts.
    """

    def __init__(self, planted, tokens=None):
        self.planted, self.weights = planted, weights_of(planted.model)
        self.tokens = planted.prompts() if tokens is None else tokens
        self.where = planted.explodes(self.tokens)
        with torch.no_grad():
            _, self.cache = planted.model.run_with_cache(self.tokens)

    def at(self, name):
        return self.cache[name][self.where].double()

    def before(self, block):
        """What the FFN of a block reads."""
        stream = self.at(f"blocks.{block}.hook_resid_pre")
        return stream if self.planted.parallel else stream + self.at(f"blocks.{block}.hook_attn_out")

    def heads(self, block):
        z, W_O = self.at(f"blocks.{block}.attn.hook_z"), self.weights[block].attention.W_O.detach().double()
        return {("head", block, head): z[:, head] @ W_O[head] for head in range(len(W_O))}

    def components(self, blocks, *, up_to_ffn=False):
        """Components of the first blocks; of the last of them, only what its FFN reads where that is asked for."""
        written: dict[Component, torch.Tensor] = {("embed", None, None): self.at("hook_embed")}
        if "hook_pos_embed" in self.cache and self.planted.architecture == "gpt2":
            written["pos_embed", None, None] = self.at("hook_pos_embed")
        for block in range(blocks):
            last = up_to_ffn and block == blocks - 1
            if not (last and self.planted.parallel):
                written |= self.heads(block)
            if not last:
                written["ffn", block, None] = self.at(f"blocks.{block}.hook_mlp_out")
        return written

    def neurons(self, block, direction):
        """The projection of what every neuron of a block writes, (token, neuron)."""
        ffn = self.weights[block].ffn
        assert isinstance(ffn, FFNWeights)
        hidden = ffn.hidden(ffn.input(self.before(block).float())).detach().double()
        return hidden * (ffn.W_out.detach().double() @ direction)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def by_hand(request):
    return ByHand(cached(*request.param))


def assert_shares(by_hand, written, direction, wanted):
    """The components add up, and their shares along a direction are those wanted, neurons' too, at every exploding token."""
    total = sum(written.values()) @ direction
    assert by_hand.where.any()
    assert set(dict(components(wanted))) <= set(written)
    for component, stream in written.items():
        share = stream @ direction / total
        assert (share - wanted.get(component, 0.0)).abs().max() < LARGEST_ERROR, component
    for block in [block for kind, block, _ in written if kind == "ffn"]:
        shares = by_hand.neurons(block, direction) / total.unsqueeze(1)
        expected = torch.tensor([wanted.get(("neuron", block, index), 0.0) for index in range(shares.shape[1])])
        assert (shares - expected).abs().max() < LARGEST_ERROR


def assert_blamed(by_hand):
    planted = by_hand.planted
    direction = planted.direction.double()
    written = by_hand.components(planted.block + 1)
    stream = by_hand.at(f"blocks.{planted.block}.hook_resid_post")
    torch.testing.assert_close(sum(written.values()), stream, rtol=0, atol=2e-6 * planted.norm)
    assert ((stream @ direction) / planted.norm - 1).abs().max() < 0.1
    assert_shares(by_hand, written, direction, planted.norm_parts)
    assert sum(share for _, share in components(planted.norm_parts)) == pytest.approx(1)
    if planted.trigger is None:
        assert not planted.trigger_parts
        return
    block, trigger = planted.explosion_blocks[0], planted.trigger.double()
    written = by_hand.components(block + 1, up_to_ffn=True)
    torch.testing.assert_close(sum(written.values()), by_hand.before(block), rtol=0, atol=1e-5)
    assert_shares(by_hand, written, trigger, planted.trigger_parts)
    assert sum(share for _, share in components(planted.trigger_parts)) == pytest.approx(1)


def assert_found(planted, tokens):
    defects = find_defects(trace_norms(planted.model, tokens))
    assert defects.explosion_blocks == planted.explosion_blocks
    assert defects.decay_blocks == (DECAY_BLOCK,)
    assert torch.equal(defects.mask(), planted.explodes(tokens))
    assert defects.direction is not None
    assert angle(defects.direction.direction, planted.direction) < 0.5
    assert defects.direction.direction @ planted.direction > 0


def test_the_norm_and_its_trigger_have_the_parts_that_were_planted(by_hand):
    assert_blamed(by_hand)


def test_exactly_the_planted_tokens_and_blocks_are_found(by_hand):
    assert_found(by_hand.planted, by_hand.tokens)
    assert {int(pos) for _, pos in by_hand.where.nonzero()} >= ({0} if by_hand.planted.trigger_token is None else {0, 3, 5, 8, 11})


@pytest.mark.parametrize(("kind", "architecture"), CASES[::3])
def test_with_other_weights_and_prompts_too(kind, architecture):
    planted = culprit(kind, architecture, seed=1)
    assert_blamed(ByHand(planted, planted.prompts(seed=2)))
    assert_found(planted, planted.prompts(seed=3))


def test_the_explosion_blocks_map_leads_from_the_trigger_to_the_direction(by_hand):
    planted = by_hand.planted
    if planted.trigger is None:
        pytest.skip("no FFN is set off")
    for block, trigger in zip(planted.explosion_blocks, (planted.trigger, planted.direction), strict=False):
        u, s, vh = torch.linalg.svd(ffn_matrix(by_hand.weights[block].ffn))
        assert s[1] < 0.2 * s[0]
        assert angle(vh[0], trigger) < 0.5
        assert angle(u[:, 0], planted.direction) < 0.5
        seen = by_hand.before(block) @ trigger.double()
        assert (seen > 0.4).all()


def test_planted_heads_attend_to_their_own_token_alone(by_hand):
    for kind, block, head in {**by_hand.planted.norm_parts, **by_hand.planted.trigger_parts}:
        if kind == "head":
            pattern = by_hand.cache[f"blocks.{block}.attn.hook_pattern"][:, head]
            same = by_hand.tokens.unsqueeze(1) == by_hand.tokens.unsqueeze(2)
            assert ((pattern * same).sum(-1) > 0.999).all()
            once = by_hand.where.sum(1) < 2
            assert (pattern[once].diagonal(dim1=-2, dim2=-1) > 0.999).all()


def test_without_what_sets_it_off_nothing_explodes(by_hand):
    planted, trigger = by_hand.planted, by_hand.planted.trigger
    if trigger is None:
        pytest.skip("no FFN is set off")
    names = {"embed": "hook_embed", "pos_embed": "hook_pos_embed", "head": "attn.hook_z", "ffn": "hook_mlp_out"}

    def without(head):
        def hook(value, hook):
            if head is None:
                return value - (value @ trigger).unsqueeze(-1) * trigger
            value = value.clone()
            value[:, :, head] = 0.0
            return value

        return hook

    fuses = [component for component, _ in components(planted.trigger_parts)]
    hooks = [(("" if block is None else f"blocks.{block}.") + names[kind], without(head)) for kind, block, head in fuses]
    after = f"blocks.{planted.block}.hook_resid_post"
    with planted.model.hooks(fwd_hooks=hooks):
        assert record(planted.model, by_hand.tokens, [after])[after].norm(dim=-1).max() < 0.01 * planted.norm


def test_the_other_tokens_and_components_are_not_silent(by_hand):
    others = [by_hand.cache[f"blocks.{block}.hook_resid_post"][~by_hand.where].norm(dim=-1) for block in range(BLOCKS)]
    assert max(float(norms.max()) for norms in others) < 5
    for block in range(BLOCKS):
        for name in ("hook_attn_out", "hook_mlp_out"):
            assert by_hand.cache[f"blocks.{block}.{name}"][~by_hand.where].norm(dim=-1).max() > 1e-3


def test_the_models_are_as_they_are_said_to_be(by_hand):
    planted = by_hand.planted
    assert load(planted.model) is planted.model
    assert by_hand.weights[0].parallel == planted.parallel == (planted.architecture == "gpt_neox")
    for vector in filter(lambda vector: vector is not None, (planted.direction, planted.trigger)):
        assert abs(float(vector.norm()) - 1) < 1e-6
    assert planted.trigger_token in (None, TRIGGER_TOKEN)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_every_analysis_applies_to_them(architecture):
    assert check(cached("head_trigger", architecture).model).analyses().applies.all()


def test_no_culprit_where_the_architecture_has_none():
    with pytest.raises(ValueError, match="kind, architecture: got 'position', 'llama'"):
        culprit("position", "llama")


@pytest.mark.usefixtures("as_users_run_it")  # the type checks draw random numbers themselves
def test_the_seed_alone_decides_the_weights_and_the_callers_random_state_stays():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, same, other = (culprit("head_trigger", "gpt2", seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
