"""``sd-lens dynamics``: when the explosion emerges in training, and how its direction settles."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sd_lens.cli.app import command
from sd_lens.cli.arguments import (
    BadInput,
    BatchTokens,
    Device,
    Dtype,
    Json,
    MinRatio,
    Out,
    PromptsFile,
    Text,
    given_prompts,
    go_offline_if_needed,
    require_device,
    require_dtype,
    require_writable_files,
)


@command
def dynamics(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints in order of training: folders, hub names with a revision (EleutherAI/pythia-70m@step1000), 'tiny'; or one folder that "
            "holds folders named after steps."
        ),
    ],
    text: Text = None,
    prompts_file: PromptsFile = None,
    out: Out = None,
    json_file: Json = None,
    steps: Annotated[str | None, typer.Option(help="Training steps, as in 0,500,1000; default: what the names say.")] = None,
    min_ratio: MinRatio = 6.0,
    batch_tokens: BatchTokens = 4096,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """When the explosion emerges over the checkpoints of a training run, and how its direction settles; one model in memory at a time."""
    import torch

    from sd_lens.applications.dynamics import direction_stability

    require_writable_files(out, json_file)
    prompts = given_prompts(text, prompts_file)
    given = None if steps is None else [_step(one) for one in steps.split(",")]
    require_dtype(dtype)
    require_device(device)
    for checkpoint in checkpoints:
        go_offline_if_needed(checkpoint)
    from transformers.utils import logging

    logging.disable_progress_bar()
    found = direction_stability(
        checkpoints,
        prompts,
        steps=given,
        min_ratio=min_ratio,
        batch_tokens=batch_tokens,
        dtype=getattr(torch, dtype),
        device=device,
    )
    for sentence in found.sentences():
        typer.echo(sentence)
    _echo_table(found)
    if json_file is not None:
        from sd_lens.display.dynamics_records import dynamics_record
        from sd_lens.display.records import write_json

        write_json(dynamics_record(found), json_file)
    if out is not None:
        from sd_lens.display.dynamics_sections import render_dynamics
        from sd_lens.display.report import write_page

        write_page(render_dynamics(found), out)


def _step(text: str) -> int:
    if not text.strip().isdecimal():
        raise BadInput(f"--steps: got {text!r}; allowed: whole numbers from 0, separated by commas")
    return int(text)


def _echo_table(found: Any) -> None:
    shown = found.to_dataframe().drop(columns=["explosion_block", "n_same", "norm"]).dropna(axis="columns", how="all")
    shown.columns = [name.removesuffix("_deg") for name in shown.columns]
    typer.echo(f"\n{shown.to_string(index=False, na_rep='', float_format='%.3g')}")
