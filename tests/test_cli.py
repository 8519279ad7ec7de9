"""The command line: exit codes, one line on stderr, whole files or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sd_lens import cli


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
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

    floors = ["models", "linear", "tracing", "findings", "display", "reporting", "cli"]
    package = Path(cli.__file__).parent
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        if own not in floors:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sd_lens."):
                other = node.module.split(".")[1]
                assert floors.index(other) <= floors.index(own), f"{path.name} imports {node.module}"
