"""``sd-lens quantize``: what eight-bit quantisation costs a model, and which projections to spare."""

from __future__ import annotations

from collections.abc import Sequence
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
    Model,
    Out,
    Top,
    boot,
    read_text,
    require_writable_files,
)


@command
def quantize(
    model: Model = "tiny",
    text: Annotated[
        Path | None,
        typer.Option("--text", help="A text file (UTF-8) to measure perplexity on; default: one that ships with sd_lens."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="A text file that SmoothQuant's scales, ranges and errors are measured on; default: the text itself."),
    ] = None,
    out: Out = None,
    json_file: Json = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="'rtn' (round to nearest) or 'smoothquant'; may be given several times; default: both."),
    ] = None,
    granularity: Annotated[
        list[str] | None,
        typer.Option(
            help="'per_tensor' (one range for a matrix and for what it reads) or 'per_token' (one per output and token); may be given several times; "
            "default: per_tensor."
        ),
    ] = None,
    alpha: Annotated[float, typer.Option(help="SmoothQuant's migration strength.", min=0, max=1)] = 0.5,
    spare: Annotated[
        list[str] | None,
        typer.Option(help="A projection to spare, by its name in the Hugging Face model; may be given several times."),
    ] = None,
    spare_file: Annotated[Path | None, typer.Option(help="A text file with the same, one name per line.")] = None,
    budget: Annotated[
        float, typer.Option(help="By how much the perplexity may exceed that of full precision, as a share of it.", min=0)
    ] = 0.02,
    recommend: Annotated[
        str | None,
        typer.Option(
            help="The method that the smallest set to spare is searched for, 'rtn' or 'smoothquant', or 'none'; default: the first method."
        ),
    ] = None,
    max_spared: Annotated[int | None, typer.Option(help="Largest number of projections recommended; default: any.", min=0)] = None,
    each_block: Annotated[bool, typer.Option(help="Spare each block's down-projection alone, too.")] = True,
    window: Annotated[int | None, typer.Option(help="Tokens per window, BOS included; default: 128.", min=2)] = None,
    stride: Annotated[
        int | None, typer.Option(help="How many tokens each window adds; default: windows do not overlap.", min=1)
    ] = None,
    bos: Annotated[
        bool | None, typer.Option("--bos/--no-bos", help="Whether BOS stands before every window; default: the model's convention.")
    ] = None,
    unembedding: Annotated[bool, typer.Option("--unembedding", help="Quantise the unembedding, too.")] = False,
    backend: Annotated[
        str,
        typer.Option(help="'fake' (rounded floating-point numbers) or 'torchao' (its int8 kernels; needs sd-lens[quantization])."),
    ] = "fake",
    top: Top = 5,
    min_ratio: MinRatio = 6.0,
    batch_tokens: BatchTokens = 2048,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """What quantising to eight bits costs in perplexity, and which few projections to spare; settings for torchao and llm-compressor."""
    from sd_lens.applications.int8 import GRANULARITIES
    from sd_lens.applications.quantization import BACKENDS, quantization_study
    from sd_lens.applications.quantization_result import METHODS
    from sd_lens.applications.torchao_backend import require_torchao

    require_writable_files(out, json_file)
    methods: Any = _chosen("--method", method or METHODS, METHODS)
    granularities: Any = _chosen("--granularity", granularity or GRANULARITIES[:1], GRANULARITIES)
    kernels: Any = _chosen("--backend", [backend], BACKENDS)[0]
    sought: Any = None if recommend == "none" else methods[0] if recommend is None else recommend
    if sought is not None:
        _chosen("--recommend", [sought], (*methods, "none"))
    if backend == "torchao":
        require_torchao()
    content = None if text is None else _content(text, "--text")
    calibrated = None if calibration is None else _content(calibration, "--calibration")
    spared = _names(spare, spare_file)
    loaded = boot(model, device, dtype)
    study = quantization_study(
        loaded,
        content,
        methods=methods,
        granularities=granularities,
        alpha=alpha,
        spare=spared,
        each_block=each_block,
        recommend=sought,
        budget=budget,
        max_spared=max_spared,
        unembedding=unembedding,
        min_ratio=min_ratio,
        window=window,
        stride=stride,
        prepend_bos=bos,
        calibration=calibrated,
        backend=kernels,
        batch_tokens=batch_tokens,
    )
    for sentence in study.sentences():
        typer.echo(sentence)
    _echo_perplexities(study)
    _echo_ranges(study, top)
    _echo_settings(study)
    for note in study.notes:
        typer.echo(f"({note})")
    if json_file is not None:
        from sd_lens.display.quantization_records import quantize_record
        from sd_lens.display.records import write_json

        write_json(quantize_record(study), json_file)
    if out is not None:
        from sd_lens.display.pages import write_page
        from sd_lens.display.quantization_sections import render_quantization

        write_page(render_quantization(study), out)


def _chosen(option: str, chosen: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """What was chosen, each once."""
    for one in chosen:
        if one not in allowed:
            raise BadInput(f"{option}: got {one!r}; allowed: {', '.join(allowed)}")
    return list(dict.fromkeys(chosen))


def _content(file: Path, option: str) -> str:
    """What a text file holds, unless it is empty."""
    content = read_text(file, option)
    if not content.strip():
        raise BadInput(f"{option}: {file} is empty; allowed: a text file with something in it")
    return content


def _names(spare: list[str] | None, file: Path | None) -> list[str] | None:
    """Names of projections to spare."""
    if spare and file:
        raise BadInput("--spare, --spare-file: got both; allowed: one of them")
    if file is not None:
        return [line.strip() for line in _content(file, "--spare-file").splitlines() if line.strip()]
    return spare or None


def _echo_perplexities(study: Any) -> None:
    """A row per set of spared projections, a column per method: blocks may be many, methods are few."""
    import pandas as pd

    from sd_lens.display.quantization_words import excess, perplexity, scheme_name, set_name

    columns: dict[str, dict[str, str]] = {}
    for row in study.rows[1:]:
        cell = f"{perplexity(row)} ({excess(study, row)})"
        columns.setdefault(scheme_name(row.method, row.granularity), {})[set_name(row.spared)] = cell
    frame = pd.DataFrame(columns).fillna("–").rename_axis("spared").reset_index()
    typer.echo(f"\nperplexity (and how much more than in full precision, {perplexity(study.full)})")
    typer.echo(_left(frame))


def _echo_ranges(study: Any, top: int) -> None:
    """The projections that lose most of ordinary tokens."""
    import pandas as pd

    from sd_lens.display.quantization_words import scheme_name

    scheme = study.schemes[0]
    key = ", ".join(scheme)
    worst = sorted(study.ranges, key=lambda one: one.token_sqnr_db[key])[:top]
    frame = pd.DataFrame(
        {
            "projection": [f"{one.name} ({one.part})" if one.part else one.name for one in worst],
            "SQNR of tokens (dB)": [f"{one.token_sqnr_db[key]:.1f}" for one in worst],
            "largest input": [f"{one.input_max:.4g}" for one in worst],
            "typical token's": [f"{one.input_typical:.4g}" for one in worst],
            "largest weight": [f"{one.weight_max:.4g}" for one in worst],
            "typical output's": [f"{one.weight_typical:.4g}" for one in worst],
        }
    )
    typer.echo(f"\nworst kept of {len(study.ranges)} projections ({scheme_name(*scheme)})")
    typer.echo(_left(frame))


def _left(frame: Any) -> str:
    """A table whose first column is aligned to the left."""
    first = frame.columns[0]
    width = max(len(first), *(len(text) for text in frame[first]))
    shown = frame.assign(**{first: frame[first].str.ljust(width)}).rename(columns={first: first.ljust(width)})
    return str(shown.to_string(index=False))


def _echo_settings(study: Any) -> None:
    found = study.recommendation
    if found is not None:
        typer.echo(f"\n# torchao\n{found.torchao()}\n# llm-compressor\n{found.llm_compressor()}".rstrip("\n"))
