"""What ways to quantise, sets of spared projections and losses are called where a reader sees them."""

from __future__ import annotations

from sd_lens.applications.quantization_result import DETECTED, QuantizationStudy, QuantizedRow, above

_METHODS = {"rtn": "RTN", "smoothquant": "SmoothQuant"}
_SETS = {"none": "nothing", DETECTED: "explosion and decay blocks"}
_BLOCK = "block "


def scheme_name(method: str, granularity: str) -> str:
    """A method with its granularity: ``RTN per-tensor``."""
    return f"{_METHODS.get(method, method)} {granularity.replace('_', '-')}"


def set_name(spared: str) -> str:
    """What a set of spared projections is called in a table or figure."""
    return _SETS.get(spared, spared)


def block_of(spared: str) -> int | None:
    """The block of a set that is this one block's down-projection; None of any other set."""
    number = spared.removeprefix(_BLOCK)
    return int(number) if number != spared and number.isdecimal() else None


def named_sets(study: QuantizationStudy) -> tuple[str, ...]:
    """The sets of a study that are not single blocks, each once, in its order."""
    return tuple(dict.fromkeys(row.spared for row in study.rows[1:] if block_of(row.spared) is None))


def excess(study: QuantizationStudy, row: QuantizedRow) -> str:
    """By how much a row's perplexity exceeds that of full precision: ``+4.0 %``, from tenfold on ``× 250``."""
    return above(row.loss, study.full.loss)


def perplexity(row: QuantizedRow) -> str:
    """A perplexity, two decimals as in the literature; short where it is beyond all use."""
    return f"{row.perplexity:,.2f}" if row.perplexity < 1e6 else f"{row.perplexity:.3g}"
