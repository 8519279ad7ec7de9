"""What was found, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_lens.tracing.defects import Defects

if TYPE_CHECKING:
    from sd_lens.findings import Findings


def finding(defects: Defects) -> str:
    """Whether there are high-norm tokens, which, and where their norm comes and goes."""
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


def whence(findings: Findings) -> str:
    """Which sublayer writes the norm, and whether the block's linear map points there."""
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
