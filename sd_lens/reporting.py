"""The report: `sd_lens.findings.analyse` and the page that shows what it found."""

from __future__ import annotations

import os
from typing import Any

from sd_lens.findings import Findings, analyse
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts


def report(
    model: TransformerLensModel,
    prompts: Prompts | None = None,
    out: str | os.PathLike[str] = "sd-lens-report.html",
    *,
    json: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Findings:
    """Analyses a model and writes what was found as one self-contained page.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids; default: built-in texts.
        out: Where to write the page (HTML).
        json: Where to write the machine-readable result; None for nowhere.
        **options: Passed on to `sd_lens.analyse` (``prepend_bos``, ``min_ratio``, ``batch_tokens``, ``progress``).

    Returns:
        The results shown on the page.

    Raises:
        ValueError: ``out`` or ``json`` cannot be written (seen before any work), or the model or prompts are unusable.

    Example:
        >>> from sd_lens.models.loading import load
        >>> report(load("tiny"), out="report.html").defects.found  # doctest: +SKIP
        True
    """
    from sd_lens.display.records import report_record, write_json
    from sd_lens.display.report import render, write_page
    from sd_lens.models.files import require_writable

    if json is not None and os.path.realpath(out) == os.path.realpath(json):
        raise ValueError(f"out, json: got {os.fspath(out)!r} for both; allowed: two files")
    require_writable(out)
    if json is not None:
        require_writable(json, argument="json")
    findings = analyse(model, prompts, **options)
    page, record = render(findings), report_record(findings)
    write_page(page, out)
    if json is not None:
        write_json(record, json)
    return findings
