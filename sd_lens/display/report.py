"""The whole story on one page that needs no network: found or not, where, which sublayer, which linear map."""

from __future__ import annotations

from markupsafe import Markup

from sd_lens.anatomy import Anatomy
from sd_lens.display.explanation_sections import attention, components, massive, scans, text_tokens, trigger
from sd_lens.display.intervention_sections import removal, response
from sd_lens.display.labels import number
from sd_lens.display.pages import Section, page, reading, write_page
from sd_lens.display.sections import linear_maps, sections
from sd_lens.display.tokens import script_bundle
from sd_lens.findings import Findings
from sd_lens.interventions.causality import Causality
from sd_lens.linear.directions import BlockDirections
from sd_lens.models.files import require_writable
from sd_lens.pathways import Pathways
from sd_lens.tracing.defects import Defects
from sd_lens.wording import finding

__all__ = ["render", "render_anatomy", "render_causality", "render_pathways", "render_spectrum", "require_writable", "write_page"]


def render(findings: Findings) -> str:
    """The report as one HTML page of about 6 MB, nearly all of it plotly's and CircuitsVis' scripts.

    Args:
        findings: From `sd_lens.findings.analyse`.
    """
    built = sections(findings)  # before the scripts are read: an error should not take long to show
    defects = findings.defects
    return page(
        defects.trace.model_name,
        findings.sentences(),
        defect_facts(defects),
        built,
        found=defects.found,
        circuitsvis=script_bundle(),
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
    ]
    built = [
        Section("maps", "Linear maps", linear_maps(directions)),
        Section("how-to-read", "How to read this", reading(maps=True)),
    ]
    return page(directions.model_name, directions.sentences(), facts, built)


def render_anatomy(anatomy: Anatomy) -> str:
    """What an explosion is made of, as one HTML page.

    Args:
        anatomy: From `sd_lens.anatomy.anatomy`.
    """
    pieces = {
        "components": ("Which components", components(anatomy)),
        "trigger": ("What sets it off", trigger(anatomy)),
        "massive": ("Massive activations", massive(anatomy)),
    }
    return _explanation(anatomy.defects, anatomy.sentences(), pieces)


def render_pathways(pathways: Pathways) -> str:
    """How tokens get to a high norm, as one HTML page.

    Args:
        pathways: From `sd_lens.pathways.pathways`.
    """
    pieces = {
        "scans": ("Tokens by themselves", scans(pathways, each=True)),
        "text-tokens": ("Two pathways", text_tokens(pathways)),
        "attention": ("Attention sinks and repeats", attention(pathways)),
    }
    return _explanation(pathways.defects, pathways.sentences(), pieces)


def render_causality(causality: Causality) -> str:
    """What removing the explosion subspace does, as one HTML page.

    Args:
        causality: From `sd_lens.interventions.causality.causality`.
    """
    pieces = {
        "removal": ("Without the explosion subspace", removal(causality)),
        "response": ("What the FFN answers", response(causality)),
    }
    return _explanation(causality.defects, causality.sentences(), pieces, edited=causality.consequences is not None)


def _explanation(
    defects: Defects, sentences: tuple[str, ...], pieces: dict[str, tuple[str, Markup | None]], *, edited: bool = False
) -> str:
    built = [Section(id, title, fragment) for id, (title, fragment) in pieces.items() if fragment is not None]
    built.append(Section("how-to-read", "How to read this", reading(found=bool(defects.tokens), explained=True, edited=edited)))
    return page(defects.trace.model_name, (finding(defects), *sentences), defect_facts(defects), built, found=defects.found)


def defect_facts(defects: Defects) -> list[tuple[str, str]]:
    """Name and value of what a reader of high-norm tokens looks for first; only what applies."""
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
    return facts
