"""Sections on signatures: what one is, and what several say of each other."""

from __future__ import annotations

import pandas as pd
from markupsafe import Markup

from sd_lens.applications.chance import SAME_DEG, SELDOM, UNRELATED_DEG, Chance
from sd_lens.applications.distances import SignatureDistances
from sd_lens.applications.signature import Signature
from sd_lens.display.figures import lineage_map
from sd_lens.display.fragments import figure, joined, paragraph, subheading, table
from sd_lens.display.pages import Section, page

_PAIRS = {
    "a": "model",
    "b": "and",
    "angle_deg": "angle (°)",
    "verdict": "verdict",
    "chance": "random directions (°)",
    "because": "why not",
    "note": "note",
}
_MODELS = {
    "name": "model",
    "method": "by",
    "d_model": "d_model",
    "block": "block",
    "n_tokens": "high-norm tokens",
    "hash": "content hash",
    "because": "why none",
}


def signature_section(signature: Signature) -> Markup:
    """One signature: what it was taken from, its hash, its largest coordinates.

    Args:
        signature: From `signature`.

    Returns:
        A fragment for a page.
    """
    pieces = [paragraph(signature.sentence())]
    if signature.found:
        facts = [
            ("taken from", "activations" if signature.method == "activations" else "weights alone"),
            ("explosion block", "none" if signature.block is None else str(signature.block)),
            ("width", str(signature.d_model)),
        ]
        if signature.method == "activations":
            facts.append(("high-norm tokens", f"{signature.n_tokens} of {signature.n_prompts} {signature.prompts} prompts"))
        if signature.kind:
            facts.append(("of these tokens", signature.kind))
        if signature.spread_deg is not None:
            facts.append(("mean angle between their vectors", f"{signature.spread_deg:.1f}°"))
        if signature.gap is not None:
            facts.append(("largest over second singular value", f"{signature.gap:.3g}"))
        facts.append(("angle to a random direction", str(signature.chance)))
        facts.append(("content hash (SHA-256)", signature.content_hash))
        largest = ", ".join(f"{value:+.3f} at {index}".replace("-", "−") for index, value in signature.largest())
        facts.append(("largest coordinates", largest))
        pieces.append(table(pd.DataFrame(facts, columns=["fact", "value"]), {"fact": "", "value": ""}))
        pieces.append(
            paragraph(
                "A checkpoint trained on from this one keeps nearly the same direction; one trained from another seed has a direction that is "
                "about as far away as a random one."
            )
        )
    return joined([*pieces, *_noted(signature.notes)])


def distances_section(distances: SignatureDistances) -> Markup:
    """Angles between several signatures: the map with its tree, the verdicts, the models.

    Args:
        distances: From `signature_distances`.

    Returns:
        A fragment for a page.
    """
    pairs = distances.to_dataframe()
    pairs["chance"] = [
        f"{mean:.1f} ± {std:.1f}" if mean == mean else "–"
        for mean, std in zip(pairs["chance_mean_deg"], pairs["chance_std_deg"], strict=True)
    ]
    columns = {name: heading for name, heading in _PAIRS.items() if name not in ("because", "note") or bool(pairs[name].any())}
    return joined(
        [
            figure(lineage_map(distances), "lineage", min_width=260 + 44 * len(distances.names)),
            subheading("Verdicts"),
            table(pairs, columns, formats={"angle_deg": ".1f"}),
            paragraph(_thresholds(distances)),
            subheading("Models"),
            _models(distances),
            *_noted(distances.notes),
        ]
    )


def render_signatures(distances: SignatureDistances) -> str:
    """Signatures of one or several models as one HTML page.

    Args:
        distances: From `signature_distances`.
    """
    first = distances.signatures[0]
    if len(distances.names) == 1:
        facts = [("blocks", str(first.n_blocks)), ("d_model", str(first.d_model)), ("method", first.method)]
        built = [Section("signature", "Signature", signature_section(first))]
        return page(distances.names[0], distances.sentences(), facts, built, found=first.found)
    facts = [
        ("models", str(len(distances.names))),
        ("families", str(len(distances.families))),
        ("widths", ", ".join(map(str, sorted({one.d_model for one in distances.signatures})))),
    ]
    built = [Section("lineage", "Lineage", distances_section(distances))]
    return page("Lineage", distances.sentences(), facts, built, found=bool(distances.families))


def _models(distances: SignatureDistances) -> Markup:
    rows = [
        {
            "name": name,
            "method": one.method,
            "d_model": one.d_model,
            "block": "–" if one.block is None else str(one.block),
            "n_tokens": str(one.n_tokens) if one.method == "activations" else "–",
            "hash": one.content_hash[:16] if one.found else "–",
            "because": one.because,
        }
        for name, one in zip(distances.names, distances.signatures, strict=True)
    ]
    frame = pd.DataFrame(rows)
    columns = {name: heading for name, heading in _MODELS.items() if name != "because" or bool(frame["because"].any())}
    return table(frame, columns)


def _thresholds(distances: SignatureDistances) -> str:
    chances: dict[int, Chance] = {one.d_model: one.chance for one in distances.signatures if one.found and one.d_model > 1}
    if not chances:
        return "There are no two directions to compare."
    levels = "; ".join(
        f"for width {width}, {chance.same_deg:.1f}° and {chance.unrelated_deg:.1f}°" for width, chance in sorted(chances.items())
    )
    once = f"one pair of random directions in {round(1 / SELDOM)}"
    return (
        f"A pair is of the same lineage up to {SAME_DEG:g}°, or less where {once} is as near; it is unrelated from {UNRELATED_DEG:g}° on, or from "
        f"more where fewer than {once} are as near; between these it is undecided. That is, {levels}."
    )


def _noted(notes: tuple[str, ...]) -> list[Markup]:
    return [paragraph(f"Notes: {'; '.join(notes)}.")] if notes else []
