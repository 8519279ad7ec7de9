"""Super weights against what the models' own hooks and a change of the weight itself show, and where there are none."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from recording import record, same_state, state
from streams import norms_alone, ragged

from sd_lens.models.loading import load, weights_of
from sd_lens.models.planted import planted
from sd_lens.models.weights import FFNWeights, MoEWeights
from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.super_weights import super_weights

BLOCK, NEURONS, DIM = 1, (5, 9), 3
LENGTHS = (9, 5, 12)  # fewer tokens than dimensions, so that a neuron can tell each from all others


def experts_of(ffn):
    """Every layer by its name."""
    if isinstance(ffn, FFNWeights):
        return {None: ffn}
    return dict(enumerate(ffn.experts)) | ({} if ffn.shared is None else {"shared": ffn.shared})


def entering(model, weights, tokens):
    """What a block's FFN reads of the stream, and what it adds to it."""
    names = [f"blocks.{weights.block}.hook_{name}" for name in ("resid_pre", "attn_out", "mlp_out")]
    resid_pre, attn_out, mlp_out = record(model, tokens[None], names).values()
    return (resid_pre if weights.parallel else resid_pre + attn_out)[0], mlp_out[0]


@torch.no_grad()
def plant(model, prompts, *places, expert=None):
    """Makes two neurons answer to the tokens at some places, and to no other, by writing to one dimension, the first 70 % of it.

    Returns:
        The name of the layer that they are in: that of the first place's token.
    """
    weights = weights_of(model)[BLOCK]
    x = torch.cat([weights.ffn.input(entering(model, weights, prompt)[0]) for prompt in prompts])
    starts = [sum(len(prompt) for prompt in prompts[:number]) for number in range(len(prompts))]
    tokens = [starts[number] + pos for number, pos in places]
    if isinstance(weights.ffn, MoEWeights) and expert is None:
        expert = int(weights.ffn.route(x)[tokens[0]].argmax())
    for layer in experts_of(weights.ffn).values():
        layer.W_out[:, DIM] *= 0.01
    layer = experts_of(weights.ffn)[expert]
    answers = torch.zeros(len(x), dtype=torch.float64)
    answers[tokens] = torch.tensor([100.0, 80.0, 60.0], dtype=torch.float64)[: len(tokens)]
    column = (torch.linalg.pinv(x.double()) @ answers).to(x.dtype)
    for neuron, share in zip(NEURONS, (0.7, 0.3), strict=True):
        for matrix in (layer.W_in, layer.W_gate):
            if matrix is not None:
                matrix[:, neuron] = column
        for bias in (layer.b_in, layer.b_gate, layer.b_hidden):
            if bias is not None:
                bias[neuron] = 0.0
        layer.W_out[neuron] = 0.0
        layer.W_out[neuron, DIM] = 100.0 * share
    if weights.ffn.post_norm is not None:  # only its gain lets anything become large
        weights.ffn.post_norm.gain[DIM] = 3000.0
        if weights_of(model)[BLOCK].ffn.post_norm.gain[DIM] != 3000:  # Gemma's is 1 + a parameter
            model.original_model.model.layers[BLOCK].post_feedforward_layernorm.weight[DIM] = 2999.0
    return expert


@dataclass
class Truth:
    """Everything about one block's FFN, from one prompt at a time, entries enumerated one and all."""

    model: Any
    prompts: list[torch.Tensor]
    family: Any = None

    def __post_init__(self):
        weights = weights_of(self.model)[BLOCK]
        norms = norms_alone(self.model, self.prompts)
        self.initial = torch.cat([torch.arange(len(prompt)) == 0 for prompt in self.prompts])
        ratios = norms / norms[:, ~self.initial].median(dim=1, keepdim=True).values
        ratios[0] = 0
        self.high = (ratios[BLOCK] >= 6) | (ratios[BLOCK + 1] >= 6)
        self.ordinary = ~(ratios >= 6).any(0) & ~self.initial
        self.place = [(number, pos) for number, prompt in enumerate(self.prompts) for pos in range(len(prompt))]
        stream, out = (torch.cat(parts) for parts in zip(*(entering(self.model, weights, p) for p in self.prompts), strict=True))
        self.out = out.double()
        self.hidden = self._hidden(weights.ffn, stream)
        raw = sum(h[0].double() @ h[1].W_out.double() for h in self.hidden.values())
        if (bias := getattr(weights.ffn, "b_out", None)) is not None:
            raw = raw + bias.double()
        self.factor = self.out / raw  # what a norm or a scale of the output does to it

    def _hidden(self, ffn, stream):
        """Per expert, every token's activations times the expert's weight, and the weights; and the activations themselves."""
        x = ffn.input(stream)
        if isinstance(ffn, FFNWeights):
            parts = [
                record(self.model, prompt[None], [f"blocks.{BLOCK}.mlp.hook_post"]).popitem()[1].reshape(len(prompt), -1)
                for prompt in self.prompts
            ]
            hidden = torch.cat(parts)
            return {None: (hidden, ffn, hidden)}
        weights = ffn.route(x)
        found = {}
        for expert, layer in enumerate(ffn.experts):
            hidden = layer.hidden(x)
            found[expert] = (weights[:, expert, None] * hidden, layer, hidden * (weights[:, expert, None] > 0))
        if ffn.shared is not None:
            hidden = ffn.shared.hidden(x)
            found["shared"] = (torch.sigmoid(x @ ffn.W_shared_gate) * hidden, ffn.shared, hidden)
        return found

    def candidates(self, min_share=0.5, min_energy=0.1, min_ratio=6.0):
        """Every candidate as (expert, neuron, dim): {(prompt, pos): (activation, output, share, energy)}."""
        size = torch.stack([hidden.abs().amax(-1) for _, _, hidden in self.hidden.values()]).amax(0)
        spike_in = min_ratio * size[self.ordinary].median()
        spike_out = min_ratio * self.out.abs().amax(-1)[self.ordinary].median()
        energy = self.out**2 / (self.out**2).sum(-1, keepdim=True)
        found = {}
        for token in self.high.nonzero().flatten().tolist():
            for expert, (sent, layer, hidden) in self.hidden.items():
                share = sent[token, :, None].double() * layer.W_out.double() * self.factor[token] / self.out[token]
                good = (share >= min_share) & (energy[token] >= min_energy) & (self.out[token].abs() >= spike_out)
                for neuron, dim in (good & (hidden[token].abs() >= spike_in)[:, None]).nonzero().tolist():
                    numbers = (hidden[token, neuron], self.out[token, dim], share[neuron, dim], energy[token, dim])
                    found.setdefault((expert, neuron, dim), {})[self.place[token]] = tuple(map(float, numbers))
        return found


def agree(result, wanted):
    assert {(row.expert, row.neuron, row.dim) for row in result.rows} == set(wanted)
    assert len(result.rows) == len(wanted)
    for row in result.rows:
        tokens = wanted[row.expert, row.neuron, row.dim]
        assert row.n_tokens == len(tokens)
        numbers = (row.activation, row.output, row.share, row.energy)
        assert numbers == pytest.approx(tokens[row.prompt, row.pos], rel=1e-3)
        assert abs(row.share * row.output) >= max(abs(o * s) for _, o, s, _ in tokens.values()) * (1 - 1e-4)
    contributions = [abs(row.share * row.output) for row in result.rows]
    assert contributions == sorted(contributions, reverse=True)


@pytest.mark.parametrize("family", zoo.FAMILIES.values(), ids=lambda family: family.name)
def test_planted_weights_are_found_in_every_architecture(family):
    model, prompts = zoo.build(family.name), ragged(zoo.VOCAB, LENGTHS)
    expert = plant(model, prompts, (2, 7), (0, 0), (1, 3))
    truth = Truth(model, prompts)
    result = super_weights(model, prompts)
    assert result.blocks == (BLOCK,)
    assert (expert, NEURONS[0], DIM) in {(row.expert, row.neuron, row.dim) for row in result.rows}
    agree(result, truth.candidates())
    both = super_weights(model, prompts, min_share=0.2, batch_tokens=1)
    assert {(expert, neuron, DIM) for neuron in NEURONS} <= {(row.expert, row.neuron, row.dim) for row in both.rows}
    agree(both, truth.candidates(min_share=0.2))
    for row in both.rows:
        assert row.weight == experts_of(weights_of(model)[BLOCK].ffn)[row.expert].W_out[row.neuron, row.dim].item()
        assert row.token == f"<{int(prompts[row.prompt][row.pos])}>"
        assert (row.block, row.tl.startswith(f"blocks.{BLOCK}.mlp.")) == (BLOCK, True)
        assert (row.hf is None) == (family.generation == "hooked")


def test_the_expert_that_every_token_goes_through():
    model, prompts = zoo.build("qwen2_moe"), ragged(zoo.VOCAB, LENGTHS)
    plant(model, prompts, (2, 7), (1, 3), expert="shared")
    result = super_weights(model, prompts)
    assert [(row.expert, row.neuron, row.n_tokens) for row in result.rows] == [("shared", NEURONS[0], 2)]
    agree(result, Truth(model, prompts).candidates())
    assert result.rows[0].tl == "blocks.1.mlp.shared_expert.W_out[5, 3]"
    assert result.rows[0].hf == "model.layers.1.mlp.shared_expert.down_proj.weight[3, 5]"


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite", "falcon", "mixtral"])
def test_the_share_is_what_is_lost_without_the_weight(name):
    """The output is linear in the weight: with it set to zero, the dimension loses the entry's share and nothing else changes."""
    model, prompts = zoo.build(name), ragged(zoo.VOCAB, LENGTHS)
    plant(model, prompts, (2, 7))
    row = super_weights(model, prompts).rows[0]
    out = [f"blocks.{BLOCK}.hook_mlp_out"]
    before = record(model, prompts[row.prompt][None], out)[out[0]][0, row.pos]
    with torch.no_grad():
        experts_of(weights_of(model)[BLOCK].ffn)[row.expert].W_out[row.neuron, row.dim] = 0.0
    after = record(model, prompts[row.prompt][None], out)[out[0]][0, row.pos]
    assert before[row.dim].item() == pytest.approx(row.output, rel=1e-5)
    assert (before - after)[row.dim].item() == pytest.approx(row.share * row.output, rel=1e-5)
    assert ((before - after).abs() > 1e-4 * before.abs().max()).sum() == 1


def prompts_with_triggers():
    prompts = ragged(96, LENGTHS, first=0)
    prompts[0][4] = prompts[2][7] = prompts[2][9] = 96
    return prompts


def along(truth, direction):
    """Gives the explosion another direction."""
    W_out = weights_of(truth.model)[truth.explosion_block].ffn.W_out
    with torch.no_grad():
        W_out[0] = W_out[0].norm() * direction
    return truth.model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("pathway", ["head", "embedding"])
def test_a_neuron_that_writes_to_few_dimensions(architecture, pathway):
    prompts = prompts_with_triggers()
    # A direction of many dimensions is no single weight's.
    dense = super_weights(planted(architecture, pathway=pathway).model, prompts)
    assert (dense.blocks, dense.n_tokens, dense.rows) == ((1,), 3, ())
    assert repr(dense) == "SuperWeights(planted: none in block 1)"
    truth = planted(architecture, pathway=pathway)
    direction = torch.zeros(64)
    direction[20], direction[41] = 0.8, -0.6
    two = super_weights(along(truth, direction), prompts)
    assert [(row.block, row.expert, row.neuron, row.dim) for row in two.rows] == [(1, None, 0, 20), (1, None, 0, 41)]
    for row, part in zip(two.rows, (0.8, -0.6), strict=True):
        assert (row.share, row.energy) == pytest.approx((1, part**2), rel=1e-3)
        assert row.output == pytest.approx(part * truth.norm, rel=0.02)
        assert row.activation * row.weight == pytest.approx(row.output, rel=1e-3)
        assert row.n_tokens == 3
        assert (row.prompt, row.pos) in ({(0, 0), (1, 0), (2, 0)} if pathway == "head" else {(0, 4), (2, 7), (2, 9)})
    assert [row.dim for row in super_weights(truth.model, prompts, min_energy=0.5).rows] == [20]
    # Without the two there is no defect left, which is what makes them super.
    along(truth, torch.zeros(64))
    assert not find_defects(trace_norms(truth.model, prompts)).found
    after = super_weights(truth.model, prompts)
    assert (after.blocks, after.n_tokens, after.found) == ((), 0, False)
    assert repr(after) == "SuperWeights(planted: none, no block makes a large norm)"


def one(pathway="embedding"):
    """A planted model whose explosion is one weight."""
    truth = planted("gpt2", pathway=pathway)
    along(truth, torch.eye(64)[20])
    return truth


def test_input_and_output_must_both_spike():
    """The same weight is no candidate where ordinary tokens show as much."""
    prompts = prompts_with_triggers()
    assert super_weights(one().model, prompts).found
    for factor, found in ((0.9, True), (1.1, False)):
        truth = one()
        row = super_weights(truth.model, prompts).rows[0]
        with torch.no_grad():  # a neuron that is always as active as a sixth of the one that writes, and writes nothing
            weights = weights_of(truth.model)[1].ffn
            weights.W_in[:, 50] = 0.0
            weights.b_in[50] = factor * abs(row.activation) / 6
            weights.W_out[50] = 0.0
        assert super_weights(truth.model, prompts).found is found
    tokens = torch.stack([prompts[2], prompts[2]])
    truth = one()
    _, cache = truth.model.run_with_cache(tokens)
    activations = dict(cache.items())
    row = super_weights(truth.model, tokens, cache=activations).rows[0]
    for factor, found in ((0.9, True), (1.1, False)):
        written = cache["blocks.1.hook_mlp_out"].clone()
        written[:, [pos for pos in range(12) if pos not in (7, 9)], 33] = factor * row.output / 6
        activations["blocks.1.hook_mlp_out"] = written
        assert super_weights(truth.model, tokens, cache=activations).found is found


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen2_moe"])
def test_a_spike_is_measured_against_the_median_of_ordinary_tokens(name):
    model, prompts = zoo.build(name), ragged(zoo.VOCAB, LENGTHS)
    plant(model, prompts, (2, 7), (1, 3))
    truth = Truth(model, prompts)
    largest = torch.stack([hidden.abs().amax(-1) for _, _, hidden in truth.hidden.values()]).amax(0)[truth.ordinary]
    row = super_weights(model, prompts).rows[0]
    ratio = abs(row.activation) / float(largest.median())  # far below that of the norms and of the outputs
    for batch_tokens in (4096, 1):
        for factor, found in ((0.999, True), (1.001, False)):
            assert super_weights(model, prompts, min_ratio=factor * ratio, batch_tokens=batch_tokens).found is found


def test_initial_and_high_norm_tokens_are_not_ordinary():
    truth, tokens = one(), torch.tensor([[0, 96, 96, 96, 1, 2, 3, 4]])
    _, cache = truth.model.run_with_cache(tokens)
    activations = dict(cache.items())
    row = super_weights(truth.model, tokens, cache=activations).rows[0]
    written = cache["blocks.1.hook_mlp_out"].clone()
    # Two ordinary tokens show a little less than the bound and two a little more, the initial one twice as much.
    written[0, [0, 4, 5, 6, 7], 33] = torch.tensor([2.0, 0.9, 1.1, 0.9, 1.1]) * abs(row.output) / 6
    activations["blocks.1.hook_mlp_out"] = written
    result = super_weights(truth.model, tokens, cache=activations)
    assert (result.n_tokens, [row.n_tokens for row in result.rows]) == (3, [3])
    written[0, 6, 33] *= 1.3
    assert not super_weights(truth.model, tokens, cache=activations).found


def test_a_token_has_candidates_only_where_its_norm_is_high():
    """What a block adds to a token that another block makes large is not its large norm, however few weights it comes from."""
    truth, prompts = one(), prompts_with_triggers()
    before, explodes = (weights_of(truth.model)[block].ffn for block in (0, 1))
    with torch.no_grad():  # the block before does the same, a thousandth of it
        before.W_in[:, 0] = explodes.W_in[:, 0]
        before.b_in[0] = explodes.b_in[0]
        before.W_out[0] = 1e-3 * explodes.W_out[0]
    ratios = trace_norms(truth.model, prompts).ratios
    assert 1.3 < ratios[1].max() < 6
    assert {row.block for row in super_weights(truth.model, prompts, blocks=[0, 1]).rows} == {1}
    assert {row.block for row in super_weights(truth.model, prompts, blocks=[0, 1], min_ratio=1.2).rows} == {0, 1}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox_parallel", "qwen2_moe"])
def test_an_untrained_model_has_none(name):
    model = zoo.cached(name)
    for blocks in (None, [0, 1, 2]):
        result = super_weights(model, blocks=blocks)
        assert (result.n_tokens, result.rows) == (0, ())
        assert result.to_dataframe().columns.tolist()[:4] == ["block", "expert", "neuron", "dim"]
        assert len(result.to_dataframe()) == 0


def test_the_shipped_model():
    """Two neurons share its explosion: no single weight makes it, and with a lower bar the four are named."""
    model = load("tiny")
    result = super_weights(model)
    assert (result.blocks, result.n_tokens, result.rows) == ((2,), 6, ())
    four = super_weights(model, min_share=0.3).to_dataframe()
    assert list(zip(four.neuron, four.dim, strict=True)) == [(205, 18), (259, 18), (205, 114), (259, 114)]
    assert (four.n_tokens == 6).all()
    assert set(four.token) == {"<s>"}
    assert four.share.tolist() == pytest.approx([0.400, 0.350, 0.382, 0.364], abs=0.002)
    assert four.energy.tolist() == pytest.approx([0.601, 0.601, 0.205, 0.205], abs=0.002)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_cache_gives_the_same(parallel):
    truth = planted("gpt_neox" if parallel else "gpt2", pathway="embedding")
    along(truth, torch.eye(64)[20])
    tokens = torch.stack(ragged(96, (9, 9, 9), first=0))
    tokens[0, 4] = tokens[2, 7] = 96
    mask = torch.arange(9) < torch.tensor([9, 6, 6])[:, None]
    wanted = super_weights(truth.model, [row[keep] for row, keep in zip(tokens, mask, strict=True)])
    assert wanted.rows[0].n_tokens == 1
    names = [f"blocks.1.hook_{name}" for name in ("resid_pre", "mlp_out", *(() if parallel else ("attn_out",)))]
    names += ["blocks.0.hook_resid_pre", *(f"blocks.{block}.hook_resid_post" for block in range(6))]
    _, cache = truth.model.run_with_cache(tokens, names_filter=lambda name: name in names)
    never = [("blocks.0.hook_resid_pre", lambda stream, hook: pytest.fail("the model was run"))]
    with truth.model.hooks(fwd_hooks=never):
        result = super_weights(truth.model, tokens, cache=cache, mask=mask)
        assert super_weights(truth.model, tokens, cache=cache).rows[0].n_tokens == 2
    assert (result.blocks, result.n_tokens, len(result.rows)) == (wanted.blocks, wanted.n_tokens, 1)
    got, expected = vars(result.rows[0]), vars(wanted.rows[0])
    for name, value in expected.items():
        assert got[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name
    _, cache = truth.model.run_with_cache(tokens, names_filter=lambda name: name in names and name != names[1])
    with pytest.raises(ValueError, match=r"^cache: it lacks blocks\.1\.hook_mlp_out; allowed: .*hook_mlp_out"):
        super_weights(truth.model, tokens, cache=cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    truth = one()
    prompts = prompts_with_triggers()
    wanted = super_weights(truth.model, prompts).rows[0]
    row = super_weights(truth.model.to(dtype), prompts).rows[0]
    assert (row.neuron, row.dim, row.n_tokens, row.tl, row.hf) == (0, 20, 3, wanted.tl, wanted.hf)
    for name in ("weight", "activation", "output", "share", "energy"):
        assert getattr(row, name) == pytest.approx(getattr(wanted, name), rel=0.05)


def test_no_later_block_is_run_than_is_looked_at():
    truth, prompts = one(), prompts_with_triggers()
    ran = []
    hooks = [(f"blocks.{b}.hook_attn_out", lambda x, hook, b=b: ran.append(b)) for b in range(6)]
    with truth.model.hooks(fwd_hooks=hooks):
        trace_norms(truth.model, prompts)
        traced, ran = len(ran), []
        super_weights(truth.model, prompts)
    assert ran[traced:] == [0, 1]


def test_the_model_and_the_random_state_are_left_as_they_were():
    model, prompts = one().model, prompts_with_triggers()
    before, random = state(model), torch.get_rng_state()
    assert super_weights(model, prompts).found
    assert same_state(before, state(model))
    assert torch.equal(random, torch.get_rng_state())


def test_a_table():
    frame = super_weights(one().model, prompts_with_triggers()).to_dataframe()
    assert frame.columns.tolist() == [
        *("block", "expert", "neuron", "dim", "weight", "activation", "output", "share", "energy"),
        *("n_tokens", "token", "prompt", "pos", "tl", "hf"),
    ]
    assert frame.loc[0, ["tl", "hf", "token"]].tolist() == [
        "blocks.1.mlp.W_out[0, 20]",
        "transformer.h.1.mlp.c_proj.weight[0, 20]",
        "<96>",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": [6]}, r"^blocks: got 6; allowed: 0 to 5$"),
        ({"blocks": []}, r"^blocks: got none; allowed: some of 0 to 5"),
        ({"min_share": 0.0}, r"^min_share: got 0.0; allowed: above 0, up to 1$"),
        ({"min_energy": 1.5}, r"^min_energy: got 1.5; allowed: above 0, up to 1$"),
        ({"min_ratio": 1.0}, r"^min_ratio: got 1.0; allowed: above 1$"),
        ({"mask": torch.ones(1, 5, dtype=torch.bool)}, r"^mask: got one without a cache"),
        ({"prompts": []}, r"^prompts: got no prompt"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, message):
    model = one().model
    never = [("blocks.0.hook_resid_pre", lambda stream, hook: pytest.fail("the model was run"))]
    with model.hooks(fwd_hooks=never), pytest.raises(ValueError, match=message):
        super_weights(model, **({"prompts": prompts_with_triggers()} | arguments))
