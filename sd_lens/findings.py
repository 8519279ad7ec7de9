"""The main job in one call: is there an explosion, where, and which sublayer makes it.

`analyse` runs the analyses of ``tracing/`` and ``linear/`` one after the other; `Findings` holds their results and says in two
sentences what they show. It stands below ``display/``, which draws it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sd_lens.linear.directions import BlockDirections, directions_of
from sd_lens.models.check import Check, check
from sd_lens.models.loading import weights_of
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts
from sd_lens.spectrum import entering_norms
from sd_lens.tracing.defects import Defects, find_defects
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.prompts import default_prompts
from sd_lens.tracing.sublayers import SublayerAttribution, attribute_sublayers
from sd_lens.tracing.trace import MIN_RATIO


@dataclass(frozen=True)
class Findings:
    """Everything the report shows.

    Attributes:
        check: Which identities the model keeps.
        defects: Explosion and decay blocks and high-norm tokens, with the trace they were found in.
        attribution: Which sublayers of these blocks write the norm.
        directions: Singular directions and eigenvalues of every block; None where the model cannot be linearised.
        no_directions_because: The reason for that, else empty.
    """

    check: Check
    defects: Defects
    attribution: SublayerAttribution
    directions: BlockDirections | None
    no_directions_because: str

    def sentences(self) -> tuple[str, str]:
        """What was found, in two sentences."""
        return _what(self), _whence(self)

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
    """Traces prompts, finds defects, attributes them, and compares every block's linear map with the defect direction.

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
        >>> from sd_lens.models.loading import load
        >>> analyse(load("tiny")).defects.found
        True
    """
    checked = check(model)
    if any(row.check == "causality" and row.passed is False for row in checked.rows):
        raise ValueError("model: its tokens change those before them; allowed: causal decoders")
    prompts = default_prompts(model, prepend_bos=prepend_bos) if prompts is None else prompts
    trace = trace_norms(model, prompts, prepend_bos=prepend_bos, min_ratio=min_ratio, batch_tokens=batch_tokens, progress=progress)
    defects = find_defects(trace, min_ratio=min_ratio)
    directions, reason = None, ""
    if checked.applies("block_directions"):
        direction = None if trace.direction is None else trace.direction.direction
        directions = directions_of(weights_of(model), direction, norms=entering_norms(defects), progress=progress)
        if direction is not None:
            directions = replace(directions, reference_source="measured")
    else:
        table = checked.analyses()
        reason = str(table.loc[table.analyses.str.contains("block_directions"), "because"].item())
    return Findings(checked, defects, attribute_sublayers(model, defects, batch_tokens=batch_tokens), directions, reason)


def _what(findings: Findings) -> str:
    defects = findings.defects
    trace = defects.trace
    n_tokens = trace.norms.shape[1]
    traced = f"{n_tokens} tokens of {trace.n_prompts} prompt{'s' * (trace.n_prompts != 1)}"
    if not defects.tokens:
        largest = float(trace.ratios[1:].max())
        return (
            f"No explosion was found in {trace.model_name}: over {traced}, no token's norm reaches {defects.min_ratio:g} times the "
            f"median of the other tokens after any block (the largest ratio is {largest:.1f})."
        )
    top = max(defects.tokens, key=lambda token: token.ratio)
    who = _who(defects)
    peak = f"the strongest, {top.token!r} at position {top.pos}, reaches {top.ratio:.1f} times the median of the others (norm {top.norm:.0f})"
    if not defects.found:
        return f"{trace.model_name} has {who} among {traced} ({peak}), but no block makes their norm in one step."
    decay = f"falls again in {_blocks(defects.decay_blocks)}" if defects.decay_blocks else "does not fall again before the end"
    return f"{trace.model_name} has an explosion in {_blocks(defects.explosion_blocks)}: {who} among {traced}; {peak}, and the norm {decay}."


def _who(defects: Defects) -> str:
    count, initial = len(defects.tokens), sum(token.pos == 0 for token in defects.tokens)
    if count == 1:
        return "1 high-norm token"
    where = {count: "all at position 0", 0: "none at position 0"}.get(initial, f"{initial} at position 0, {count - initial} later")
    return f"{count} high-norm tokens ({where})"


def _whence(findings: Findings) -> str:
    defects, directions = findings.defects, findings.directions
    if not defects.found:
        return "There is nothing to attribute." if not defects.tokens else "The growth of their norm is spread over several blocks."
    parts = []
    for share in findings.attribution.shares:
        if share.block in defects.explosion_blocks:
            name = "FFN" if share.main_part == "ffn" else "attention"
            value = share.ffn_share if share.main_part == "ffn" else 1 - share.ffn_share
            parts.append(f"the {name} of block {share.block} writes {value:.0%} of its step")
    text = " and ".join(parts)
    if directions is None:
        return f"{text[0].upper()}{text[1:]}; its linear map was not computed ({findings.no_directions_because})."
    angles = [directions.row(block).angle_deg for block in defects.explosion_blocks]
    special = {*defects.explosion_blocks, *defects.decay_blocks}
    others = [row.angle_deg for row in directions.rows if row.part == "block" and row.block not in special]
    beside = f", against {min(others):.0f}° or more in the blocks that neither explode nor decay" if others else ""
    shown = ", ".join(f"{angle:.0f}°" for angle in angles)
    which = "that block's linear map is" if len(angles) == 1 else "those blocks' linear maps are"
    vector = "the leading left singular vector of" if len(angles) == 1 else "the leading left singular vectors of"
    return f"{text[0].upper()}{text[1:]}, and {vector} {which} {shown} from the direction of the high-norm tokens{beside}."


def _blocks(blocks: tuple[int, ...]) -> str:
    return f"block{'s' * (len(blocks) != 1)} {', '.join(map(str, blocks))}"
