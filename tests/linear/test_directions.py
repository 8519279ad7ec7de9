import dataclasses
import gc
import weakref

import jaxtyping
import numpy as np
import pytest
import torch
import zoo

from sd_lens.linear.directions import directions_of
from sd_lens.linear.inputs import GaussianInput
from sd_lens.linear.linearize import PostScales, linearize
from sd_lens.linear.parts import PARTS
from sd_lens.models.activations import Activation
from sd_lens.models.loading import weights_of
from sd_lens.models.weights import AttentionWeights, BlockWeights, FFNWeights, ModelWeights


class Kept(ModelWeights):
    """Blocks of a model that has no name."""

    def __init__(self, weights):
        self._weights = weights

    d_model = property(lambda self: self._weights.d_model)

    def __len__(self):
        return len(self._weights)

    def _read(self, block):
        return dataclasses.replace(self._weights[block])


def angle(a, b):
    """Acute angle between two vectors, or between complex lines, degrees."""
    a, b = (np.asarray(vector, dtype=complex) for vector in (a, b))
    cosine = abs(np.vdot(a, b)) / np.linalg.norm(a) / np.linalg.norm(b)
    return float(np.degrees(np.arccos(min(1.0, cosine))))


@pytest.fixture(scope="module")
def table(planted_model):
    entering = {planted_model.decay_block: planted_model.norm}
    jaxtyping.config.update("jaxtyping_disable", True)  # the type checks cost more than the products of small matrices
    try:
        return directions_of(weights_of(planted_model.model), 3.0 * planted_model.direction, norms=entering)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_the_explosion_block_sends_along_the_direction(planted_model, table):
    explosion, decay = planted_model.explosion_block, planted_model.decay_block
    assert table.row(explosion).angle_deg < 2
    assert table.row(explosion, "ffn").angle_deg < 2
    assert table.row(explosion, "ffn").sigma1 == pytest.approx(planted_model.sigma, rel=0.01)
    assert table.row(explosion).sigma1 > 3 * table.row(explosion).sigma2
    assert table.row(decay).angle_deg < 2
    for row in table.rows:
        assert row.sigma1 >= row.sigma2 > 0
        if row.part == "block" and row.block not in (explosion, decay):
            assert row.angle_deg > 60
        if row.part == "attention":
            assert row.angle_deg > 60  # nothing was planted there
    assert [(row.block, row.part) for row in table.rows] == [(block, part) for block in range(6) for part in PARTS]


def test_the_decay_block_cancels_it(planted_model, table):
    row = table.row(planted_model.decay_block)
    assert row.eigenvalue.real == pytest.approx(planted_model.eigenvalue, rel=0.01)
    assert abs(row.eigenvalue.imag) < 1e-3
    assert row.eigenvector_angle_deg < 2
    assert row.residual < 1e-3 * abs(row.eigenvalue)
    assert row.balance == pytest.approx(row.eigenvalue.real * 64**0.5 / planted_model.norm, rel=1e-6)
    for other in table.rows:
        if other.block != planted_model.decay_block:
            assert other.balance is None
            assert abs(other.eigenvalue) < 10 or other.block == planted_model.explosion_block


def test_the_reference(planted_model, table):
    assert (table.model_name, table.reference_source) == ("planted", "given")
    assert float((table.reference - planted_model.direction).norm()) < 1e-6
    assert repr(table).startswith("BlockDirections(planted: reference given, nearest block ")
    frame = table.to_dataframe()
    assert len(frame) == 18
    row = frame[(frame.block == planted_model.decay_block) & (frame.part == "block")].iloc[0]
    assert row.eigenvalue == table.row(planted_model.decay_block).eigenvalue
    assert row.balance == table.row(planted_model.decay_block).balance
    assert np.isnan(frame.balance.iloc[0])


@pytest.mark.usefixtures("as_users_run_it")
def test_without_a_direction_it_is_that_of_the_most_singular_block(planted_model):
    special = (planted_model.explosion_block, planted_model.decay_block)
    table = directions_of(weights_of(planted_model.model), blocks=[0, *special])
    assert table.reference_source in [f"block {block}" for block in special]
    assert angle(table.reference, planted_model.direction) < 2
    assert float(table.reference.norm()) == pytest.approx(1, abs=1e-6)
    assert {row.block for row in table.rows if row.part == "block" and row.angle_deg < 3} == set(special)


def dense(block_map, part):
    return {"attention": block_map.attention, "ffn": block_map.ffn, "block": block_map.update}[part].to_dense().double().numpy()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox_parallel", "qwen3"])
def test_numbers_are_those_of_dense_decompositions(family):
    model = zoo.cached(family)
    direction = torch.randn(zoo.D_MODEL, generator=torch.Generator().manual_seed(0))
    for table, name in (
        (directions_of(weights_of(model), direction, blocks=[2, 0], norms={2: 7.0, 0: 0.5}), str(model.cfg.model_name)),
        (directions_of(Kept(weights_of(model)), direction, blocks=(2, 0)), "weights"),
    ):
        assert table.model_name == name
        assert [row.block for row in table.rows] == [2] * 3 + [0] * 3
        for row in table.rows:
            matrix = dense(linearize(weights_of(model)[row.block]), row.part)
            u, s, _ = np.linalg.svd(np.eye(zoo.D_MODEL) + matrix)
            assert [row.sigma1, row.sigma2] == pytest.approx(s[:2].tolist(), rel=1e-5)
            assert row.angle_deg == pytest.approx(angle(u[:, 0], direction), abs=0.01 if s[0] > 1.01 * s[1] else 90)
            assert row.residual < 1e-3
            values, vectors = np.linalg.eig(matrix)
            # Every vector of a null space is an eigenvector; attention of grouped heads has a wide one.
            acting = [i for i in range(len(values)) if abs(values[i]) > 1e-5 * abs(values).max()]
            assert len(acting) == np.linalg.matrix_rank(matrix, rtol=1e-5)
            nearest = min(acting, key=lambda i: angle(vectors[:, i], direction))
            assert row.eigenvector_angle_deg == pytest.approx(angle(vectors[:, nearest], direction), abs=0.01)
            assert row.eigenvalue.real == pytest.approx(values[nearest].real, abs=1e-3)
            assert abs(row.eigenvalue.imag) == pytest.approx(abs(values[nearest].imag), abs=1e-3)
            if name == "weights":
                assert row.balance is None
            else:
                norm = {2: 7.0, 0: 0.5}[row.block]
                assert row.balance == pytest.approx(values[nearest].real * zoo.D_MODEL**0.5 / norm, abs=1e-2)


def test_two_runs_agree_to_the_bit():
    one, other = (directions_of(weights_of(zoo.cached("llama")), blocks=[1, 2]) for _ in range(2))
    assert one.rows == other.rows
    assert torch.equal(one.reference, other.reference)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"blocks": []}, "blocks: got none; allowed: at least one block"),
        ({"blocks": [3]}, "blocks: got 3; allowed: 0 to 2"),
        ({"blocks": [0, -4]}, "blocks: got -4; allowed: 0 to 2"),
        ({"direction": torch.ones(33)}, r"direction: got shape \(33,\); allowed: a tensor of shape \(32,\)"),
        ({"blocks": 1}, "blocks: got 1; allowed: a list of blocks"),
        ({"blocks": [1.0]}, "blocks: got 1.0; allowed: 0 to 2"),
        ({"direction": [1.0] * 32}, r"direction: got list; allowed: a tensor of shape \(32,\)"),
        ({"norms": {0: 0.0}}, "norms: got 0.0; allowed: positive numbers"),
        ({"norms": {7: 1.0}}, "norms: got block 7; allowed: 0 to 2"),
        ({"router": {3: torch.ones(4)}}, "router: got block 3; allowed: 0 to 2"),
        ({"estimator": "lstsq"}, "estimator: got 'lstsq'"),
        ({"estimator": "sampled", "samples": 9}, "samples: got 9; allowed: at least 2"),
        ({"inputs": "data"}, "inputs: got 'data'"),
        ({"direction": torch.zeros(32)}, "direction: got a zero or non-finite vector"),
        ({"direction": torch.full((32,), float("nan"))}, "direction: got a zero or non-finite vector"),
    ],
    ids=str,
)
def test_bad_blocks_and_directions_are_refused(options, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        directions_of(weights_of(zoo.cached("llama")), **options)


@pytest.mark.parametrize("family", ["mixtral", "gemma2", "olmo2"])
def test_the_table_says_what_it_rests_on(family):
    weights = weights_of(zoo.cached(family))
    n = len(weights)
    table = directions_of(weights, torch.ones(zoo.D_MODEL), blocks=[1, 0])
    assert table.n_blocks == n
    assert table.notes[0] == "FFN fitted to N(0, I) at the projections"
    if family == "mixtral":
        assert table.notes[1:] == ("router weights uniform over 4 experts",)
    else:
        assert [note.split(" (")[0].startswith("norms after the sublayers at scales") for note in table.notes[1:]] == [True] * 2
        assert table.notes[1].endswith("(blocks 1)")
    sampled = directions_of(
        weights, torch.ones(zoo.D_MODEL), blocks=[0], estimator="sampled", samples=200, inputs="gain", paper=True
    )
    assert sampled.notes[0] == "FFN fitted to N(0, I) before the gain and bias of the norm"
    assert sampled.notes[1] == "biases and mean subtraction left out, as in the paper"
    assert sampled.notes[-1] == "FFN fit: sampled (200 samples, seed 0)"


def test_gaussians_and_router_weights_of_each_block():
    weights = weights_of(zoo.cached("mixtral"))
    d = zoo.D_MODEL
    inputs = {block: GaussianInput(torch.full((d,), 0.1 * block), torch.ones(d)) for block in (0, 2)}
    router = {0: torch.tensor([1.0, 0.0, 0.0, 0.0]), 2: torch.tensor([0.0, 0.0, 0.0, 1.0])}
    table = directions_of(weights, torch.ones(d), blocks=[0, 2], inputs=inputs, router=router)
    for block in (0, 2):
        alone = linearize(weights[block], inputs=inputs[block], router=router[block])
        assert table.row(block, "ffn").sigma1 == pytest.approx(np.linalg.svd(np.eye(d) + dense(alone, "ffn"))[1][0], rel=1e-5)
    with pytest.raises(ValueError, match="inputs: got none for block 1; allowed: a GaussianInput for every block"):
        directions_of(weights, torch.ones(d), blocks=[0, 1], inputs=inputs)


def test_the_gap_and_what_did_not_converge():
    table = directions_of(weights_of(zoo.cached("llama")), torch.ones(32))
    frame = table.to_dataframe()
    assert frame.gap.tolist() == [row.sigma1 / row.sigma2 for row in table.rows]
    assert frame.converged.all()  # the Krylov space of so small a model is everything
    assert list(frame.columns[:6]) == ["block", "part", "sigma1", "sigma2", "gap", "angle_deg"]


@pytest.mark.parametrize("direction", [None, torch.ones(zoo.D_MODEL)])
def test_blocks_are_read_one_at_a_time_and_let_go(direction):
    alive = set()
    most = []

    class Watched(Kept):
        def _read(self, block):
            gc.collect()  # (jaxtyping's checks leave cycles behind)
            most.append(len(alive))
            found = dataclasses.replace(self._weights[block], block=block)
            copy = dataclasses.replace(found.ffn, W_out=found.ffn.W_out.clone())
            alive.add(block)
            weakref.finalize(copy.W_out, alive.discard, block)
            return dataclasses.replace(found, ffn=copy)

    directions_of(Watched(weights_of(zoo.cached("llama"))), direction)
    gc.collect()
    assert most == [0] * (3 if direction is not None else 6)
    assert not alive


def _block_with(matrix):
    """A block whose FFN is nearly the matrix: plain, with an activation that is linear."""
    d = len(matrix)
    zero = torch.zeros(1, d, 1)
    attention = AttentionWeights(zero, zero.mT, None, None, None)
    ffn = FFNWeights(torch.eye(d), matrix.float().T, None, None, None, None, Activation("other", lambda x: x), None)
    return BlockWeights(0, attention, ffn, parallel=False)


class One(Kept):
    """A model of one block."""

    def __init__(self, block):
        self._weights = [block]

    d_model = property(lambda self: self._weights[0].d_model)


@pytest.mark.parametrize(("value", "degrees"), [(-0.6, 5.0), (-0.5, 8.0), (0.5, 11.0)])
def test_an_eigenvalue_inside_the_cloud_of_the_others_is_found_where_its_vector_is_near(value, degrees):
    # No Krylov space of less than nearly the whole width resolves it; the table falls back on the dense matrix.
    d = 600
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    direction, across = basis[:, 0], basis[:, 1]
    near = np.cos(np.radians(degrees)) * direction + np.sin(np.radians(degrees)) * across
    vectors = torch.cat([near.unsqueeze(1), basis[:, 1:]], dim=1)
    core = torch.zeros(d, d, dtype=torch.float64)
    core[0, 0] = value
    core[1:, 1:] = torch.randn(d - 1, d - 1, generator=generator, dtype=torch.float64) / d**0.5
    table = directions_of(One(_block_with(vectors @ core @ torch.linalg.inv(vectors))), direction)
    row = table.row(0, "ffn")
    assert row.converged
    assert row.eigenvalue.real == pytest.approx(value, abs=1e-3)
    assert row.eigenvector_angle_deg == pytest.approx(degrees, abs=0.1)
    wanted = "The most negative eigenvalue" if value < 0 else "No negative eigenvalue was found"
    assert table.sentences()[1].startswith(wanted)


def test_a_wide_map_without_a_near_eigenvector_says_that_none_was_resolved():
    d = 600
    noise = torch.randn(d, d, generator=torch.Generator().manual_seed(1)) / d**0.5
    table = directions_of(One(_block_with(noise)), torch.linspace(-1, 1, d))
    assert not table.row(0, "ffn").converged
    assert table.sentences()[1].startswith("No negative eigenvalue was found")


def test_scales_of_norms_after_the_sublayers_can_be_given():
    weights = weights_of(zoo.cached("gemma2"))
    scales = PostScales(0.5, 2.0)
    table = directions_of(weights, torch.ones(32), blocks=[1], post_scales={1: scales})
    alone = linearize(weights[1], post_scales=scales)
    assert table.row(1, "ffn").sigma1 == pytest.approx(np.linalg.svd(np.eye(32) + dense(alone, "ffn"))[1][0], rel=1e-4)
    assert "norms after the sublayers at scales 0.5 and 2 (given)" in table.notes


def test_a_reference_of_some_blocks_says_so():
    table = directions_of(weights_of(zoo.cached("llama")), blocks=[2, 0])
    assert table.notes[-1] == "the reference is of the most singular of the blocks chosen (2, 0)"


def test_rows_that_are_not_in_the_table():
    table = directions_of(weights_of(zoo.cached("llama")), torch.ones(32), blocks=[1])
    assert table.row(1, "ffn").part == "ffn"
    for block, part in ((0, "block"), (1, "mlp")):
        with pytest.raises(ValueError, match=rf"^block, part: got {block}, '{part}'; allowed: .*attention, ffn, block"):
            table.row(block, part)
