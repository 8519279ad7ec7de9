"""What eight-bit quantisation costs a model, and which projections it must spare.

Wang et al. (ICML 2025, arXiv 2502.07004), section 6: the high-norm tokens make outliers in what the down-projections of the explosion and
decay blocks read and write. One range for the whole tensor then leaves ordinary tokens with hardly a step, so these few projections are kept in high
precision.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.applications.calibration import Scales, channel_maxima, projection_ranges, require_alpha, smoothing_scales
from sd_lens.applications.int8 import GRANULARITIES, Granularity
from sd_lens.applications.perplexity import mean_loss, require_text, windows_of
from sd_lens.applications.quantization_result import (
    DETECTED,
    FULL,
    METHODS,
    RECOMMENDED,
    Method,
    QuantizationStudy,
    QuantizedRow,
    Recommendation,
)
from sd_lens.applications.quantizing import logits_of, quantized
from sd_lens.applications.sparing import Search, smallest_set
from sd_lens.applications.texts import default_text
from sd_lens.applications.torchao_backend import require_torchao, torchao_quantized
from sd_lens.models.projections import Projection, projections
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.tracing.arguments import require_whole
from sd_lens.tracing.defects import Defects, find_defects
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.trace import MIN_RATIO

Backend = Literal["fake", "torchao"]
BACKENDS: tuple[Backend, ...] = ("fake", "torchao")
CALIBRATED = 8192
"""SmoothQuant's scales, ranges and errors are measured on so many of the calibration text's first tokens."""
TRACED = 2048
"""Explosion and decay blocks are looked for in so many of them."""


def quantization_study(
    model: TransformerLensModel,
    text: str | Int[Tensor, "pos"] | None = None,
    *,
    methods: Sequence[Method] = METHODS,
    granularities: Sequence[Granularity] = ("per_tensor",),
    alpha: float = 0.5,
    spare: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    each_block: bool = True,
    recommend: Method | None = "rtn",
    budget: float = 0.02,
    max_spared: int | None = None,
    unembedding: bool = False,
    ranges: bool = True,
    defects: Defects | None = None,
    min_ratio: float = MIN_RATIO,
    window: int | None = None,
    stride: int | None = None,
    prepend_bos: bool | None = None,
    calibration: str | Int[Tensor, "sample"] | None = None,
    backend: Backend = "fake",
    batch_tokens: int = 2048,
    progress: bool | None = None,
) -> QuantizationStudy:
    """Perplexity of a text with every linear projection of the blocks in eight bits (weights and inputs), some of them spared.

    Args:
        model: A `TransformerBridge` around a Hugging Face model; it is as before afterwards, also after an error.
        text: The text, or its token ids without BOS; default: one that ships with the package.
        methods: ``"rtn"`` (round to nearest), ``"smoothquant"``, or both.
        granularities: ``"per_tensor"`` (one range for a matrix, and for what it reads in a window), ``"per_token"`` (a range for every
            output and token), or both.
        alpha: SmoothQuant's migration strength, 0 to 1.
        spare: Names of projections in the Hugging Face model that are spared in a row of its own, or several such lists by name.
        each_block: Whether to spare each block's down-projection alone, too.
        recommend: The method for which the smallest set of down-projections within the budget is searched for, with the first of
            ``granularities``; None for no search. It takes an evaluation per block and projection found.
        budget: By how much the perplexity may exceed that of full precision, as a share of it.
        max_spared: Largest number of projections recommended; default: any.
        unembedding: Whether the unembedding is quantised, too. The embedding is looked up, not multiplied, and stays as it is.
        ranges: Whether to measure ranges and errors of every projection.
        defects: Where explosion and decay blocks are known already; default: they are looked for in the text's first windows.
        min_ratio: What counts as a high norm there.
        window: Tokens per window, BOS included; default: 128. Published perplexities use 2048 and more.
        stride: How many tokens each window after the first adds; default: windows do not overlap.
        prepend_bos: Whether BOS stands in front of every window; default: the model's convention.
        calibration: The text that SmoothQuant's scales, ranges and errors are measured on, in windows that do not overlap, up to 8192 tokens;
            default: ``text`` itself.
        backend: ``"fake"`` (rounded floating-point numbers) or ``"torchao"`` (its int8 kernels, on a copy of the model; needs
            ``sd-lens[quantization]``).
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show a progress bar; None shows one on a terminal or in a notebook once the work takes seconds.

    Returns:
        The study.

    Raises:
        ValueError: The text is shorter than a window, a name is of no projection, or an argument is unusable: before any work.

    Example:
        >>> from sd_lens.models.loading import load
        >>> study = quantization_study(load("tiny"), default_text()[:4000], methods=["rtn"], each_block=False, ranges=False)
        >>> study.recommendation.spared
        ('model.layers.2.mlp.down_proj',)
    """
    _require_options(methods, granularities, alpha, recommend, budget, max_spared, backend)
    everything = projections(model)
    chosen = [one for one in everything if one.block is not None or (unembedding and one.role == "unembed")]
    down = {one.block: one.name for one in chosen if one.is_down and one.block is not None}
    given = _given(spare, chosen)
    ids = require_text(model, default_text() if text is None else text)
    windows = windows_of(model, ids, window=window, stride=stride, prepend_bos=prepend_bos)
    other = ids if calibration is None else require_text(model, calibration, "calibration")
    other = other[: max(CALIBRATED, windows.length)]
    some = windows_of(
        model, other, window=window, prepend_bos=prepend_bos, argument="text" if calibration is None else "calibration"
    )
    notes = []
    if defects is None:
        prompts = list(some.ids[: max(1, TRACED // some.length)].unbind())
        defects = find_defects(
            trace_norms(model, prompts, min_ratio=min_ratio, batch_tokens=batch_tokens, progress=progress), min_ratio=min_ratio
        )
    excluded = tuple(one.name for one in everything if one not in chosen)
    sets: dict[str, tuple[str, ...]] = {"none": ()}
    special = sorted({*defects.explosion_blocks, *defects.decay_blocks} & down.keys())
    if special:
        sets[DETECTED] = tuple(down[block] for block in special)
    else:
        notes.append("no explosion or decay block with a dense FFN was found on this text")
    if each_block:
        sets |= {f"block {block}": (name,) for block, name in down.items()}
    sets |= given
    smooth: Scales | None = None
    if "smoothquant" in methods:
        smooth = smoothing_scales(chosen, channel_maxima(model, chosen, some, batch_tokens=batch_tokens), alpha)
    scales: dict[str, Scales | None] = {"rtn": None, "smoothquant": smooth}
    if any(one.part for one in chosen):
        notes.append("fused projections are quantised part by part, as TransformerLens splits them")
    if any(one.is_conv1d for one in chosen):
        notes.append(
            "torchao and llm-compressor find nn.Linear layers only: GPT-2's Conv1D layers are none, and have to become some first"
        )

    schemes: list[tuple[Method, Granularity]] = [(method, granularity) for method in methods for granularity in granularities]
    hidden = None if progress is None else not progress
    run = {"fake": quantized, "torchao": torchao_quantized}[backend]
    with tqdm(total=1 + len(schemes) * len(sets), desc="quantising", unit="set", delay=2.0, disable=hidden, leave=False) as bar:
        full = mean_loss(logits_of(model), windows, batch_tokens=batch_tokens, progress=False)
        bar.update()

        def loss(method: str, granularity: Granularity, spared: tuple[str, ...]) -> float:
            with run(model, chosen, granularity, spared=spared, scales=scales[method]) as logits:
                value = mean_loss(logits, windows, batch_tokens=batch_tokens, progress=False)
            bar.update()
            return value

        rows = [QuantizedRow(FULL, "", "none", (), full)]
        for method, granularity in schemes:
            rows += [
                QuantizedRow(method, granularity, name, names, loss(method, granularity, names)) for name, names in sets.items()
            ]
        recommendation = None
        if recommend is not None:
            first = granularities[0]
            known = {row.names: row.loss for row in rows if (row.method, row.granularity) == (recommend, first)}
            search = smallest_set(
                lambda spared: loss(recommend, first, spared),
                list(down.values()),
                full=full,
                budget=budget,
                max_spared=max_spared,
                known=known,
            )
            recommendation = Recommendation(
                recommend,
                first,
                budget,
                _ordered(search, list(down.values())),
                excluded,
                alpha if recommend == "smoothquant" else None,
                full,
            )
            if search.spared:
                rows.append(QuantizedRow(recommend, first, RECOMMENDED, recommendation.spared, search.loss))
    measured = ()
    if ranges:
        named: dict[str, tuple[Granularity, Scales | None]] = {
            f"{method}, {granularity}": (granularity, scales[method]) for method, granularity in schemes
        }
        measured = projection_ranges(model, chosen, some, named, batch_tokens=batch_tokens)
    return QuantizationStudy(
        model_name=str(getattr(model.cfg, "model_name", "model")),
        d_model=int(model.cfg.d_model),
        n_blocks=int(model.cfg.n_layers),
        rows=tuple(rows),
        ranges=measured,
        explosion_blocks=defects.explosion_blocks,
        decay_blocks=defects.decay_blocks,
        recommendation=recommendation,
        backend=backend,
        window=windows.length,
        stride=windows.stride,
        bos=windows.bos is not None,
        n_tokens=windows.n_scored,
        n_calibrated=some.n_text,
        excluded=excluded,
        alpha=alpha,
        notes=tuple(notes),
    )


def _require_options(
    methods: Sequence[str],
    granularities: Sequence[str],
    alpha: float,
    recommend: str | None,
    budget: float,
    max_spared: int | None,
    backend: str,
) -> None:
    for name, got, allowed in (("methods", methods, METHODS), ("granularities", granularities, GRANULARITIES)):
        if isinstance(got, str) or not got or any(one not in allowed for one in got):
            raise ValueError(f"{name}: got {got!r}; allowed: a list of {', '.join(allowed)}")
    require_alpha(alpha)
    if recommend is not None and recommend not in methods:
        raise ValueError(f"recommend: got {recommend!r}; allowed: None, or one of the methods ({', '.join(methods)})")
    if not isinstance(budget, (int, float)) or not (math.isfinite(budget) and budget >= 0):
        raise ValueError(f"budget: got {budget!r}; allowed: 0 and more, such as 0.02 for 2 %")
    if max_spared is not None:
        require_whole("max_spared", max_spared, 0)
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend == "torchao":
        require_torchao()


def _given(spare: Sequence[str] | Mapping[str, Sequence[str]] | None, chosen: Sequence[Projection]) -> dict[str, tuple[str, ...]]:
    """The lists that were given, by name, once all of their names are of projections."""
    if spare is None:
        return {}
    if isinstance(spare, str):
        raise ValueError(f"spare: got {spare!r}; allowed: a list of names, or lists by name")
    lists: Any = spare if isinstance(spare, Mapping) else {"given": spare}
    known = [one.name for one in chosen]
    for label, names in lists.items():
        if label in ("none", DETECTED, RECOMMENDED) or label.startswith("block "):
            raise ValueError(f"spare: got a list called {label!r}, which the study uses itself; allowed: another name")
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"spare: got {names!r}; allowed: a list of names, or lists by name")
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1) or known[:1]
                raise ValueError(
                    f"spare: got {name!r}; allowed: names of linear projections in the Hugging Face model, such as {close[0]!r}"
                )
    return {label: tuple(dict.fromkeys(names)) for label, names in lists.items()}


def _ordered(search: Search, names: Sequence[str]) -> Search:
    """The same with the spared projections in the order of the blocks."""
    return replace(search, spared=tuple(name for name in names if name in search.spared))
