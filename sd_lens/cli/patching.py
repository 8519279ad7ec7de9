"""``sd-lens patch``: what becomes of a model without its explosion subspace."""

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
    boot,
    given_prompts,
    require_writable_files,
)


@command
def patch(
    model: Model = "tiny",
    text: Text = None,
    prompts_file: PromptsFile = None,
    out: Out = None,
    json_file: Json = None,
    block: Annotated[
        int | None, typer.Option(help="The block whose subspace is removed; default: the explosion block that adds most.")
    ] = None,
    rank: Annotated[int, typer.Option(help="How many singular vectors span the subspace.", min=1)] = 2,
    side: Annotated[
        list[str] | None,
        typer.Option(
            help="'trigger' (what the FFN reads), 'direction' (the stream that the block leaves) or 'both'; may be given several times; "
            "default: each of them."
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="'initial', 'delimiters' or 'everywhere'; may be given several times; default: each of them."),
    ] = None,
    mean: Annotated[bool, typer.Option(help="Show mean ablation, too.")] = True,
    controls: Annotated[int, typer.Option(help="Seeds of each random control; 0 for none.", min=0)] = 3,
    generate: Annotated[
        list[str] | None,
        typer.Option(help="A prompt that text is generated from; may be given several times; default: two built-in ones."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens are generated at most; 0 for no text.", min=0)] = 24,
    seed: Annotated[int, typer.Option(help="Seeds the random controls.", min=0, max=2**62)] = 0,
    min_ratio: MinRatio = 6.0,
    batch_tokens: BatchTokens = 4096,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """What removing the explosion subspace does: loss, predictions, norms, sinks and generated text, beside random controls."""
    from sd_lens.interventions.causality import causality
    from sd_lens.interventions.generation import BEGINNINGS
    from sd_lens.interventions.outcomes import SIDES, WHERE
    from sd_lens.wording import finding

    require_writable_files(out, json_file)
    sides: Any = tuple(side or SIDES)
    places: Any = tuple(where or WHERE)
    for option, chosen, allowed in (("--side", sides, SIDES), ("--where", places, WHERE)):
        for one in chosen:
            if one not in allowed:
                raise BadInput(f"{option}: got {one!r}; allowed: {', '.join(allowed)}")
    if generate and not max_new_tokens:
        raise BadInput("--generate, --max-new-tokens: got a prompt and 0; allowed: at least 1 token with --generate")
    prompts = given_prompts(text, prompts_file)
    loaded = boot(model, device, dtype)
    found = causality(
        loaded,
        prompts,
        block=block,
        rank=rank,
        where=places,
        sides=sides,
        mean=mean,
        controls=controls,
        generate=(generate or BEGINNINGS) if max_new_tokens else None,
        max_new_tokens=max(max_new_tokens, 1),
        seed=seed,
        min_ratio=min_ratio,
        batch_tokens=batch_tokens,
    )
    response = () if found.response is None else (found.response.sentence(),)
    for sentence in (finding(found.defects), *found.sentences(), *response):
        typer.echo(sentence)
    if found.consequences is not None:
        _echo_consequences(found.consequences)
    for name, reason in found.missing.items():
        typer.echo(f"({name}: {reason})")
    if json_file is not None:
        from sd_lens.display.records import patch_record, write_json

        write_json(patch_record(found), json_file)
    if out is not None:
        from sd_lens.display.report import render_causality, write_page

        write_page(render_causality(found), out)


def _echo_consequences(found: Any) -> None:
    table = found.to_dataframe()
    shown = table.loc[:, :"sink_attention"].copy()
    shown["peak_ratio_std"] = table.peak_ratio_std
    shown = shown.dropna(axis="columns", how="all")
    typer.echo(f"\n{shown.to_string(index=False, na_rep='', float_format='%.4g')}")
    for row in found.texts.to_dict("records"):
        typer.echo("")
        for name, text in row.items():
            if text == text:
                typer.echo(f"{name}: {text!r}")
    for note in found.notes:
        typer.echo(f"({note})")
