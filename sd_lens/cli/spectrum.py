"""``sd-lens spectrum``: what each block does to a vector."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from sd_lens.cli.app import command
from sd_lens.cli.arguments import (
    BadInput,
    Device,
    Dtype,
    Json,
    Model,
    Out,
    PromptsFile,
    Text,
    boot,
    given_prompts,
    go_offline_if_needed,
    require_device,
    require_dtype,
    require_writable_files,
)


@command
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

    require_writable_files(out, json_file)
    chosen = _blocks(blocks)
    for option, value, allowed in (
        ("--reference", reference, ("auto", "measured", "weights")),
        ("--inputs", inputs, ("unit", "gain", "measured")),
        ("--estimator", estimator, ("closed_form", "sampled")),
    ):
        if value not in allowed:
            raise BadInput(f"{option}: got {value!r}; allowed: {', '.join(allowed)}")
    given = given_prompts(text, prompts_file)
    require_dtype(dtype)
    if samples is not None and estimator != "sampled":
        raise BadInput(f"--samples: got {samples} with --estimator {estimator}; allowed: with --estimator sampled")
    if reference == "weights" and (given or inputs == "measured"):
        raise BadInput(
            "--reference: got 'weights' with prompts or measured inputs; allowed: 'auto' or 'measured', as they need the model"
        )
    measured = reference == "measured" or given is not None or inputs == "measured" or (reference == "auto" and _is_small(model))
    source = boot(model, device, dtype) if measured else _weights(model, device)
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

    require_device(device)
    go_offline_if_needed(model)
    return weights_of(model)
