"""How a signature is taken: from activations, or from weights alone."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from sd_lens.applications.signature import METHODS, Method, Positions, Signature, with_sign
from sd_lens.applications.weight_scan import CLEAR_GAP, MIN_GAP, beside, explosion_among, ffn_stretches, why_none
from sd_lens.models.loading import load, require_usable, weights_of
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts
from sd_lens.models.version import version
from sd_lens.models.weights import ModelWeights
from sd_lens.tracing.arguments import require_block
from sd_lens.tracing.defects import Defects, find_defects
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.prompts import default_prompts
from sd_lens.tracing.trace import MIN_RATIO, require_ratio

_SCATTERED = 30.0
"""Vectors further apart than this on average are no one direction."""
_MOST_TOKENS = 8
"""So many different tokens are named in a signature."""


def signature(
    model: TransformerLensModel | ModelWeights | str | os.PathLike[str],
    *,
    method: Method | None = None,
    prompts: Prompts | None = None,
    block: int | None = None,
    min_ratio: float = MIN_RATIO,
    batch_tokens: int = 4096,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> Signature:
    """The direction of a model's high-norm tokens, as something to keep and to compare.

    Args:
        model: A TransformerLens model; or ``"tiny"``, a checkpoint folder or a hub name; or its `weights_of`.
        method: ``"activations"``, the defect direction measured on prompts (Wang et al., arXiv 2502.07004, section 3), for which a folder
            is loaded; or ``"weights"``, the leading left singular vector of the explosion block's FFN, ``I + F``, for which a folder is read
            block by block, so that it may be larger than memory. Default: activations, and weights of a `weights_of`.
        prompts: What to measure on; default: built-in texts, or random token ids for a model without a tokenizer.
        block: Of weights, the block to take it from; default: the one whose FFN stands out most, if its largest singular value is at least
            1.4 times its second.
        min_ratio: Of activations, least norm of a high-norm token, as a multiple of the other tokens' median.
        batch_tokens: Of activations, largest number of tokens run at once.
        device: Where a folder's model runs, or where to compute with weights; default: the CPU, or where the weights are.
        dtype: What weights from a folder are converted to; default: float32 for activations, as stored for weights.
        progress: Whether to show progress bars.

    Returns:
        The signature. Where there is no defect it has no direction and says why.

    Raises:
        ValueError: An option is not one of those allowed or does not go with the method; the model, folder or prompts are unusable.
        FileNotFoundError: The folder does not exist.

    Example:
        >>> from sd_lens.linear.angles import acute_angle
        >>> from sd_lens.models.loading import load
        >>> measured, from_weights = signature(load("tiny")), signature("tiny", method="weights")
        >>> measured.block, from_weights.block, bool(acute_angle(measured.direction, from_weights.direction) < 7)
        (2, 2, True)
    """
    named = isinstance(model, str | os.PathLike)
    chosen = require_method(method, weights=isinstance(model, ModelWeights))
    require_ratio(min_ratio)
    if not named and dtype is not None:
        raise ValueError(f"dtype: got {dtype} with a ready model; allowed: none, as it keeps its own")
    if chosen == "weights":
        if prompts is not None:
            raise ValueError("prompts: got some with method 'weights', which runs nothing; allowed: none, or method 'activations'")
        weights = model if isinstance(model, ModelWeights) else weights_of(model, dtype=dtype) if named else weights_of(model)
        return _from_weights(weights, block, device=device, progress=progress)
    if block is not None:
        raise ValueError(f"block: got {block!r} with method 'activations', which finds it; allowed: none, or method 'weights'")
    live: Any = model
    if named:
        live = load(os.fspath(live), dtype=dtype or torch.float32, **({} if device is None else {"device": device}))
    elif device is not None:
        raise ValueError(f"device: got {device!r} with a ready model to be run; allowed: none, as it stays where it is")
    require_usable(live)
    text = default_prompts(live) if prompts is None else prompts
    trace = trace_norms(live, text, min_ratio=min_ratio, batch_tokens=batch_tokens, progress=progress)
    return signature_of(find_defects(trace, min_ratio=min_ratio), prompts="built-in" if prompts is None else "given")


def signature_of(defects: Defects, *, prompts: str = "given") -> Signature:
    """The signature of a model whose high-norm tokens have been found already; nothing is run.

    Args:
        defects: From `find_defects`, of a trace with its direction.
        prompts: What was traced, for the record: ``"given"`` or ``"built-in"``.

    Returns:
        The signature by activations.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> model = planted().model
        >>> signature_of(find_defects(trace_norms(model, torch.arange(10).unsqueeze(0)))).block
        1
    """
    trace, measured = defects.trace, defects.direction
    bare = Signature(
        direction=None,
        model_name=trace.model_name,
        d_model=trace.d_model,
        n_blocks=trace.n_blocks,
        method="activations",
        block=defects.main_block,
        prompts=prompts,
        n_prompts=trace.n_prompts,
        version=version(),
    )
    if not defects.tokens:
        largest = float(trace.ratios[1:].max())
        reason = (
            f"no token's norm reaches {defects.min_ratio:g} times the median of the others (the largest ratio is {largest:.1f})"
        )
        return replace(bare, because=reason)
    if measured is None:
        return replace(bare, because="the direction of its high-norm tokens was not measured, or they cancel")
    spread = measured.mean_pairwise_angle_deg
    notes = []
    if defects.main_block is None:
        notes.append("no block makes the norm in one step")
    if spread > _SCATTERED:
        notes.append(f"the vectors of its high-norm tokens are {spread:.0f}° apart on average: they have no one direction")
    return replace(
        bare,
        direction=with_sign(measured.direction),
        n_tokens=measured.n_tokens,
        tokens=tuple(text for text, _ in Counter(token.token for token in defects.tokens).most_common(_MOST_TOKENS)),
        positions=_positions(defects),
        spread_deg=None if spread != spread else spread,
        notes=tuple(notes),
    )


def _positions(defects: Defects) -> Positions:
    initial = {token.pos == 0 for token in defects.tokens}
    return "both" if len(initial) > 1 else "initial" if True in initial else "later"


def require_method(method: Any, *, weights: bool = False) -> Method:
    """The method asked for, or the default one.

    Args:
        method: What was given.
        weights: Whether there are weights only.

    Raises:
        ValueError: There is no such method, or weights cannot be run.
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"method: got {method!r}; allowed: {', '.join(map(repr, METHODS))}")
    if weights and method == "activations":
        raise ValueError("method: got 'activations' with weights only, which cannot be run; allowed: 'weights'")
    return method or ("weights" if weights else "activations")


def _from_weights(
    weights: ModelWeights, block: int | None, *, device: torch.device | str | None, progress: bool | None
) -> Signature:
    if block is not None:
        require_block(block, len(weights))
    stretches = ffn_stretches(weights, blocks=None if block is None else [block], device=device, progress=progress)
    found = explosion_among(stretches) if block is None else stretches[0]
    bare = Signature(
        direction=None,
        model_name=weights.name,
        d_model=weights.d_model,
        n_blocks=len(weights),
        method="weights",
        block=None,
        version=version(),
    )
    if found is None:
        return replace(bare, because=why_none(stretches))
    said = list(found.notes)
    if block is not None and not found.stands_out:
        said.append(f"the block was given; its FFN does not stand out ({found.gap:.3g} times the second, below {MIN_GAP:g})")
    if block is not None and found.cancels:
        said.append("the block cancels what it reads, as a decay block does")
    if block is None:
        if found.gap < CLEAR_GAP:
            said.append(
                f"its FFN stands out only a little ({found.gap:.3g} times the second, {MIN_GAP:g} is the least): measure it to be sure"
            )
        said += beside(found, stretches)
    return replace(bare, direction=with_sign(found.u), block=found.block, gap=found.gap, notes=tuple(said))
