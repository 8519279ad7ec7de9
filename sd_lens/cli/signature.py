"""``sd-lens signature``: the direction of a model's high-norm tokens, and whose child a checkpoint is."""

from __future__ import annotations

import os
import re
from pathlib import Path
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
def signature(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Any number of: 'tiny', a checkpoint folder, a name on the Hugging Face hub (with a revision: owner/name@step1000), or a saved "
            "signature (with or without .json); default: tiny."
        ),
    ] = None,
    text: Text = None,
    prompts_file: PromptsFile = None,
    out: Out = None,
    json_file: Json = None,
    method: Annotated[
        str,
        typer.Option(
            help="'activations', measured on prompts, which loads the model; or 'weights', from the explosion block's singular direction, "
            "which reads one block at a time."
        ),
    ] = "activations",
    block: Annotated[
        int | None, typer.Option(help="With one model and --method weights: the block to take it from; default: found.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write every signature into this folder, as NAME.json and NAME.safetensors.")
    ] = None,
    min_ratio: MinRatio = 6.0,
    batch_tokens: BatchTokens = 4096,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """A model's signature; of several models their distances, verdicts and lineage tree."""
    from sd_lens.applications.signature import METHODS
    from sd_lens.applications.signature_files import is_signature_file

    items = models or ["tiny"]
    require_writable_files(out, json_file)
    if method not in METHODS:
        raise BadInput(f"--method: got {method!r}; allowed: {', '.join(METHODS)}")
    if save is not None and not (save.is_dir() or (not save.exists() and save.absolute().parent.is_dir())):
        raise BadInput(f"--save: got {str(save)!r}; allowed: a folder, or a new one in a folder that exists")
    prompts = given_prompts(text, prompts_file)
    if prompts is not None and method == "weights":
        raise BadInput(
            "--text, --prompts-file: got prompts with --method weights, which runs nothing; allowed: --method activations"
        )
    named = [item for item in items if not is_signature_file(item)]
    if prompts is not None and not named:
        raise BadInput("--text, --prompts-file: got prompts with saved signatures only; allowed: at least one model to run")
    if block is not None and (method != "weights" or len(items) > 1 or not named):
        raise BadInput(f"--block: got {block}; allowed: with one model and --method weights")
    require_dtype(dtype)
    require_device(device)
    measuring = {"prompts": prompts, "min_ratio": min_ratio, "batch_tokens": batch_tokens}
    found = _compared(items, named, block=block, device=device, dtype=dtype, method=method, **measuring)
    _echo(found)
    if save is not None:
        _save(found, save)
    if json_file is not None:
        from sd_lens.display.records import write_json
        from sd_lens.display.signature_records import distances_record

        write_json(distances_record(found), json_file)
    if out is not None:
        from sd_lens.display.report import write_page
        from sd_lens.display.signature_sections import render_signatures

        write_page(render_signatures(found), out)


def _compared(
    items: list[str], named: list[str], *, block: int | None, device: str, dtype: str, method: Any, **options: Any
) -> Any:
    for item in named:
        go_offline_if_needed(item)
    import torch
    from transformers.utils import logging

    from sd_lens.applications.lineage import compare, signature_distances
    from sd_lens.applications.signing import signature as take

    logging.disable_progress_bar()
    if block is not None:
        return compare([take(items[0], method=method, block=block, device=device)])
    # Half precision stays as it is stored when weights are read: a block is converted when its turn comes.
    kind = getattr(torch, dtype) if method == "activations" else None
    return signature_distances(items, method=method, device=device, dtype=kind, **options)


def _echo(found: Any) -> None:
    for sentence in found.sentences():
        typer.echo(sentence)
    if len(found.names) == 1:
        typer.echo(repr(found.signatures[0]))
        if found.signatures[0].found:
            typer.echo(f"content hash: {found.signatures[0].content_hash}")
            listed = ", ".join(f"{value:+.3f} at {index}" for index, value in found.signatures[0].largest())
            typer.echo(f"largest coordinates: {listed}")
    else:
        typer.echo(f"\nangles, degrees\n{found.matrix().to_string(na_rep='–', float_format='%.1f')}\n")
        for pair in found.pairs:
            typer.echo(pair)
        if found.trees:
            typer.echo(f"\n{found.tree_text()}")
    for note in found.notes:
        typer.echo(f"({note})")


def _save(found: Any, folder: Path) -> None:
    """Every signature under its name, made fit for a file's."""
    folder.mkdir(exist_ok=True)
    taken: set[str] = set()
    for name, one in zip(found.names, found.signatures, strict=True):
        stem = re.sub(r"[^\w.-]+", "_", name).strip("._") or "signature"
        file, number = stem, 2
        while file in taken:
            file, number = f"{stem}_{number}", number + 1
        taken.add(file)
        one.save(folder / file)
        typer.echo(f"saved {os.fspath(folder / file)}.json and .safetensors")
