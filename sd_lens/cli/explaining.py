"""``sd-lens attribute`` and ``sd-lens pathways``: what an explosion is made of, what sets it off, and for which tokens."""

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
    Model,
    Out,
    PromptsFile,
    Text,
    Top,
    boot,
    given_prompts,
    require_writable_files,
)


@command
def attribute(
    model: Model = "tiny",
    text: Text = None,
    prompts_file: PromptsFile = None,
    out: Out = None,
    json_file: Json = None,
    block: Annotated[
        str,
        typer.Option(
            help="After which block the norm is split: 'explosion', 'peak' (all blocks up to the largest norm), or a number."
        ),
    ] = "explosion",
    neurons: Annotated[bool, typer.Option(help="Split FFNs over their neurons, or experts.")] = True,
    by_key: Annotated[
        bool, typer.Option("--by-key", help="Split heads by what they take from the token itself and from others.")
    ] = False,
    top: Top = 10,
    min_ratio: MinRatio = 6.0,
    batch_tokens: BatchTokens = 4096,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """What an explosion is made of and what sets it off: components, neurons, massive activations, super weights."""
    from sd_lens.anatomy import anatomy
    from sd_lens.wording import finding

    require_writable_files(out, json_file)
    at: Any = block if block in ("explosion", "peak") else _number("--block", block, "'explosion', 'peak' or a whole number")
    prompts = given_prompts(text, prompts_file)
    loaded = boot(model, device, dtype)
    found = anatomy(loaded, prompts, block=at, neurons=neurons, by_key=by_key, min_ratio=min_ratio, batch_tokens=batch_tokens)
    for sentence in (finding(found.defects), *found.sentences()):
        typer.echo(sentence)
    for split, name in ((found.norm, "projection on the defect direction"), (found.trigger, "trigger coefficient")):
        for number, row in enumerate(split.rows if split is not None else ()):
            assert split is not None
            typer.echo(f"\n{name} of {row.label} tokens ({row.n_tokens}), block {split.block}: {float(split.total[number]):.5g}")
            _echo_table(split.top(top, row=number)[["name", "value", "share"]], share="{:.1%}")
            for inside in split.inside if number == split.main else ():
                _echo_table(split.top(top, row=number, inside=inside)[["name", "value", "share"]], share="{:.1%}")
    typer.echo(f"\n{found.massive}")
    if found.massive.found:
        _echo_table(found.massive.dimensions().head(top))
    typer.echo(found.super_weights if found.super_weights is not None else "super weights were not looked for")
    if found.super_weights is not None and found.super_weights.rows:
        _echo_table(found.super_weights.to_dataframe()[["tl", "hf", "weight", "activation", "output", "share", "token"]].head(top))
    for name, reason in found.missing.items():
        typer.echo(f"({name}: {reason})")
    if json_file is not None:
        from sd_lens.display.records import attribute_record, write_json

        write_json(attribute_record(found), json_file)
    if out is not None:
        from sd_lens.display.report import render_anatomy, write_page

        write_page(render_anatomy(found), out)


@command
def pathways(
    model: Model = "tiny",
    text: Text = None,
    prompts_file: PromptsFile = None,
    out: Out = None,
    json_file: Json = None,
    pathway: Annotated[
        list[str] | None,
        typer.Option(help="'initial', 'no_attention' or 'second'; may be given several times; default: all three."),
    ] = None,
    block: Annotated[int | None, typer.Option(help="The block after which norms are taken; default: the explosion block.")] = None,
    max_ids: Annotated[
        int | None, typer.Option(help="Scan a sample of no more ids than this; default: the whole vocabulary.", min=1)
    ] = None,
    top: Top = 10,
    seed: Annotated[int, typer.Option(help="Seeds random embeddings, other ids and samples.", min=0, max=2**63 - 1)] = 0,
    min_ratio: MinRatio = 6.0,
    batch_tokens: BatchTokens = 4096,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """How tokens get to a high norm: every token id by itself, the two pathways of a text's tokens, repeats and attention sinks."""
    from sd_lens.pathways import pathways as find_pathways
    from sd_lens.tracing.vocabulary_scan import PATHWAYS
    from sd_lens.wording import finding

    require_writable_files(out, json_file)
    which: Any = tuple(pathway or PATHWAYS)
    for name in which:
        if name not in PATHWAYS:
            raise BadInput(f"--pathway: got {name!r}; allowed: {', '.join(PATHWAYS)}")
    prompts = given_prompts(text, prompts_file)
    loaded = boot(model, device, dtype)
    found = find_pathways(
        loaded, prompts, which=which, block=block, max_ids=max_ids, seed=seed, min_ratio=min_ratio, batch_tokens=batch_tokens
    )
    for sentence in (finding(found.defects), *found.sentences()):
        typer.echo(sentence)
    for scan in found.scans:
        typer.echo(f"\n{scan}")
        _echo_table(scan.top(top))
        for note in scan.notes:
            typer.echo(f"({note})")
    if found.confirmation is not None:
        typer.echo(f"\n{found.confirmation}")
        _echo_table(found.confirmation.to_dataframe())
    high = found.tokens.high()
    typer.echo(f"\n{found.tokens}")
    if len(high):
        shown = [
            "id",
            "token",
            "n_initial",
            "high_initial",
            "n_later",
            "high_later",
            "initial_ratio",
            "no_attention_ratio",
            "pathway",
        ]
        _echo_table(high[shown].head(top))
    for result in (found.repeated, found.sinks):
        typer.echo(f"\n{result}" if result is not None else f"\n(attention: {found.missing['sinks']})")
    if json_file is not None:
        from sd_lens.display.records import pathways_record, write_json

        write_json(pathways_record(found), json_file)
    if out is not None:
        from sd_lens.display.report import render_pathways, write_page

        write_page(render_pathways(found), out)


def _echo_table(frame: Any, **formats: str) -> None:
    """A table in columns; tokens as Python writes them."""
    formatters: dict[str, Any] = {name: format.format for name, format in formats.items()}
    formatters |= {name: repr for name in ("token", "after") if name in frame.columns}
    typer.echo(frame.to_string(index=False, na_rep="", float_format="%.4g", formatters=formatters))


def _number(option: str, text: str, allowed: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BadInput(f"{option}: got {text!r}; allowed: {allowed}") from None
