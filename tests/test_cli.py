"""The command line: exit codes, one line on stderr, whole files or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sd_lens import cli


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, loaded_once):
    """Runs the command in this process, in an empty folder; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sd-lens", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def assert_bad_input(result: tuple[int, str, str], *needles: str) -> None:
    code, _, err = result
    assert code == 2
    assert err.startswith("sd-lens: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for needle in needles:
        assert needle in err


def test_report_finds_the_tiny_models_explosion(run, tmp_path):
    code, out, err = run("report", "tiny", "--out", "page.html", "--json", "result.json")
    assert code == 0, err
    assert "explosion in block" in out
    assert str(tmp_path / "page.html") in out
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["trace"]["explosion_blocks"]
    assert record["n_blocks"] == len(record["trace"]["prompts"][0]["norms"]) - 1
    page = (tmp_path / "page.html").read_text()
    assert all(len(sentence) > 40 and sentence[:40] in page for sentence in out.splitlines()[:1])
    assert sorted(os.listdir(tmp_path)) == ["page.html", "result.json"]


def test_trace_writes_what_it_prints(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("First line.\n\nSecond line, longer.\n")
    code, out, _ = run("trace", "--prompts-file", "prompts.txt", "--json", "trace.json", "--out", "lines.html")
    assert code == 0
    record = json.loads((tmp_path / "trace.json").read_text())
    assert len(record["prompts"]) == 2
    assert "explosion in block " + ", ".join(map(str, record["explosion_blocks"])) in out
    assert "plotly" in (tmp_path / "lines.html").read_text()


def test_prompts_may_come_from_json(run, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(["Two\nlines.", "One."]))
    code, _, _ = run("trace", "--prompts-file", "prompts.json", "--json", "trace.json")
    assert code == 0
    assert len(json.loads((tmp_path / "trace.json").read_text())["prompts"]) == 2


def test_spectrum_of_the_tiny_model_is_taken_to_its_measured_direction(run, tmp_path):
    code, out, err = run("spectrum", "--json", "spectrum.json", "--out", "page.html")
    assert code == 0, err
    assert "stands out most in block 2: 7.07" in out
    record = json.loads((tmp_path / "spectrum.json").read_text())
    assert (record["schema"], record["n_blocks"], record["d_model"]) == ("sd_lens.spectrum/1", 6, 128)
    assert record["reference"] == "measured"
    assert [(row["block"], row["part"]) for row in record["blocks"][:4]] == [
        (0, "attention"),
        (0, "ffn"),
        (0, "block"),
        (1, "attention"),
    ]
    ffn = next(row for row in record["blocks"] if (row["block"], row["part"]) == (2, "ffn"))
    assert ffn["angle_deg"] < 7
    assert ffn["gap"] == ffn["sigma1"] / ffn["sigma2"] > 3
    page = (tmp_path / "page.html").read_text()
    assert "Singular values of the blocks of tiny" in page
    assert sorted(os.listdir(tmp_path)) == ["page.html", "spectrum.json"]


def test_spectrum_from_weights_alone(run, tmp_path):
    code, out, _ = run(
        "spectrum", "tiny", "--reference", "weights", "--blocks", "2,-1", "--json", "some.json", "--paper", "--inputs", "gain"
    )
    assert code == 0
    record = json.loads((tmp_path / "some.json").read_text())
    assert {row["block"] for row in record["blocks"]} == {2, 5}
    assert record["n_blocks"] == 6
    assert record["reference"].startswith("block ")
    assert record["notes"] == [
        "FFN fitted to N(0, I) before the gain and bias of the norm",
        "biases and mean subtraction left out, as in the paper",
        "the reference is of the most singular of the blocks chosen (2, 5)",
    ]
    assert all(f"({note})" in out for note in record["notes"])


def test_spectrum_sampled_and_measured(run, tmp_path):
    code, out, _ = run(
        "spectrum", "--blocks", "2", "--estimator", "sampled", "--samples", "5000", "--inputs", "measured", "--text", "One. Two."
    )
    assert code == 0
    assert "FFN fit: sampled (5000 samples, seed 0)" in out
    assert "FFN fitted to a Gaussian with diagonal covariance, measured on " in out


def test_attribute_names_who_writes_the_norm_and_what_sets_it_off(run, tmp_path):
    code, out, err = run("attribute", "tiny", "--json", "attribute.json", "--out", "page.html", "--top", "4")
    assert code == 0, err
    assert "is written by L2 FFN (78%; its neuron 205 alone 31%) and L1 FFN (17%)" in out
    assert "is written by L1 FFN (69%; its neuron 51 alone 63%) and L0 FFN (29%; its neuron 184 alone 17%)" in out
    assert "MassiveActivations(tiny: none in 265 tokens)" in out
    assert "SuperWeights(tiny: none in block 2)" in out
    record = json.loads((tmp_path / "attribute.json").read_text())
    assert (record["schema"], record["found"], record["block"], record["group"]) == ("sd_lens.attribute/1", True, 2, "initial")
    for split in (record, record["trigger"]):
        whole = [part["value"] for part in split["parts"] if part["kind"] in ("embed", "head", "bias", "ffn")]
        assert sum(whole) == pytest.approx(split["total"], rel=1e-5)
        assert abs(split["residual"]) < 1e-5 * abs(split["total"])
        assert [group["group"] for group in split["groups"]] == ["initial", "other"]
    assert {"kind": "neuron", "block": 2, "index": 205}.items() <= next(p for p in record["parts"] if p["kind"] == "neuron").items()
    assert record["super_weights"] == []
    assert record["massive_activations"]["n_found"] == 0
    page = (tmp_path / "page.html").read_text()
    assert "What writes the norm of initial tokens in tiny after block 2" in page
    assert sorted(os.listdir(tmp_path)) == ["attribute.json", "page.html"]


def test_pathways_names_the_tokens_that_explode(run, tmp_path):
    code, out, err = run("pathways", "--json", "pathways.json", "--out", "page.html", "--top", "3")
    assert code == 0, err
    assert "Token ids that explode by themselves: 1 of 1024 alone at position 0, 1 of 1024 without attention" in out
    assert "sink rate 0.278 at position 0" in out
    record = json.loads((tmp_path / "pathways.json").read_text())
    assert record["schema"] == "sd_lens.pathways/1"
    for pathway in ("initial", "no_attention", "second"):
        found = record[pathway]
        assert (found["block"], found["n_scanned"], found["n_exploding"]) == (2, 1024, 1)
        assert found["top"][0]["token"] == "<s>"
        assert found["top"][0]["ratio"] > 12 > 3 > found["top"][1]["ratio"]
        assert found["control"]["share_exploding"] < 0.01
    assert [row["pathway"] for row in record["tokens"] if row["high_initial"]] == ["self"]
    assert record["sinks"]["sink_rate"] == pytest.approx(0.278, abs=1e-3)
    assert len(record["sinks"]["heads"]) == 24
    assert "1,024 token ids of tiny" in (tmp_path / "page.html").read_text()


def test_patch_shows_the_model_without_its_explosion_subspace(run, tmp_path):
    words = ("--side", "both", "--where", "initial", "--where", "delimiters", "--controls", "2", "--max-new-tokens", "6")
    code, out, err = run("patch", "tiny", *words, "--generate", "Once upon a time", "--json", "patch.json", "--out", "page.html")
    assert code == 0, err
    assert (
        "With the explosion subspace of block 2 (rank 2, both sides) ablated at the initial tokens, the high-norm tokens reach 1."
        in out
    )
    assert "instead of 13.3 (random control: 18." in out
    assert "The FFN of block 2 answers 11.3 v0" in out
    assert "prompt: '<s>Once upon a time'\nuntouched: " in out
    assert "(no token after the first of its prompt has a high norm, so that there are no delimiters to edit)" in out
    record = json.loads((tmp_path / "patch.json").read_text())
    assert (record["schema"], record["found"], record["block"], record["rank"]) == ("sd_lens.patch/1", True, 2, 2)
    rows = {(row["intervention"], row["where"]): row for row in record["rows"]}
    assert len(rows) == 7
    before, after, control = (rows[key] for key in (("none", "none"), ("ablate", "initial"), ("random control", "initial")))
    assert before["peak_ratio"] == pytest.approx(13.25, abs=0.02)
    assert after["peak_ratio"] < 1.5 < 0.8 * before["peak_ratio"] < control["peak_ratio"]
    assert (before["kl"], after["n_tokens"], control["kl_std"] > 0) == (0, 6, True)
    assert before["sink_rate"] > after["sink_rate"] > 0
    assert "kl_std" not in after
    texts = [(text["where"], len(text["ids"])) for text in record["texts"]]
    assert texts == [("none", 6), ("initial", 6)]
    curve = record["response"]
    assert len(curve["scale"]) == len(curve["answer"]) == len(curve["opposite"]) == len(curve["predicted"]) == 40
    assert curve["exponent"] == pytest.approx(2.02, abs=0.01)
    page = (tmp_path / "page.html").read_text()
    assert "What removing the explosion subspace of block 2 (rank 2) does to tiny" in page
    assert "Answers of the FFN of block 2 in tiny" in page
    assert sorted(os.listdir(tmp_path)) == ["page.html", "patch.json"]


def test_patch_of_a_block_that_does_not_explode(run, tmp_path):
    words = ("--block", "4", "--rank", "1", "--side", "trigger", "--where", "everywhere", "--no-mean", "--controls", "0")
    code, out, err = run("patch", *words, "--max-new-tokens", "0", "--text", "One. Two.", "--json", "patch.json")
    assert code == 0, err
    assert "ExplosionSubspace" not in out
    record = json.loads((tmp_path / "patch.json").read_text())
    assert (record["block"], record["rank"], len(record["rows"]), record["texts"]) == (4, 1, 2, [])


def test_where_nothing_explodes_there_is_nothing_to_patch(run, tmp_path):
    code, out, err = run("patch", "--min-ratio", "100", "--json", "nothing.json", "--out", "page.html")
    assert code == 0, err
    assert "No explosion was found in tiny" in out
    assert "(consequences: no explosion was found)" in out
    record = json.loads((tmp_path / "nothing.json").read_text())
    assert (record["found"], record["rows"], record["texts"], record["response"]) == (False, None, None, None)


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (("--side", "left"), "--side: got 'left'; allowed: trigger, direction, both"),
        (("--where", "first"), "--where: got 'first'; allowed: initial, delimiters, everywhere"),
        (("--block", "6"), "block: got 6; allowed: 0 to 5"),
        (("--rank", "129"), "rank: got 129; allowed: 1 to 128"),
        (("--rank", "0"), "--rank"),
        (("--rank", "70"), "controls: got 3 with rank 70; allowed: 0, or a rank of at most 63"),
        (("--controls", "-1"), "--controls"),
        (("--generate", "a", "--max-new-tokens", "0"), "--generate, --max-new-tokens: got a prompt and 0"),
        (("--generate", ""), "generate: prompts: got an empty prompt"),
        (("--min-ratio", "1"), "min_ratio: got 1.0; allowed: above 1"),
        (("--json", "nowhere/patch.json"), "--json"),
    ],
)
def test_bad_options_of_patch(run, tmp_path, words, needle):
    assert_bad_input(run("patch", *words), needle)
    assert os.listdir(tmp_path) == []


def test_a_sample_on_one_pathway(run, tmp_path):
    code, _out, _ = run("pathways", "--pathway", "second", "--max-ids", "200", "--text", "One. Two.", "--json", "some.json")
    assert code == 0
    record = json.loads((tmp_path / "some.json").read_text())
    assert record["second"]["n_scanned"] == 200
    assert "initial" not in record


def test_where_nothing_explodes_that_is_the_answer(run, tmp_path):
    code, out, err = run("attribute", "--min-ratio", "100", "--json", "nothing.json")
    assert code == 0, err
    assert "No explosion was found in tiny" in out
    assert "(norm: no explosion was found)" in out
    record = json.loads((tmp_path / "nothing.json").read_text())
    assert (record["found"], record["total"], record["parts"], record["trigger"]) == (False, None, None, None)


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (("attribute", "--block", "first"), "--block: got 'first'; allowed: 'explosion', 'peak' or a whole number"),
        (("attribute", "--block", "6"), "block: got 6; allowed: 0 to 5"),
        (("attribute", "--min-ratio", "1"), "min_ratio: got 1.0; allowed: above 1"),
        (("attribute", "--out", "nowhere/page.html"), "--out"),
        (("pathways", "--pathway", "third"), "--pathway: got 'third'; allowed: initial, no_attention, second"),
        (("pathways", "--block", "7"), "block: got 7; allowed: 0 to 5"),
        (("pathways", "--max-ids", "0"), "--max-ids"),
        (("pathways", "--text", "a", "--prompts-file", "x.txt"), "--text, --prompts-file: got both"),
    ],
)
def test_bad_options_of_attribute_and_pathways(run, tmp_path, words, needle):
    assert_bad_input(run(*words), needle)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (("--blocks", "1,x"), "--blocks: got '1,x'; allowed: whole numbers"),
        (("--blocks", "6"), "blocks: got 6; allowed: 0 to 5"),
        (("--inputs", "text"), "--inputs: got 'text'; allowed: unit, gain, measured"),
        (("--estimator", "lstsq"), "--estimator: got 'lstsq'; allowed: closed_form, sampled"),
        (("--reference", "given"), "--reference: got 'given'; allowed: auto, measured, weights"),
        (("--reference", "weights", "--text", "a"), "--reference: got 'weights' with prompts"),
        (("--estimator", "sampled", "--samples", "10"), "samples: got 10; allowed: at least 2 * d_model = 256"),
        (("--samples", "5000"), "--samples: got 5000 with --estimator closed_form; allowed: with --estimator sampled"),
        (("--reference", "weights", "--dtype", "bananas"), "--dtype: got 'bananas'"),
        (("--seed", "99999999999999999999"), "seed"),
        (("--reference", "weights", "--device", "nowhere"), "--device: got 'nowhere'"),
    ],
)
def test_spectrum_refuses(run, tmp_path, words, needle):
    assert_bad_input(run("spectrum", "tiny", *words, "--json", "x.json"), needle)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", ["missing", "truncated", "quantised"])
def test_spectrum_of_a_damaged_folder(run, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    from sd_lens.models.loading import TINY

    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.3.mlp.down_proj.weight"
    if damage == "missing":
        save_file({key: value for key, value in tensors.items() if key != name}, weights)
    elif damage == "quantised":
        save_file(tensors | {name: tensors[name].to(torch.int8)}, weights)
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
        name = "model.safetensors"
    assert_bad_input(run("spectrum", str(folder), "--json", "x.json"), name)
    assert os.listdir(tmp_path) == ["copy"]


def test_check_lists_the_analyses(run, tmp_path):
    code, out, _ = run("check", "tiny", "--json", "check.json")
    assert code == 0
    assert "block identity" in out
    assert all(row["applies"] for row in json.loads((tmp_path / "check.json").read_text())["analyses"])


def test_missing_folder(run):
    assert_bad_input(run("check", "./nowhere"), "./nowhere")


def test_folder_without_config(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_bad_input(run("report", "empty"), "config.json")
    assert os.listdir(tmp_path) == ["empty"]


def test_encoder(run, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    assert_bad_input(run("check", "bert"), "BertForMaskedLM", "causal decoders")


def test_unknown_hub_name_offline():
    """In a process of its own, as huggingface_hub reads the environment once."""
    command = [sys.executable, "-m", "sd_lens", "check", "no-such-owner/no-such-model"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=120)
    assert_bad_input((done.returncode, done.stdout, done.stderr), "no-such-owner/no-such-model")


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (["trace", "--text", ""], "empty prompt"),
        (["trace", "--text", "word " * 5000], "context"),
        (["trace", "--text", "a", "--prompts-file", "b"], "allowed: one of them"),
        (["trace", "--prompts-file", "nowhere.txt"], "nowhere.txt"),
        (["trace", "--min-ratio", "0.5"], "min_ratio"),
        (["trace", "--batch-tokens", "0"], "batch_tokens"),
        (["trace", "--dtype", "float99"], "--dtype"),
        (["trace", "--device", "nonsense"], "--device"),
        (["report", "--out", "nowhere/page.html"], "--out"),
        (["report", "--json", "nowhere/page.json"], "--json"),
        (["report", "--out", "/proc/page.html"], "--out"),
        (["report", "--nonsense"], "--nonsense"),
        (["report", "--out", "same", "--json", "same"], "two files"),
        (["check", "~nobody-of-this-name/model"], "~nobody-of-this-name/model"),
        (["trace", "--text", "\udcff\udcfe"], "not valid Unicode"),
        (["check", "--device", "meta"], "--device"),
        (["report", "one", "two"], "two"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_input(run, tmp_path, words, needle):
    assert_bad_input(run(*words), needle)
    assert os.listdir(tmp_path) == []


def test_files_that_are_no_prompts(run, tmp_path):
    for name, content in (("blank.txt", b"\n\n"), ("broken.json", b"{"), ("object.json", b"{}"), ("binary.txt", b"\xff\xfe\x00")):
        (tmp_path / name).write_bytes(content)
        assert_bad_input(run("trace", "--prompts-file", name), name)


def test_an_error_while_drawing_leaves_no_file(run, tmp_path, monkeypatch):
    def broken(findings):
        raise OSError("the disk is full")

    monkeypatch.setattr("sd_lens.reporting.analyse", lambda *_, **__: None)  # nothing of it is drawn
    monkeypatch.setattr("sd_lens.display.report.render", broken)
    code, _, err = run("report", "--out", "page.html", "--json", "page.json")
    assert code == 2
    assert "the disk is full" in err
    assert os.listdir(tmp_path) == []


def test_without_words_it_explains_itself(run):
    code, out, err = run()
    assert code == 0
    assert "report" in out
    assert err == ""


def test_imports_stay_light():
    """Neither TransformerLens nor what draws is imported before it is used."""
    program = (
        "import sys, sd_lens; print([n for n in ('transformer_lens', 'transformers', 'circuitsvis', 'plotly') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_import_points_down():
    """The floors of docs/design.md, bottom first; imports inside functions (a result's plot()) are not counted."""
    import ast

    floors = [
        "models",
        "linear",
        "tracing",
        "spectrum",
        "anatomy",
        "pathways",
        "interventions",
        "applications",
        "propagation",
        "wording",
        "findings",
        "display",
        "reporting",
        "cli",
    ]
    package = Path(cli.__file__).parent.parent
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        if own not in floors:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sd_lens."):
                other = node.module.split(".")[1]
                assert floors.index(other) <= floors.index(own), f"{path.name} imports {node.module}"
