"""Lineage: angles, chance and trees against independent computations, and our own trained family."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

from sd_lens.applications import lineage, signing
from sd_lens.applications.chance import SELDOM, chance_angle, chance_probability
from sd_lens.applications.lineage import compare, signature_distances
from sd_lens.applications.signature import Signature, with_sign
from sd_lens.applications.signing import signature
from sd_lens.models.loading import load
from sd_lens.models.planted import planted

FAMILY = Path(__file__).parents[2] / "training" / "family"


def made(direction, name="made", **values):
    """A signature of a given direction; of none where it is a width."""
    found = isinstance(direction, torch.Tensor)
    return Signature(
        direction=with_sign(direction) if found else None,
        model_name=name,
        d_model=len(direction) if found else direction,
        n_blocks=2,
        method=values.pop("method", "weights"),
        block=1 if found else None,
        because="" if found else "nothing stands out",
        **values,
    )


def random_directions(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("d", [2, 3, 8, 128])
def test_the_chance_level_is_that_of_random_directions(d):
    n = 100_000
    a, b = random_directions(n, d).double().numpy(), random_directions(n, d, seed=1).double().numpy()
    cosine = np.abs((a * b).sum(1)) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    sample = np.degrees(np.arccos(np.minimum(cosine, 1)))
    chance = chance_angle(d)
    assert chance.mean_deg == pytest.approx(sample.mean(), abs=4 * sample.std() / n**0.5)
    assert chance.std_deg == pytest.approx(sample.std(), rel=0.01)
    assert (sample <= chance.low_deg).mean() == pytest.approx(SELDOM, abs=4 * (SELDOM / n) ** 0.5)
    for angle in np.quantile(sample, [0.1, 0.5, 0.9]):
        assert chance_probability(float(angle), d) == pytest.approx((sample <= angle).mean(), abs=0.006)


def test_the_chance_level_has_closed_forms():
    assert chance_angle(2).mean_deg == pytest.approx(45)
    assert chance_angle(2).std_deg == pytest.approx(90 / 12**0.5)
    assert chance_angle(3).mean_deg == pytest.approx(math.degrees(1))  # the complement's density is cos φ
    assert chance_angle(3).low_deg == pytest.approx(math.degrees(math.acos(1 - SELDOM)))
    wide = chance_angle(4096)  # the complement is nearly half-normal of scale 1/√d
    assert 90 - wide.mean_deg == pytest.approx(math.degrees((2 / math.pi / 4096) ** 0.5), rel=1e-3)
    assert wide.std_deg == pytest.approx(math.degrees(((1 - 2 / math.pi) / 4096) ** 0.5), rel=1e-3)
    with pytest.raises(ValueError, match="d_model: got 1"):
        chance_angle(1)


def test_thresholds_know_the_width():
    assert [chance_angle(128).verdict(angle) for angle in (0.0, 30.0, 30.1, 70.0, 80.0, math.nan)] == [
        "same lineage",
        "same lineage",
        "undecided",
        "undecided",  # nearer than chance makes them
        "unrelated",
        "cannot be compared",
    ]
    assert chance_angle(3).verdict(10.0) == "undecided"  # chance makes so small an angle now and then
    assert chance_angle(3).verdict(61.0) == "unrelated"
    assert chance_angle(4096).verdict(86.0) == "undecided"


def test_angles_verdicts_and_reasons():
    directions = random_directions(4, 64)
    directions[1] = directions[0] / directions[0].norm() + 0.2 * directions[1] / directions[1].norm()
    wide = made(random_directions(1, 96)[0], "wide")
    found = compare([*(made(-one, f"m{i}") for i, one in enumerate(directions)), wide, made(64, "quiet")])
    unit = (directions.double() / directions.double().norm(dim=1, keepdim=True)).numpy()
    wanted = np.degrees(np.arccos(np.minimum(np.abs(unit @ unit.T), 1)))
    np.testing.assert_allclose(found.angles[:4, :4].numpy(), wanted, atol=1e-4)
    assert found.angles.diagonal()[:5].abs().max() == 0
    assert found.angles[:4, 4:].isnan().all()
    assert found.angles[5].isnan().all()
    assert found.pair("m1", "m0").verdict == "same lineage"
    assert found.pair("m2", "m3").verdict == "unrelated"
    assert found.pair("wide", "m0").because == "their widths differ (64 and 96)"
    assert found.pair("wide", "quiet").because == "no defect was found in quiet"
    assert sorted(map(sorted, found.families)) == [["m0", "m1"], ["m2"], ["m3"], ["wide"]]
    text = " ".join(found.sentences())
    for needle in (
        "4 families among 6 models",
        "quiet has no signature by weights: nothing stands out.",
        "Models of different widths",
    ):
        assert needle in text
    frame = found.to_dataframe()
    assert len(frame) == 15
    assert set(frame.verdict) == {"same lineage", "unrelated", "cannot be compared"}
    assert sorted(found.order) == list(range(6))
    with pytest.raises(ValueError, match="a, b: got 'm0', 'm9'"):
        found.pair("m0", "m9")
    none = compare([made(64, "a"), made(64, "b")])
    assert none.families == none.trees == ()
    assert none.sentences()[0] == "None of the 2 models can be compared: no defect was found in any of them."


def test_the_tree_is_average_linkage():
    found = compare([made(one, f"m{i}") for i, one in enumerate(random_directions(7, 5))])
    (tree,) = found.trees
    clusters = [{i} for i in range(7)]
    heights = []
    while len(clusters) > 1:  # by the definition: the two clusters with the least mean angle between members

        def mean(pair):
            return float(np.mean([found.angles[i, j].item() for i in pair[0] for j in pair[1]]))

        pairs = [(one, other) for k, one in enumerate(clusters) for other in clusters[:k]]
        one, other = min(pairs, key=mean)
        heights.append(mean((one, other)))
        clusters = [*(cluster for cluster in clusters if cluster not in (one, other)), one | other]
    np.testing.assert_allclose(tree.merges[:, 2].numpy(), heights, atol=1e-9)
    for cut in (heights[2] + 1e-6, heights[4] + 1e-6):
        assert len(tree.families(cut)) == 7 - sum(height < cut for height in heights)
    lines = tree.lines(found.names)
    assert lines[0] == f"{heights[-1]:.1f}°"
    assert sorted(line.split()[-1] for line in lines if line[-1] != "°") == sorted(found.names)


@pytest.mark.usefixtures("as_users_run_it")  # type checks cost more than the products of small matrices
def test_weights_with_noise_stay_in_the_family():
    models = [planted(pathway="embedding", seed=seed).model for seed in (0, 1, 0, 1)]
    generator = torch.Generator().manual_seed(2)
    for model in models[2:]:
        for parameter in model.parameters():
            parameter.data *= 1 + 0.05 * torch.randn(parameter.shape, generator=generator)
    names = ("a", "b", "child of a", "child of b")
    tokens = torch.cat([torch.arange(10), torch.tensor([96]), torch.arange(10, 20)]).unsqueeze(0)
    measured = signature_distances(models, prompts=tokens, names=names)
    assert [one.block for one in measured.signatures] == [1] * 4
    assert sorted(map(sorted, measured.families)) == [["a", "child of a"], ["b", "child of b"]]
    assert 0.1 < measured.pair("a", "child of a").angle_deg < 15
    assert measured.pair("a", "child of b").verdict == "unrelated"
    told = signature(models[2], method="weights")
    assert told.block == 1
    assert compare([measured.signatures[2], told]).pairs[0].angle_deg < 15


def test_names_tell_models_apart():
    one = random_directions(1, 8)[0]
    names = compare(
        [made(one), made(one), made(one, method="activations"), made(one, "x"), made(one, "x"), made(one, "x (2)")]
    ).names
    assert names == ("made (weights)", "made (weights) (2)", "made (activations)", "x", "x (2)", "x (2) (2)")
    mixed = compare([made(one, prompts="built-in"), made(one, method="activations", prompts="built-in")])
    assert "by activations and by weights" in mixed.notes[0]
    both = compare(
        [made(one, "a", method="activations", prompts="given"), made(one, "b", method="activations", prompts="built-in")]
    )
    assert both.notes == ("some signatures were measured on built-in prompts, others on given ones",)
    assert compare([replace(made(one), notes=("n",))]).notes == ("made: n",)


def test_directions_of_different_tokens_do_not_make_models_unrelated():
    far, near = random_directions(2, 64), torch.ones(1, 64).expand(2, -1)

    def verdict(a, b, directions=far):
        (pair,) = compare(
            [
                made(one, name, method="activations", prompts="given", positions=positions, tokens=tokens)
                for one, name, (positions, tokens) in zip(directions, "ab", (a, b), strict=True)
            ]
        ).pairs
        return pair.verdict, bool(pair.note)

    initial, later = ("initial", ("<s>",)), ("later", (".", "\\n"))
    assert verdict(initial, later) == verdict(later, initial) == ("undecided", True)
    assert verdict(initial, later, near) == ("same lineage", False)
    assert verdict(initial, ("initial", ("<|endoftext|>",))) == ("unrelated", False)  # other tokenizers, same kind
    assert verdict(later, ("later", ("Ċ",))) == ("unrelated", False)
    assert verdict(initial, ("later", (".", "<s>"))) == ("unrelated", False)
    assert verdict(("both", ("x", ".")), later) == verdict(("both", ("x",)), initial) == ("unrelated", False)
    assert verdict(initial, ("", ())) == ("unrelated", False)


@pytest.mark.usefixtures("as_users_run_it")
def test_an_ancestor_with_other_tokens_is_not_called_unrelated(family):
    early = signature(FAMILY / "step-00050")
    assert (early.positions, early.tokens) == ("later", (".",))
    found = compare([family["activations"].signatures[0], early])
    (pair,) = found.pairs
    assert pair.angle_deg == pytest.approx(87.7, abs=0.2)
    assert pair.verdict == "undecided"
    assert pair.note == "of different tokens: initial '<s>'; later '.'; their directions may differ in one lineage"
    assert str(pair).endswith(pair.note)
    assert "In 1 pair one signature is of initial tokens" in " ".join(found.sentences())


@pytest.mark.usefixtures("as_users_run_it")
def test_folders_and_files_of_one_name_are_told_apart_by_their_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(lineage, "signature", lambda item, **_: made(16, Path(item).name))
    monkeypatch.setattr(gc, "collect", lambda: 0)  # there is nothing to let go
    for place in ("x/ra/final", "y/ra/final", "x/rb/final"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").touch()
    made(random_directions(1, 16)[0], "final").save(tmp_path / "stem")
    ra, ra2, rb = (str(tmp_path / place) for place in ("x/ra/final", "y/ra/final", "x/rb/final"))
    assert signature_distances([ra, rb]).names == ("ra/final", "rb/final")
    assert signature_distances([ra, ra2, rb]).names == ("x/ra/final", "y/ra/final", "rb/final")
    assert signature_distances([ra, ra]).names == ("final", "final (2)")
    assert signature_distances([ra]).names == ("final",)
    found = signature_distances([ra, str(tmp_path / "stem"), rb])
    assert found.names == ("ra/final", "stem", "rb/final")
    assert "rb/final has no signature by weights: nothing stands out." in signature_distances([ra, rb]).sentences()


@pytest.mark.usefixtures("as_users_run_it")
def test_a_saved_signature_is_known_by_the_name_it_was_saved_under(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lineage, "signature", lambda item, **_: made(16, f"the model {item}"))
    monkeypatch.setattr(gc, "collect", lambda: 0)
    one = made(random_directions(1, 16)[0], "one")
    for name in ("x", "tiny", "half", "folder"):
        one.save(name)
    (tmp_path / "half.safetensors").unlink()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").touch()
    for name in ("x", Path("x"), "x.json", str(tmp_path / "x")):
        assert signature_distances([name]).signatures[0].content_hash == one.content_hash
    assert signature_distances(["tiny", "half", "folder"]).names == ("the model tiny", "the model half", "the model folder")
    with pytest.raises(FileNotFoundError, match="a saved signature"):
        signature_distances(["./y"])


@pytest.mark.usefixtures("as_users_run_it")
def test_models_loaded_here_are_let_go_one_by_one(monkeypatch):
    alive: list[weakref.ref] = []

    def planted_load(name, **_):
        assert all(ref() is None for ref in alive), "two models at a time"
        model = planted(n_blocks=3, decay_block=2, seed=int(name[-1])).model
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(signing, "load", planted_load)
    found = signature_distances(["seed0", "seed1", "seed0"])
    gc.collect()
    assert len(alive) == 3
    assert all(ref() is None for ref in alive)
    assert found.angles[0, 2] < 1e-3
    assert found.angles[0, 1] > 60


@pytest.mark.usefixtures("as_users_run_it")
def test_bad_input_is_named_before_any_model_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(lineage, "signature", lambda *_, **__: pytest.fail("a model ran"))
    one = made(random_directions(1, 8)[0])
    one.save(tmp_path / "one")
    edited = tmp_path / "one.json"
    edited.write_text(edited.read_text().replace('"block": 1', '"block": 0'))
    folder = tmp_path / "empty"
    folder.mkdir()
    for items, options, needle in (
        ([], {}, "items: got none"),
        ("tiny", {}, "items: got str"),
        (["tiny", str(edited)], {}, "hash mismatch"),
        (["tiny", folder], {}, "has no config.json"),
        ([one, one], {"names": ["a", "a"]}, "names: got 1 different names for 2 items"),
        ([one, one], {"names": ["a"]}, "names: got 1 different names for 2 items"),
        (["tiny"], {"method": "magic"}, "method: got 'magic'"),
        (["tiny"], {"min_ratio": 0.5}, "min_ratio: got 0.5"),
    ):
        with pytest.raises(ValueError, match=needle):
            signature_distances(items, **options)
    for missing in (tmp_path / "two.json", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError):
            signature_distances(["tiny", str(missing)])


@pytest.fixture(scope="module")
def family():
    """Our own models, measured and from weights: the shipped one, its fine-tune, another seed and that one's fine-tune."""
    folders = {"base": "tiny"} | {name: str(FAMILY / name) for name in ("fine-tuned", "other-seed", "other-seed-fine-tuned")}
    signatures: dict[str, list[Signature]] = {"activations": [], "weights": []}
    jaxtyping.config.update("jaxtyping_disable", True)  # type checks cost more than the products of small matrices
    try:
        for folder in folders.values():
            model = load(folder)  # once for both methods
            for method, found in signatures.items():
                found.append(signature(model, method=method))
        return {method: compare(found, names=list(folders)) for method, found in signatures.items()}
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("method", ["activations", "weights"])
def test_our_own_family(family, method):
    found = family[method]
    assert found.pair("base", "fine-tuned").angle_deg < 15
    assert found.pair("other-seed", "other-seed-fine-tuned").angle_deg < 15
    assert found.pair("base", "other-seed").angle_deg > 60
    verdicts = {frozenset((pair.a, pair.b)): pair.verdict for pair in found.pairs}
    for pair, verdict in verdicts.items():
        kin = pair in ({"base", "fine-tuned"}, {"other-seed", "other-seed-fine-tuned"})
        assert verdict == ("same lineage" if kin else "unrelated")
    assert sorted(map(sorted, found.families)) == [["base", "fine-tuned"], ["other-seed", "other-seed-fine-tuned"]]


def test_the_two_methods_tell_the_same_story(family):
    measured, told = family["activations"].signatures, family["weights"].signatures
    assert [one.block for one in measured] == [one.block for one in told]
    both = compare([*measured, *told], names=[f"{kind}{i}" for kind in "mt" for i in range(4)])
    assert all(both.pair(f"m{i}", f"t{i}").angle_deg < 20 for i in range(4))
    little = [any("stands out only a little" in note for note in one.notes) for one in told]
    assert little == [False, False, True, True]


@pytest.mark.usefixtures("as_users_run_it")
def test_early_in_training_there_is_nothing_to_compare():
    found = [signature(FAMILY / "step-00250", method="weights"), made(128, "quiet")]
    assert not found[0].found
    assert compare(found).pairs[0].because == "no defect was found in step-00250 or quiet"
