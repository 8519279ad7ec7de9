"""The main job in one call: is there an explosion, where, what makes it, what sets it off, and for which tokens.

`analyse` runs the analyses of ``tracing/`` and ``linear/`` one after the other; `Findings` holds their results and says in a few
sentences what they show. It stands below ``display/``, which draws it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sd_lens.anatomy import Anatomy, anatomy, attempt
from sd_lens.applications.uses import Uses, uses
from sd_lens.interventions.causality import Causality, causality
from sd_lens.interventions.generation import BEGINNINGS
from sd_lens.linear.directions import BlockDirections, directions_of
from sd_lens.models.check import Check, check
from sd_lens.models.loading import weights_of
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts
from sd_lens.pathways import Pathways, pathways
from sd_lens.propagation.overview import Propagation
from sd_lens.propagation.overview import propagation_overview as propagation
from sd_lens.spectrum import entering_norms
from sd_lens.tracing.defects import Defects, find_defects
from sd_lens.tracing.source import Source, source_of
from sd_lens.tracing.sublayers import SublayerAttribution, attribute_sublayers
from sd_lens.tracing.trace import MIN_RATIO
from sd_lens.wording import finding, propagated, whence

SCANNED = 2048
"""Of larger vocabularies, a sample of so many token ids is scanned; ``sd-lens pathways`` scans them all."""
GENERATED = 12
"""A text with the explosion subspace removed goes on for so many tokens; ``sd-lens patch`` asks for more, and of two texts."""

FELT = 20
"""Sensitivities are those of so many of the first prompt's tokens at most; ``sd-lens collapse`` takes any text."""


@dataclass(frozen=True)
class Findings:
    """Everything the report shows.

    Attributes:
        check: Which identities the model keeps.
        defects: Explosion and decay blocks and high-norm tokens, with the trace they were found in.
        attribution: Which sublayers of these blocks write the norm.
        directions: Singular directions and eigenvalues of every block; None where the model cannot be linearised.
        no_directions_because: The reason for that, else empty.
        anatomy: What the explosion is made of.
        pathways: How tokens get to a high norm.
        causality: What the explosion's subspace does.
        uses: The model's signature, and what a quantiser must spare.
        propagation: How information gets to the last token; None where it cannot be told.
        no_propagation_because: The reason for that, else empty.
    """

    check: Check
    defects: Defects
    attribution: SublayerAttribution
    directions: BlockDirections | None
    no_directions_because: str
    anatomy: Anatomy
    pathways: Pathways
    causality: Causality
    uses: Uses
    propagation: Propagation | None
    no_propagation_because: str

    def sentences(self) -> tuple[str, ...]:
        """What was found: the first sentence says whether anything was, the second what makes it."""
        parts = (self.anatomy, self.pathways, self.causality, self.uses) if self.defects.found else ()
        said = [sentence for part in parts for sentence in part.sentences()]
        more = () if self.propagation is None else propagated(self.propagation)
        return finding(self.defects), whence(self), *said, *more

    def __repr__(self) -> str:
        return f"Findings({' '.join(self.sentences())})"


def analyse(
    model: TransformerLensModel,
    prompts: Prompts | None = None,
    *,
    prepend_bos: bool | None = None,
    min_ratio: float = MIN_RATIO,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> Findings:
    """Traces prompts, finds defects, explains them, and compares every block's linear map with the defect direction.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids; default: built-in texts, or random token ids for a model
            without a tokenizer.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        min_ratio: Least norm of a high-norm token, as a multiple of the other tokens' median.
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show progress bars.

    Returns:
        The results.

    Raises:
        ValueError: The model or the prompts are unusable.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> analyse(planted().model).defects.explosion_blocks
        (1,)
    """
    checked = check(model)
    if any(row.check == "causality" and row.passed is False for row in checked.rows):
        raise ValueError("model: its tokens change those before them; allowed: causal decoders")
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
    source = source_of(model, prompts, may_need=(), prepend_bos=prepend_bos, **options)
    trace = source.trace(min_ratio=min_ratio)
    defects = find_defects(trace, min_ratio=min_ratio)
    directions, reason = None, _because(checked, "block_directions")
    if not reason:
        direction = None if trace.direction is None else trace.direction.direction
        directions = directions_of(weights_of(model), direction, norms=entering_norms(defects), progress=progress)
        if direction is not None:
            directions = replace(directions, reference_source="measured")
    missing: dict[str, str] = {}
    first = trace.tokens[trace.prompt == 0][:FELT]
    return Findings(
        check=checked,
        defects=defects,
        attribution=attribute_sublayers(model, defects, batch_tokens=batch_tokens),
        directions=directions,
        no_directions_because=reason,
        anatomy=anatomy(model, source, min_ratio=min_ratio, **options),
        pathways=pathways(model, source, max_ids=SCANNED, min_ratio=min_ratio, **options),
        causality=_causality(model, source, defects, checked, prepend_bos=prepend_bos, **options),
        uses=uses(model, defects, prompts="built-in" if prompts is None else "given", **options),
        propagation=attempt("propagation", missing, lambda: propagation(model, [first], **options)),
        no_propagation_because=missing.get("propagation", ""),
    )


def _causality(model: TransformerLensModel, source: Source, defects: Defects, checked: Check, **options: Any) -> Causality:
    """Zero ablation and one short text only, so that a report is made in one go."""
    reason = _because(checked, "consequences")
    if reason and defects.found:
        return Causality(defects, None, None, {"consequences": reason, "response": reason})
    return causality(
        model, source, mean=False, generate=BEGINNINGS[:1], max_new_tokens=GENERATED, min_ratio=defects.min_ratio, **options
    )


def _because(checked: Check, analysis: str) -> str:
    """What stands against an analysis; empty where it applies."""
    if checked.applies(analysis):
        return ""
    table = checked.analyses()
    return str(table.loc[table.analyses.str.contains(analysis), "because"].item())
