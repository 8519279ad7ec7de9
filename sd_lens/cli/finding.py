"""``sd-lens report``, ``sd-lens trace``, ``sd-lens check``: is there an explosion, and which analyses apply."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sd_lens.cli.app import command
from sd_lens.cli.arguments import (
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

    require_writable_files(out, json_file)
    prompts = given_prompts(text, prompts_file)
    loaded = boot(model, device, dtype)
    findings = make_report(loaded, prompts, out=out, json=json_file, min_ratio=min_ratio, batch_tokens=batch_tokens)
    for sentence in findings.sentences():
        typer.echo(sentence)
    typer.echo(f"Report: {out.resolve()}")


@command
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

    require_writable_files(out, json_file)
    prompts = given_prompts(text, prompts_file)
    loaded = boot(model, device, dtype)
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
        from sd_lens.models.files import write_text

        write_text(traced.plot().to_html(include_plotlyjs=True), out)


@command
def check(
    model: Model = "tiny",
    json_file: Json = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Does a model keep the identities that the analyses rest on, and which of them apply to it."""
    from sd_lens.models.check import check as check_model

    require_writable_files(None, json_file)
    result = check_model(boot(model, device, dtype))
    typer.echo(result)
    typer.echo(result.to_dataframe().to_string(index=False, na_rep="", float_format="%.1e"))
    typer.echo(result.analyses().to_string(index=False))
    if json_file is not None:
        from sd_lens.display.records import check_record, write_json

        write_json(check_record(result), json_file)
