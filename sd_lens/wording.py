"""What was found, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_lens.tracing.defects import Defects

if TYPE_CHECKING:
    from sd_lens.findings import Findings
    from sd_lens.propagation.overview_result import Propagation


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


def propagated(found: Propagation) -> tuple[str, ...]:
    """How far apart two inputs stay at the last token, in which precision they become one, and which tokens the last one feels."""
    said = [_collapse(found)]
    if found.critical_lengths:
        said.append(_critical(found))
    if found.sensitivity is not None:
        said.append(_felt(found))
    return tuple(said)


_METRICS = {"linf": "L∞", "l2": "L2", "l1": "L1", "relative": "L2 over the length", "cosine": "1 − cosine", "kl": "KL in nats"}


def _collapse(found: Propagation) -> str:
    curve = found.curve
    plain = next((name for name in curve.metrics if name in ("linf", "l2", "l1")), None)
    dtype, layer, metric = curve.line(metric=plain, layer="final" if "final" in curve.layers else None)
    values = curve.values[dtype, layer, metric].mean((0, 2)).tolist()
    second = (
        "the same with its last element once more" if curve.probe["contrast"] == "repeated" else "the same with the digit changed"
    )
    where = {"final": "the last token's final representations", "logits": "the predictions after them"}
    place = where.get(str(layer), f"the last token's vectors after block {layer}")
    every = curve.probe["separator_every"]
    probe = f"probe {curve.probe['name']}" + (f", a separator every {every} elements" if every else "")
    heads = ", mean of head-sized chunks" if metric.endswith("_heads") else ""
    what = _METRICS.get(metric.removesuffix("_heads"), "share of pairs with different predictions") + heads
    return (
        f"Of an input and {second} ({probe}), {place} are {values[0]:.3g} apart at length {curve.lengths[0]} and {values[-1]:.3g} at length "
        f"{curve.lengths[-1]} ({what}, {dtype})."
    )


def _critical(found: Propagation) -> str:
    """Of the first layer, by each precision's own run; where that never stays below, by that of the finest one."""
    groups: dict[str, list[str]] = {}
    every = [one for one in found.critical_lengths if one.layer == found.critical_lengths[0].layer]
    for critical in every:
        if critical.measured != critical.dtype:
            continue
        where = "never" if critical.below_epsilon is None else f"from length {critical.below_epsilon} on"
        if critical.below_epsilon is None:
            finer = next(
                (one for one in every if one.dtype == critical.dtype and one.measured != one.dtype and one.below_epsilon), None
            )
            where = "never" if finer is None else f"never (by {finer.measured}'s distances from length {finer.below_epsilon} on)"
        where += "" if critical.equal is None else f" (equal to the bit at length {critical.equal})"
        groups.setdefault(where, []).append(critical.dtype)
    pieces = []
    for where, dtypes in groups.items():
        never, named = where.startswith("never"), " and ".join(dtypes)
        pieces.append(f"never in {named}{where.removeprefix('never')}" if never else f"in {named} {where}")
    return f"Below machine epsilon they stay, up to length {found.curve.lengths[-1]}: {'; '.join(pieces)}."


def _felt(found: Propagation) -> str:
    felt = found.sensitivity
    assert felt is not None
    n = felt.position + 1
    most = int(felt.frobenius[0, :n].argmax())
    text = f"Of {n} token{'s' * (n != 1)} of a text the last one feels {felt.texts[most]!r} at position {most} most"
    high = felt.high_norm[:n]
    if bool(high.any()):
        share = float(felt.share[0, :n][high].sum())
        who = "the high-norm token has" if int(high.sum()) == 1 else f"the {int(high.sum())} high-norm tokens have"
        text += f"; {who} {share:.2%} of the sum of squared sensitivities"
    correlation = found.correlation.get("theorem")
    if correlation is not None:
        text += f"; the over-squashing bound orders the tokens with a rank correlation of {correlation:.2f} to the true order"
    return f"{text}."


def _blocks(blocks: tuple[int, ...]) -> str:
    return f"block{'s' * (len(blocks) != 1)} {', '.join(map(str, blocks))}"
