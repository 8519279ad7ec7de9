"""The table of all blocks: measured reference, folders, both TransformerLens generations."""

import numpy as np
import pytest
import torch
import zoo
from shared import planted
from tokenizer import save_folder

import sd_lens
from sd_lens.linear.directions import directions_of
from sd_lens.linear.measured import measure_inputs, measure_router
from sd_lens.models.loading import load, weights_of
from sd_lens.spectrum import block_directions, measure_reference
from sd_lens.tracing.prompts import BUILT_IN_PROMPTS, default_prompts


def _assert_same(one, other, rel=1e-5):
    assert len(one.rows) == len(other.rows)
    for a, b in zip(one.rows, other.rows, strict=True):
        assert (a.block, a.part, a.converged) == (b.block, b.part, b.converged)
        for name in ("sigma1", "sigma2", "angle_deg", "eigenvector_angle_deg", "residual"):
            slack = 1e-4 if name == "sigma2" else 2e-3 if "angle" in name or name == "residual" else 0
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=rel, abs=slack), (a.block, a.part, name)
        if a.converged:
            assert a.eigenvalue.real == pytest.approx(b.eigenvalue.real, rel=1e-3, abs=1e-4)
            assert abs(a.eigenvalue.imag) == pytest.approx(abs(b.eigenvalue.imag), rel=1e-3, abs=1e-4)


def test_a_models_reference_is_measured(planted_model):
    prompts = torch.arange(30).reshape(3, 10)
    if planted_model.trigger_token is not None:
        prompts[:, 4] = planted_model.trigger_token
    table = block_directions(planted_model.model, prompts=prompts)
    assert table.reference_source == "measured"
    assert float((table.reference @ planted_model.direction).abs()) == pytest.approx(1, abs=1e-4)
    assert table.row(planted_model.explosion_block).angle_deg < 2
    decay = table.row(planted_model.decay_block)
    assert decay.eigenvalue.real == pytest.approx(planted_model.eigenvalue, rel=0.01)
    assert decay.balance == pytest.approx(decay.eigenvalue.real * 8 / planted_model.norm, rel=0.02)
    assert f"is block {planted_model.decay_block}'s" in table.sentence()


def test_the_shipped_model_needs_no_prompts():
    table = block_directions(load("tiny"))
    assert (table.reference_source, table.model_name, table.n_blocks) == ("measured", "tiny", 6)
    assert table.row(2).angle_deg < 20
    assert table.row(2, "ffn").angle_deg < 7
    assert min(row.angle_deg for row in table.rows if row.part == "block" and row.block != 2) > 60
    assert table.sentence().startswith(
        "The largest singular value stands out most in block 2: 7.07, 2.04 times the second; its left"
    )


def test_a_model_without_a_tokenizer_is_measured_on_random_tokens():
    for architecture in ("llama", "gpt2"):
        assert block_directions(planted(architecture).model, blocks=[1]).reference_source == "measured"


def test_built_in_prompts_are_cut_to_a_short_context(tmp_path):
    save_folder("llama", tmp_path)
    model = load(tmp_path)
    prompts = default_prompts(model)
    assert max(len(prompt) for prompt in prompts) == zoo.CONTEXT
    assert len(prompts) == len(BUILT_IN_PROMPTS)
    assert block_directions(model, blocks=[0]).reference_source == "block 0"


def test_norms_are_measured_where_prompts_are_given_with_a_direction(planted_model):
    prompts = torch.arange(30).reshape(3, 10)
    if planted_model.trigger_token is not None:
        prompts[:, 4] = planted_model.trigger_token
    decay = planted_model.decay_block
    options = {"blocks": [decay]}
    given = block_directions(planted_model.model, planted_model.direction, prompts=prompts, **options)
    assert given.reference_source == "given"
    assert given.row(decay).balance == pytest.approx(given.row(decay).eigenvalue.real * 8 / planted_model.norm, rel=0.02)
    assert block_directions(planted_model.model, planted_model.direction, **options).row(decay).balance is None


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    "options",
    [{"blocks": [9]}, {"inputs": "data"}, {"estimator": "x"}, {"direction": torch.ones(3)}, {"estimator": "sampled", "samples": 3}],
    ids=str,
)
def test_bad_options_are_refused_before_anything_is_run(options, monkeypatch):
    monkeypatch.setattr("sd_lens.spectrum.measure_reference", lambda *_, **__: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=f"^{next(reversed(options))}: got"):
        block_directions(zoo.cached("llama"), prompts=zoo.tokens(zoo.cached("llama")), **options)


def test_without_high_norm_tokens_it_is_the_most_singular_block():
    table = block_directions(zoo.cached("llama"))
    assert measure_reference(zoo.cached("llama")) is None
    blocks = [row for row in table.rows if row.part == "block"]
    assert table.reference_source == f"block {max(blocks, key=lambda row: row.gap).block}"
    assert table.rows == directions_of(weights_of(zoo.cached("llama"))).rows


def test_weights_alone_from_the_shipped_folder_are_those_of_the_model():
    folder, live = block_directions("tiny"), directions_of(weights_of(load("tiny")))
    assert folder.rows == live.rows
    assert torch.equal(folder.reference, live.reference)
    assert folder.model_name == "tiny"


@pytest.mark.parametrize("name", ["llama_bias", "gpt2", "gpt_neox_parallel", "gemma2", "mixtral", "olmo2", "phi"])
def test_a_folder_gives_the_models_table(name, tmp_path):
    save_folder(name, tmp_path)
    direction = torch.linspace(-1, 1, zoo.D_MODEL)
    assert block_directions(tmp_path, direction).rows == block_directions(load(tmp_path), direction).rows


def test_the_shipped_models_table():
    # The same numbers on every TransformerLens: measured once with each, from the files alone.
    known = {  # block: sigma1 and gap of the block, angle of its FFN's leading left singular vector to block 2's
        0: (1.8333, 1.073, 87.27),
        1: (3.4036, 1.075, 36.42),
        2: (7.0738, 2.041, 15.62),
        3: (5.5931, 1.051, 81.44),
        4: (6.5498, 1.078, 84.61),
        5: (9.5997, 1.414, 69.72),
    }
    table = block_directions("tiny")
    for block, (sigma1, gap, angle) in known.items():
        row = table.row(block)
        assert (row.sigma1, row.gap) == (pytest.approx(sigma1, abs=1e-4), pytest.approx(gap, abs=2e-3))
        assert table.row(block, "ffn").angle_deg == pytest.approx(angle, abs=0.02)
    assert table.row(2, "ffn").eigenvalue.real == pytest.approx(2.156, abs=1e-3)


HOOKED = [
    name
    for name in ("llama", "qwen2", "gpt2", "gpt_neox_parallel", "gpt_neox_sequential", "opt", "mixtral")
    if f"hooked_{name}" in zoo.FAMILIES
]


@pytest.mark.skipif(not HOOKED, reason="this TransformerLens has no HookedTransformer to compare with")
@pytest.mark.parametrize("name", HOOKED)
def test_both_generations_give_the_same_table_for_the_same_weights(name):
    bridge, hooked = zoo.build(name), zoo.build(f"hooked_{name}")
    _copy_weights(bridge, hooked)
    direction = torch.linspace(-1, 1, zoo.D_MODEL)
    _assert_same(block_directions(bridge, direction), block_directions(hooked, direction))


@torch.no_grad()
def _copy_weights(bridge, hooked):
    """Puts the weights that a `HookedTransformer` has into a bridge's Hugging Face parameters, through its views of them."""
    for target, source in zip(weights_of(bridge), weights_of(hooked), strict=True):
        theirs = dict(source.named_tensors())
        if "ffn.b_hidden" in theirs:  # what a HookedTransformer adds behind the product has no counterpart on a bridge
            theirs.pop("ffn.b_hidden").zero_()
        for name, tensor in target.named_tensors():
            other = theirs.pop(name, None)
            tensor.copy_(torch.zeros_like(tensor) if other is None else other)
        for tensor in theirs.values():
            tensor.zero_()


def test_measured_inputs_and_router_weights():
    model = zoo.cached("mixtral")
    prompts = zoo.tokens(model)
    direction = torch.ones(zoo.D_MODEL)
    table = block_directions(model, direction, prompts=prompts, inputs="measured", blocks=[2, 0])
    by_hand = directions_of(
        weights_of(model),
        direction,
        inputs=measure_inputs(model, prompts),
        router=measure_router(model, prompts),
        blocks=[2, 0],
    )
    assert table.rows == by_hand.rows
    assert table.rows != block_directions(model, direction, blocks=[2, 0]).rows
    assert table.notes[0] == "FFN fitted to a Gaussian with diagonal covariance, measured on 24 tokens"


@pytest.mark.parametrize(
    "options", [{"prompts": torch.ones(1, 3, dtype=torch.long)}, {"inputs": "measured"}], ids=["prompts", "inputs"]
)
@pytest.mark.parametrize("source", ["tiny", weights_of("tiny")], ids=["folder", "weights"])
def test_weights_cannot_be_measured(source, options):
    with pytest.raises(ValueError, match="model: got weights only, which cannot be measured"):
        block_directions(source, **options)


def test_the_sampled_estimator_tells_the_same_story(planted_model):
    if planted_model.pathway == "embedding":
        return  # the same weights but for the embedding
    exact, sampled = (
        directions_of(weights_of(planted_model.model), planted_model.direction, blocks=[1, 4], **options)
        for options in ({}, {"estimator": "sampled", "samples": 20_000})
    )
    for block in (1, 4):
        assert sampled.row(block).angle_deg == pytest.approx(exact.row(block).angle_deg, abs=1)
        assert sampled.row(block, "ffn").sigma1 == pytest.approx(exact.row(block, "ffn").sigma1, rel=0.1)
    assert sampled.row(4).eigenvalue.real == pytest.approx(exact.row(4).eigenvalue.real, rel=0.1)
    assert "FFN fit: sampled (20000 samples, seed 0)" in sampled.notes


def test_public_names():
    assert sd_lens.block_directions is block_directions
    frame = block_directions("tiny", blocks=[2]).to_dataframe()
    assert np.isfinite(frame.gap).all()
