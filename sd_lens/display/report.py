"""The whole story on one page that needs no network: found or not, where, which sublayer, which linear map."""

from __future__ import annotations

import os

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sd_lens.display.files import require_writable, write_text
from sd_lens.display.fragments import environment
from sd_lens.display.labels import number
from sd_lens.display.records import version
from sd_lens.display.sections import Section, linear_maps, reading, sections
from sd_lens.display.tokens import script_bundle
from sd_lens.findings import Findings
from sd_lens.linear.directions import BlockDirections

__all__ = ["render", "render_spectrum", "require_writable", "write_page"]


def render(findings: Findings) -> str:
    """The report as one HTML page of about 6 MB, nearly all of it plotly's and CircuitsVis' scripts.

    Args:
        findings: From `sd_lens.findings.analyse`.
    """
    built = sections(findings)  # before the scripts are read: an error should not take long to show
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            model=findings.defects.trace.model_name,
            found=findings.defects.found,
            sentences=findings.sentences(),
            facts=key_facts(findings),
            sections=built,
            version=version(),
            plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
            circuitsvis=Markup(script_bundle()),
        )
    )


def render_spectrum(directions: BlockDirections) -> str:
    """The table of all blocks' linear maps, with its figures, as one HTML page.

    Args:
        directions: From `block_directions`.
    """
    facts = [
        ("blocks", str(directions.n_blocks)),
        ("d_model", str(len(directions.reference))),
        ("angles to", directions.reference_name),
        ("sd_lens", version()),
    ]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            model=directions.model_name,
            found=True,
            sentences=directions.sentences(),
            facts=facts,
            sections=[
                Section("maps", "Linear maps", linear_maps(directions)),
                Section("how-to-read", "How to read this", reading(maps=True)),
            ],
            version=version(),
            plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
            circuitsvis="",
        )
    )


def key_facts(findings: Findings) -> list[tuple[str, str]]:
    """Name and value of what a reader looks for first; only what applies."""
    defects = findings.defects
    trace, direction = defects.trace, defects.direction
    facts = [
        ("blocks", str(trace.n_blocks)),
        ("d_model", str(trace.d_model)),
        ("prompts", str(trace.n_prompts)),
        ("tokens", str(trace.norms.shape[1])),
    ]
    if defects.tokens:
        facts += [
            ("high-norm tokens", str(len(defects.tokens))),
            ("explosion blocks", ", ".join(map(str, defects.explosion_blocks)) or "none"),
            ("decay blocks", ", ".join(map(str, defects.decay_blocks)) or "none"),
        ]
    else:
        facts.append(("largest ratio to the median", number(float(trace.ratios[1:].nan_to_num(nan=0.0).max()), 3)))
    if direction is not None:
        spread = direction.mean_pairwise_angle_deg
        angle = "" if spread != spread else f", {spread:.1f}° apart on average"
        facts.append(("defect direction", f"mean of {direction.n_vectors} vectors{angle}"))
    return [*facts, ("sd_lens", version())]


def write_page(page: str, path: str | os.PathLike[str]) -> None:
    """Writes a page, whole or not at all.

    Args:
        page: From `render`.
        path: The file, replaced if it exists; check it with `require_writable` before the analysis.

    Raises:
        OSError: It cannot be written there. Nothing is left behind.
    """
    write_text(page, path)
