"""What an explosion is made of, in one call: norm and trigger split over components, massive activations, super weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts
from sd_lens.tracing.arguments import require_block
from sd_lens.tracing.attribution import attribute_norm, attribute_trigger
from sd_lens.tracing.census import MassiveActivations, massive_activations
from sd_lens.tracing.defects import Defects, find_defects
from sd_lens.tracing.shares import Attribution
from sd_lens.tracing.source import Source, source_of
from sd_lens.tracing.super_weights import SuperWeights, super_weights
from sd_lens.tracing.trace import MIN_RATIO

NOTHING = "no explosion was found"

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Anatomy:
    """What an explosion is made of.

    Attributes:
        defects: The high-norm tokens and the blocks that make them.
        norm: Their projection on the defect direction, split; None where there is nothing to split or it cannot be.
        trigger: What sets the explosion off, split.
        massive: The massive activations.
        super_weights: The single weights that make them.
        missing: Why a result is None, by its name.
    """

    defects: Defects
    norm: Attribution | None
    trigger: Attribution | None
    massive: MassiveActivations
    super_weights: SuperWeights | None
    missing: dict[str, str]

    def sentences(self) -> tuple[str, ...]:
        """What was found, in at most two sentences."""
        said = []
        if self.norm is not None:
            where = f"the projection on the defect direction after block {self.norm.block}"
            said.append(f"In {_who(self.norm)}, {where} is written by {_composition(self.norm)}.")
        if self.trigger is not None:
            total = float(self.trigger.total[self.trigger.main])
            said.append(
                f"In {_who(self.trigger)}, what sets off the FFN of block {self.trigger.block} (a coefficient of {total:.3g}; unrelated tokens "
                f"have about 1) is written by {_composition(self.trigger)}."
            )
        return tuple(said)


def _who(attribution: Attribution) -> str:
    group = attribution.rows[attribution.main].group
    return {"initial": "initial tokens", "delimiter": "later high-norm tokens", "other": "tokens without a high norm"}[group]


def _composition(attribution: Attribution) -> str:
    """The largest parts of the main row, with the neuron or expert that makes most of each where it is known."""
    row, pieces = attribution.main, []
    for part in attribution.top(3, row=row).to_dict("records"):
        if abs(part["share"]) < 0.05:
            break
        inner = ""
        if part["kind"] == "ffn" and part["block"] in attribution.inside:
            best = attribution.top(1, row=row, inside=int(part["block"])).iloc[0]
            known = best["kind"] != "ffn_bias" and abs(best["share"]) >= 0.05
            inner = f"; its {best['kind']} {best['index']} alone {best['share']:.0%}" if known else ""
        pieces.append(f"{part['name']} ({part['share']:.0%}{inner})")
    return " and ".join(pieces) or "many parts, none with 5 %"


def anatomy(
    model: TransformerLensModel,
    prompts: Prompts | Source | None = None,
    *,
    block: int | Literal["explosion", "peak"] = "explosion",
    neurons: bool = True,
    by_key: bool = False,
    prepend_bos: bool | None = None,
    min_ratio: float = MIN_RATIO,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> Anatomy:
    """Runs the analyses that tell what an explosion is made of; those that do not apply are left out with the reason.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids; default: built-in texts.
        block: Where norms are split, see `attribute_norm`.
        neurons: Whether to split FFNs over their neurons or experts.
        by_key: Whether to split heads by what they take from the token itself and from others.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        min_ratio: Least norm of a high-norm token, as a multiple of the other tokens' median.
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show progress bars.

    Raises:
        ValueError: The model or the prompts are unusable, or the block does not exist.

    Example:
        >>> import torch
        >>> from sd_lens.models.planted import planted
        >>> anatomy(planted().model, torch.arange(10).unsqueeze(0)).sentences()[0][:75]
        'In initial tokens, the projection on the defect direction after block 1 is '
    """
    source = source_of(model, prompts, may_need=(), prepend_bos=prepend_bos, batch_tokens=batch_tokens, progress=progress)
    n_blocks = int(model.cfg.n_layers)
    require_block(block, n_blocks, names=("explosion", "peak"))
    defects = find_defects(source.trace(min_ratio=min_ratio), min_ratio=min_ratio)
    missing: dict[str, str] = {}
    options: dict[str, Any] = {"neurons": neurons, "by_key": by_key, "min_ratio": min_ratio}
    at: int | Literal["explosion"] = block if isinstance(block, int) else "explosion"
    # High-norm tokens whose norm no single block makes still have a direction, and can be split after a block that is named.
    has_norm = defects.direction is not None and (defects.found or block != "explosion")
    has_trigger = defects.found or (isinstance(block, int) and bool(defects.tokens))
    return Anatomy(
        defects=defects,
        norm=attempt("norm", missing, lambda: attribute_norm(model, source, block=block, **options), has_norm),
        trigger=attempt("trigger", missing, lambda: attribute_trigger(model, source, block=at, **options), has_trigger),
        massive=massive_activations(model, source),
        super_weights=attempt("super_weights", missing, lambda: super_weights(model, source, min_ratio=min_ratio)),
        missing=missing,
    )


def attempt(name: str, missing: dict[str, str], run: Callable[[], _Result], found: bool = True) -> _Result | None:
    """The result of an analysis, or None where it does not apply to a model, with the reason noted.

    Args:
        name: The analysis.
        missing: Where the reason is noted.
        run: The analysis.
        found: Whether there is anything to analyse.
    """
    if not found:
        missing[name] = NOTHING
        return None
    try:
        return run()
    except ValueError as error:  # weights of an architecture that cannot be read, attention that shows no pattern
        missing[name] = str(error)
        return None
