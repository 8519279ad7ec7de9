"""``sd-lens collapse``: when two inputs become one to a model, in which precision, and which tokens the last one feels."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sd_lens.cli.app import command
from sd_lens.cli.arguments import BadInput, BatchTokens, Device, Json, Model, Out, boot, require_dtype, require_writable_files


@command
def collapse(
    model: Model = "tiny",
    text: Annotated[
        str | None, typer.Option("--text", help="A prompt whose last token's sensitivity is measured; default: a built-in one.")
    ] = None,
    out: Out = None,
    json_file: Json = None,
    probe: Annotated[
        str | None,
        typer.Option(
            help="repeat-last, count-ones, bernoulli, copy-first, copy-last, sum or count-word; default: repeat-last, of two of the text's tokens where "
            "the vocabulary has no digits."
        ),
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Lengths in elements of the probe, as in 1,2,4,8.")] = None,
    up_to: Annotated[
        int | None,
        typer.Option(
            "--up-to", help="About four lengths per doubling up to this; default: up to the model's context, or 8192.", min=1
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="A precision to run the model in: float32, bfloat16, float16 or float64; may be given several times; default: float32 and bfloat16, "
            "as far as the machine can run them. One alone is also what the weights are converted to."
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="A block, whose output is meant, or 'final' (after the final norm); may be given several times."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="linf, l2, l1, each also per head-sized chunk (linf_heads), relative, cosine, kl or argmax; may be given several times; default: "
            "linf_heads and linf."
        ),
    ] = None,
    separator_every: Annotated[int | None, typer.Option(help="Put a separator after every so many elements.", min=1)] = None,
    separator: Annotated[str, typer.Option(help="The separator, text of one token.")] = ",",
    contrast: Annotated[
        str,
        typer.Option(
            help="'repeated' (the same with its last element once more) or 'changed' (another digit to copy; copy-first, copy-last)."
        ),
    ] = "repeated",
    template: Annotated[bool, typer.Option("--template", help="Put a question around the probe.")] = False,
    text_level: Annotated[
        bool, typer.Option("--text-level", help="Tokenise the probe as text, as a user's prompt, not element by element.")
    ] = False,
    word: Annotated[str | None, typer.Option(help="What count-word repeats; default: dog.")] = None,
    p: Annotated[float, typer.Option("--p", help="Probability of a one among the digits of bernoulli.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Seeds the digits of bernoulli.")] = 0,
    samples: Annotated[int | None, typer.Option(help="Pairs per length of bernoulli; default: 5.", min=1)] = None,
    mitigations: Annotated[
        bool, typer.Option("--mitigations", help="Also with separators (every 3 elements, or --separator-every).")
    ] = False,
    without_explosion: Annotated[
        bool, typer.Option("--without-explosion", help="Also with the explosion subspace ablated, beside a random control.")
    ] = False,
    answers: Annotated[bool, typer.Option("--answers", help="Ask the model for the probe's answer, too.")] = False,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--estimate", help="Exact sensitivities, or estimates; default: exact in models of a width up to 256."
        ),
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="Whether BOS stands before the text and the probe; default: the model's convention."),
    ] = None,
    batch_tokens: BatchTokens = 4096,
    device: Device = "cpu",
) -> None:
    """When two inputs become one to a model (representational collapse), and which tokens the last one still feels (over-squashing)."""
    from sd_lens.propagation.overview import propagation_overview
    from sd_lens.propagation.pair_distances import METRICS
    from sd_lens.propagation.probes import PROBES
    from sd_lens.wording import propagated

    require_writable_files(out, json_file)
    if lengths and up_to is not None:
        raise BadInput("--lengths, --up-to: got both; allowed: one of them")
    for option, given, allowed in (
        ("--probe", [probe] if probe is not None else [], PROBES),
        ("--metric", metric or [], METRICS),
        ("--contrast", [contrast], ("repeated", "changed")),
    ):
        for one in given:
            if one not in allowed:
                raise BadInput(f"{option}: got {one!r}; allowed: {', '.join(allowed)}")
    for one in dtype or ():
        require_dtype(one)
    places = [_layer(one) for one in layer] if layer else "final"
    asked = _lengths(lengths, up_to)
    options: dict[str, Any] = {
        "separator_every": separator_every,
        "separator": separator,
        "contrast": contrast,
        "template": template,
        "word": word,
    }
    options |= {"level": "text" if text_level else "tokens", "p": p, "seed": seed, "samples": samples}
    loaded = boot(model, device, _held(dtype or []))
    found = propagation_overview(
        loaded,
        text,
        probe=probe,
        probe_options=options,
        lengths=asked,
        layers=places,
        metrics=metric or ("linf_heads", "linf"),
        dtypes=dtype or None,
        separators=(separator_every or 3,) if mitigations else (),
        without_explosion=without_explosion,
        answers=answers,
        exact=exact,
        prepend_bos=bos,
        batch_tokens=batch_tokens,
    )
    for sentence in propagated(found):
        typer.echo(sentence)
    _echo_curve(found)
    for critical in found.critical_lengths:
        typer.echo(_critical(critical))
    _echo_more(found)
    for note in found.notes:
        typer.echo(f"({note})")
    for name, reason in found.missing.items():
        typer.echo(f"({name}: {reason})")
    if json_file is not None:
        from sd_lens.display.records import collapse_record, write_json

        write_json(collapse_record(found), json_file)
    if out is not None:
        from sd_lens.display.pages import write_page
        from sd_lens.display.propagation_page import render_propagation

        write_page(render_propagation(found), out)


def _layer(text: str) -> int | str:
    if text == "final":
        return text
    if not text.isdecimal():
        raise BadInput(f"--layer: got {text!r}; allowed: a block, counted from 0, or final")
    return int(text)


def _lengths(text: str | None, up_to: int | None) -> list[int] | None:
    """The lengths asked for; None for all that are taken by default."""
    if text is not None:
        for one in text.split(","):
            if not one.strip().isdecimal() or not int(one):
                raise BadInput(f"--lengths: got {one!r}; allowed: whole numbers from 1, separated by commas")
        return [int(one) for one in text.split(",")]
    if up_to is None:
        return None
    steps = (round(2 ** (step / 4)) for step in range(4 * up_to.bit_length() + 1))
    return sorted({length for length in steps if length <= up_to} | {up_to})


def _held(precisions: list[str]) -> str:
    """What the weights are held in: the one precision asked for, or one that holds all of them."""
    if len(set(precisions)) == 1:
        return precisions[0]
    return "float64" if "float64" in precisions else "float32"


def _critical(critical: Any) -> str:
    below, equal = (
        f"none up to {critical.longest}" if length is None else str(length) for length in (critical.below_epsilon, critical.equal)
    )
    where = "" if critical.layer == "final" else f" after block {critical.layer}"
    start = f"critical length in {critical.dtype}{where}, machine epsilon {critical.epsilon:.3g}"
    if critical.measured != critical.dtype:
        return f"{start}, by the distances in {critical.measured}: {below}"
    return f"{start}: {below}; equal to the bit: {equal}"


_SHOWN = 12
"""So many lengths are printed."""


def _spread(lengths: Any) -> set[int]:
    return {lengths[round(place * (len(lengths) - 1) / (_SHOWN - 1))] for place in range(_SHOWN)}


def _echo_curve(found: Any) -> None:
    """A row per length, a column per precision, layer and metric."""
    import pandas as pd

    spread = _spread(found.curve.lengths)
    columns: dict[str, dict[int, str]] = {}
    for row in found.curve.rows():
        if row["length"] in spread:
            layer = row["layer"] if isinstance(row["layer"], str) else f"block {row['layer']}"
            cell = f"{row['mean']:.4g}" + (" (equal)" if row["equal"] else "")
            columns.setdefault(f"{row['dtype']} {layer} {row['metric']}", {})[row["length"]] = cell
    frame = pd.DataFrame(columns).rename_axis("length").reset_index()
    typer.echo(f"\n{frame.to_string(index=False)}\n")


def _echo_more(found: Any) -> None:
    """The tables of what else was asked for."""
    tables = {}
    if found.mitigations is not None:
        tables["with separators"] = found.mitigations.to_dataframe().dropna(axis="columns", how="all")
    if found.consequences is not None:
        tables["without the explosion subspace"] = found.consequences.to_dataframe().dropna(axis="columns", how="all")
    if found.answers is not None:
        summary = found.answers.summary()
        tables["answers"] = summary[summary["length"].isin(_spread(summary["length"].tolist()))]
    for title, frame in tables.items():
        typer.echo(f"\n{title}\n{frame.to_string(index=False, na_rep='', float_format='%.4g')}")
