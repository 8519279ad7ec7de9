"""The command line: a thin skin over the API. Exit code 0: done; 2: bad input, said in one line on stderr; 1: anything else."""

from __future__ import annotations

import json
import os
import socket
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import typer

app = typer.Typer(
    help="Find and explain the high-norm tokens (singular defects, massive activations) of language models.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="'tiny' (ships with sd_lens), a checkpoint folder, or a name on the Hugging Face hub.")]
Text = Annotated[list[str] | None, typer.Option("--text", help="A prompt; may be given several times.")]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts-file", help="A text file with one prompt per line, or a .json file with a list of strings."),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the machine-readable result here.")]
Out = Annotated[Path | None, typer.Option("--out", help="Write the picture here (HTML, self-contained).")]
MinRatio = Annotated[float, typer.Option(help="Least norm of a high-norm token, as a multiple of the other tokens' median.")]
BatchTokens = Annotated[int, typer.Option(help="Largest number of tokens run at once.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="What the weights are converted to: float32, bfloat16, float16 or float64.")]


class BadInput(ValueError):
    """Input that the user can mend."""


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Registers a command whose complaints about its input end in one line on stderr and exit code 2."""

    @app.command()
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (ValueError, OSError) as error:
            _complain(str(error))
            raise typer.Exit(2) from None

    return run


def _complain(message: str) -> None:
    typer.echo(f"sd-lens: {' '.join(message.split())}", err=True)


def _boot(model: str, device: str, dtype: str) -> Any:
    import torch

    from sd_lens.models.loading import load

    _require_dtype(dtype)
    _require_device(device)
    _go_offline_if_needed(model)
    from transformers.utils import logging

    logging.disable_progress_bar()
    return load(model, device=device, dtype=getattr(torch, dtype))


def _require_dtype(dtype: str) -> None:
    allowed = ("float32", "bfloat16", "float16", "float64")
    if dtype not in allowed:
        raise BadInput(f"--dtype: got {dtype!r}; allowed: {', '.join(allowed)}")


def _require_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise BadInput(f"--device: got {device!r}; allowed: a device that this machine has, such as cpu") from None


def _go_offline_if_needed(model: str) -> None:
    """Where the hub's name does not resolve, a hub model is looked for in the local cache at once, not after minutes of retries."""
    if model == "tiny" or os.path.exists(os.path.expanduser(model)) or {"https", "all"} & getproxies().keys():
        return
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which nothing has done yet


def _prompts(text: list[str] | None, file: Path | None) -> list[str] | None:
    """The prompts asked for; None for the built-in ones."""
    if text and file:
        raise BadInput("--text, --prompts-file: got both; allowed: one of them")
    if text:
        return text
    if file is None:
        return None
    try:
        content = file.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--prompts-file: {file} cannot be read ({error.strerror}); allowed: a text or .json file") from None
    except UnicodeDecodeError:
        raise BadInput(f"--prompts-file: {file} is not UTF-8 text; allowed: a text or .json file") from None
    prompts = _json_prompts(file, content) if file.suffix == ".json" else [line for line in content.splitlines() if line.strip()]
    if not prompts:
        raise BadInput(f"--prompts-file: {file} holds no prompt; allowed: at least one line of text")
    return prompts


def _json_prompts(file: Path, content: str) -> list[str]:
    try:
        prompts = json.loads(content)
    except json.JSONDecodeError as error:
        raise BadInput(f"--prompts-file: {file} is not valid JSON ({error}); allowed: a list of strings") from None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise BadInput(f"--prompts-file: {file} holds something else than a list of strings; allowed: a list of strings")
    return prompts


def _require_writable(out: Path | None, json_file: Path | None) -> None:
    from sd_lens.display.files import require_writable

    if out is not None and json_file is not None and out.resolve() == json_file.resolve():
        raise BadInput(f"--out, --json: got {out} for both; allowed: two files")
    for path, option in ((out, "--out"), (json_file, "--json")):
        if path is not None:
            require_writable(path, argument=option)


@_command
def report(
    model: Model = "tiny",
    text: Text = None,
    prompts_file: PromptsFile = None,
    out: Annotated[Path, typer.Option("--out", help="Write the page here.")] = Path("sd-lens-report.html"),
    json_file: Json = None,
    min_ratio: MinRatio = 6.0,
    batch_tokens: BatchTokens = 4096,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """The whole story on one page: is there an explosion, where, and what makes it."""
    from sd_lens.reporting import report as make_report

    _require_writable(out, json_file)
    prompts = _prompts(text, prompts_file)
    loaded = _boot(model, device, dtype)
    findings = make_report(loaded, prompts, out=out, json=json_file, min_ratio=min_ratio, batch_tokens=batch_tokens)
    for sentence in findings.sentences():
        typer.echo(sentence)
    typer.echo(f"Report: {out.resolve()}")


@_command
def trace(
    model: Model = "tiny",
    text: Text = None,
    prompts_file: PromptsFile = None,
    out: Out = None,
    json_file: Json = None,
    min_ratio: MinRatio = 6.0,
    batch_tokens: BatchTokens = 4096,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Norm of every token after every block: the high-norm tokens, and the blocks where their norm explodes and decays."""
    from sd_lens.tracing.defects import find_defects
    from sd_lens.tracing.norms import trace_norms
    from sd_lens.tracing.prompts import default_prompts

    _require_writable(out, json_file)
    prompts = _prompts(text, prompts_file)
    loaded = _boot(model, device, dtype)
    traced = trace_norms(
        loaded, default_prompts(loaded) if prompts is None else prompts, min_ratio=min_ratio, batch_tokens=batch_tokens
    )
    defects = find_defects(traced, min_ratio=min_ratio)
    typer.echo(defects)
    if defects.tokens:
        typer.echo(defects.to_dataframe().to_string(index=False, float_format="%.4g", formatters={"token": repr}))
    if json_file is not None:
        from sd_lens.display.records import trace_record, write_json

        write_json(trace_record(defects), json_file)
    if out is not None:
        from sd_lens.display.files import write_text

        write_text(traced.plot().to_html(include_plotlyjs=True), out)


@_command
def spectrum(
    model: Model = "tiny",
    text: Text = None,
    prompts_file: PromptsFile = None,
    out: Out = None,
    json_file: Json = None,
    blocks: Annotated[
        str | None, typer.Option(help="Which blocks, such as 0,1,30 (negative ones count from the end); default: all.")
    ] = None,
    reference: Annotated[
        str,
        typer.Option(
            help="What angles are taken to: 'measured', the direction of the high-norm tokens, which loads the model; 'weights', the "
            "leading direction of the most singular block, which reads one block at a time; 'auto': measured where prompts are given "
            "or the checkpoint is small."
        ),
    ] = "auto",
    inputs: Annotated[
        str,
        typer.Option(
            help="What FFNs are fitted to: 'unit' (N(0, I) at the projections, as in the paper), 'gain' (before the norm's gain), or "
            "'measured' (on the prompts; loads the model)."
        ),
    ] = "unit",
    estimator: Annotated[str, typer.Option(help="'closed_form', or 'sampled', the paper's least squares.")] = "closed_form",
    samples: Annotated[int | None, typer.Option(help="Number of samples of the sampled estimator; default: 100000.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="Leave out biases and mean subtraction, as the paper does.")] = False,
    seed: Annotated[int, typer.Option(help="Seeds solvers and samples.", min=0, max=2**63 - 1)] = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """What each block does to a vector, from its weights: singular directions, and eigenvalues along the high-norm direction."""
    from sd_lens.spectrum import block_directions

    _require_writable(out, json_file)
    chosen = _blocks(blocks)
    for option, value, allowed in (
        ("--reference", reference, ("auto", "measured", "weights")),
        ("--inputs", inputs, ("unit", "gain", "measured")),
        ("--estimator", estimator, ("closed_form", "sampled")),
    ):
        if value not in allowed:
            raise BadInput(f"{option}: got {value!r}; allowed: {', '.join(allowed)}")
    given = _prompts(text, prompts_file)
    _require_dtype(dtype)
    if samples is not None and estimator != "sampled":
        raise BadInput(f"--samples: got {samples} with --estimator {estimator}; allowed: with --estimator sampled")
    if reference == "weights" and (given or inputs == "measured"):
        raise BadInput(
            "--reference: got 'weights' with prompts or measured inputs; allowed: 'auto' or 'measured', as they need the model"
        )
    measured = reference == "measured" or given is not None or inputs == "measured" or (reference == "auto" and _is_small(model))
    source = _boot(model, device, dtype) if measured else _weights(model, device)
    options: Any = {"inputs": inputs, "estimator": estimator, "paper": paper, "seed": seed, "device": device}
    if samples is not None:
        options["samples"] = samples
    table = block_directions(source, blocks=chosen, prompts=given, **options)
    typer.echo(table)
    typer.echo(table.sentence())
    if measured and table.reference_source != "measured":
        typer.echo("(no token of the prompts has a high norm: there is no measured direction)")
    typer.echo(_aligned(table.to_dataframe()))
    for note in table.notes:
        typer.echo(f"({note})")
    if json_file is not None:
        from sd_lens.display.records import spectrum_record, write_json

        write_json(spectrum_record(table), json_file)
    if out is not None:
        from sd_lens.display.report import render_spectrum, write_page

        write_page(render_spectrum(table), out)


def _aligned(frame: Any) -> str:
    """The table of a spectrum in columns."""
    frame = frame.dropna(axis="columns", how="all").round({"angle_deg": 2, "eigenvector_angle_deg": 2})
    return frame.to_string(index=False, na_rep="", float_format="%.4g", formatters={"eigenvalue": "{:.4g}".format})


def _blocks(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise BadInput(f"--blocks: got {text!r}; allowed: whole numbers with commas between them, such as 0,1,30") from None


# A model whose files take less than this is loaded without being asked for.
_SMALL = 2 * 10**9


def _is_small(model: str) -> bool:
    """Whether loading a model costs little: it ships with the package, or its files are small and have a tokenizer beside them."""
    folder = Path(os.path.expanduser(model))
    if not folder.is_dir():
        return model == "tiny"
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return size <= _SMALL and any(folder.glob("tokenizer*"))


def _weights(model: str, device: str) -> Any:
    from sd_lens.models.loading import weights_of

    _require_device(device)
    _go_offline_if_needed(model)
    return weights_of(model)


@_command
def check(
    model: Model = "tiny",
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Does a model keep the identities that the analyses rest on, and which of them apply to it."""
    from sd_lens.models.check import check as check_model

    _require_writable(None, json_file)
    result = check_model(_boot(model, device, dtype))
    typer.echo(result)
    typer.echo(result.to_dataframe().to_string(index=False, na_rep="", float_format="%.1e"))
    typer.echo(result.analyses().to_string(index=False))
    if json_file is not None:
        from sd_lens.display.records import check_record, write_json

        write_json(check_record(result), json_file)


def _hush() -> None:
    """Keeps the libraries below from talking: stderr is for progress bars and for our own one line."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")


def main() -> None:
    """The ``sd-lens`` command."""
    _hush()
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except Exception as error:
        # Typer carries its own copy of click, so its exceptions are told by what they can do.
        explain = getattr(error, "format_message", None)
        if explain is None and type(error).__name__ != "Abort":
            raise
        if explain is not None:
            _complain(explain())
        code = 1 if explain is None else 2
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
