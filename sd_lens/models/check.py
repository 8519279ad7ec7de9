"""Does a model keep the identities that the analyses rest on, and which analyses apply to it?

The answer is measured on the model at hand, not looked up by its name: a handful of random tokens is run through it, and what the
hooks show is compared with what `BlockWeights` says they must show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.ffn_input import ffn_input
from sd_lens.models.loading import inference, require_usable, weights_of
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.weights import BlockWeights, MoEWeights

# Relative to the largest entry compared. Half precision rounds every product of a long chain.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2

_EDITED = "FFN input"

# Nothing needs the FFN's pre-activations by themselves: its output is rebuilt through them, and a mixture of experts shows none.
_ANALYSES = {
    "trace_norms, find_defects, defect_direction": ("residual hooks", "block identity", "causality"),
    "weights_of": ("value vectors", "attention output", "FFN output"),
    "linearize, block_directions": ("value vectors", "attention output", "attention alone", "FFN output"),
    "ExplosionSubspace, patch_sweep, consequences": ("residual hooks", "block identity", "FFN output", _EDITED),
}


@dataclass(frozen=True)
class CheckRow:
    """One thing checked.

    Attributes:
        check: What was compared.
        passed: True or False; None where the model has nothing to compare.
        error: Largest deviation relative to the largest entry, over all blocks; None where nothing was measured.
        block: Block with the largest deviation.
        detail: Reason of a failure, or of having nothing to compare.
    """

    check: str
    passed: bool | None
    error: float | None = None
    block: int | None = None
    detail: str = ""


@dataclass(frozen=True)
class Check:
    """What was checked on a model, and which analyses apply to it.

    Attributes:
        model_name: The model.
        tolerance: Largest relative deviation that passes.
        rows: One per check.
    """

    model_name: str
    tolerance: float
    rows: tuple[CheckRow, ...]

    def applies(self, analysis: str) -> bool:
        """Whether an analysis applies, by the name of one of its functions."""
        needed = next((needs for names, needs in _ANALYSES.items() if analysis in names.split(", ")), None)
        if needed is None:
            known = ", ".join(_ANALYSES)
            raise ValueError(f"analysis: got {analysis!r}; allowed: one of {known}")
        return not self._against(needed)

    def _against(self, needed: tuple[str, ...]) -> list[str]:
        """What stands against an analysis that needs these checks: those that did not pass, or were not reached."""
        rows = {row.check: row for row in self.rows}
        not_reached = CheckRow("", None, detail="not measured")
        outcomes = {check: rows.get(check, not_reached) for check in needed}
        return [f"{check}: {row.detail or 'deviates'}" for check, row in outcomes.items() if not row.passed]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per check."""
        return pd.DataFrame([vars(row) for row in self.rows])

    def analyses(self) -> pd.DataFrame:
        """One row per group of analyses: whether it applies, and what stands against it."""
        found = {names: self._against(needed) for names, needed in _ANALYSES.items()}
        return pd.DataFrame(
            [{"analyses": names, "applies": not against, "because": "; ".join(against)} for names, against in found.items()]
        )

    def __repr__(self) -> str:
        passed = sum(row.passed is True for row in self.rows)
        return f"Check({self.model_name}: {passed} of {len(self.rows)} checks passed)"

    def _repr_html_(self) -> str:
        return f"{self.to_dataframe().to_html(index=False)}{self.analyses().to_html(index=False)}"


def check(model: TransformerLensModel, *, seed: int = 0) -> Check:
    """Checks a model on two short prompts of random tokens.

    Args:
        model: A TransformerLens model.
        seed: Seeds the tokens.

    Returns:
        The outcome; print it, or see `Check.to_dataframe` and `Check.analyses`.

    Raises:
        ValueError: The model is not a causal TransformerLens decoder with unprocessed weights.

    Example:
        >>> from sd_lens.models.loading import load
        >>> check(load("tiny")).applies("block_directions")
        True
    """
    require_usable(model)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.cfg.d_vocab, (2, 8), generator=generator)
    n_blocks: int = model.cfg.n_layers
    residual = hook_names.residual_points(n_blocks) + [
        name(block) for block in range(n_blocks) for name in (hook_names.resid_pre, hook_names.attn_out, hook_names.mlp_out)
    ]
    missing = [name for name in dict.fromkeys(residual) if not _has_hook(model, name)]
    if missing:
        return Check(_name(model), 0.0, (CheckRow("residual hooks", False, detail=f"missing: {', '.join(missing[:4])}"),))
    optional = [
        name(block)
        for block in range(n_blocks)
        for name in (hook_names.value, hook_names.mixed_values, hook_names.ffn_pre, hook_names.ffn_linear)
    ]
    cache = _capture(model, tokens, [*dict.fromkeys(residual), *(name for name in optional if _has_hook(model, name))])
    silent = [name for name in dict.fromkeys(residual) if name not in cache]
    if silent:
        return Check(_name(model), 0.0, (CheckRow("residual hooks", False, detail=f"never run: {', '.join(silent[:4])}"),))
    tolerance = _TOLERANCE.get(cache[hook_names.resid_pre(0)].dtype, _HALF_TOLERANCE)
    rows = [
        CheckRow("residual hooks", True),
        _identity(cache, n_blocks, tolerance),
        _causality(model, tokens, cache, tolerance),
    ]
    rows += _rebuilt(model, cache, tolerance)
    rows.append(
        _edited(model, tokens, tolerance) if rows[-1].passed else CheckRow(_EDITED, None, detail="FFN output is not rebuilt")
    )
    return Check(_name(model), tolerance, tuple(rows))


def _name(model: Any) -> str:
    return str(getattr(model.cfg, "model_name", "model"))


def _has_hook(model: Any, name: str) -> bool:
    return name in model.hook_dict


def _capture(model: Any, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(value: Tensor, hook: Any) -> None:
            kept[name] = value.detach().clone()

        return hook

    with inference(model):
        model.run_with_hooks(tokens.to(model.cfg.device), fwd_hooks=[(name, keep(name)) for name in names], return_type=None)
    return kept


def _deviation(got: Tensor, wanted: Tensor, *yardsticks: Tensor) -> float:
    """Largest difference, relative to the largest entry of what is compared and of the yardsticks.

    A yardstick is what the compared numbers are sums of, or are added to: where those cancel, rounding of the terms is no error.
    """
    scale = max(float(tensor.abs().max()) for tensor in (wanted, *yardsticks)) or 1.0
    return float((got.reshape(wanted.shape).float() - wanted.float()).abs().max()) / scale


def _terms(x: Tensor, weight: Tensor) -> Tensor:
    """How large the terms are that a product with a weight adds up."""
    return x.abs() @ weight.abs()


def _row(name: str, errors: dict[int, float], tolerance: float) -> CheckRow:
    worst = max(errors, key=errors.__getitem__)
    return CheckRow(name, errors[worst] <= tolerance, errors[worst], worst)


def _identity(cache: dict[str, Tensor], n_blocks: int, tolerance: float) -> CheckRow:
    errors = {}
    for block in range(n_blocks):
        names = (hook_names.resid_pre(block), hook_names.attn_out(block), hook_names.mlp_out(block))
        errors[block] = _deviation(sum((cache[name] for name in names), torch.zeros(())), cache[hook_names.resid_post(block)])
        if block > 0:  # what leaves a block is what enters the next
            between = _deviation(cache[hook_names.resid_pre(block)], cache[hook_names.resid_post(block - 1)])
            errors[block] = max(errors[block], between)
    return _row("block identity", errors, tolerance)


def _causality(model: Any, tokens: Tensor, cache: dict[str, Tensor], tolerance: float) -> CheckRow:
    last = hook_names.resid_post(model.cfg.n_layers - 1)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % model.cfg.d_vocab
    error = _deviation(_capture(model, changed, [last])[last][:, :-1], cache[last][:, :-1])
    detail = "" if error <= tolerance else "a token changes those before it"
    return CheckRow("causality", error <= tolerance, error, model.cfg.n_layers - 1, detail)


@torch.no_grad()  # activation functions may have parameters
def _rebuilt(model: TransformerLensModel, cache: dict[str, Tensor], tolerance: float) -> list[CheckRow]:
    names = ("value vectors", "attention output", "attention alone", "FFN pre-activations", "FFN output")
    errors: dict[str, dict[int, float]] = {name: {} for name in names}
    mixtures = 0
    weights = weights_of(model)
    try:
        for block in weights:
            mixtures += isinstance(block.ffn, MoEWeights)
            for name, error in _block_errors(block, cache).items():
                errors[name][block.block] = error
    except ValueError as error:
        return [CheckRow(name, None, detail=str(error)) for name in names]
    absent = dict.fromkeys(names, "hook points missing")
    if mixtures == len(weights):
        absent["FFN pre-activations"] = "a mixture of experts shows none"
    return [_row(name, errors[name], tolerance) if errors[name] else CheckRow(name, None, detail=absent[name]) for name in names]


def _block_errors(weights: BlockWeights, cache: dict[str, Tensor]) -> dict[str, float]:
    """Deviations of one block: every sublayer is recomputed from the hooks before it and compared with the hooks after it."""
    block = weights.block
    resid = cache[hook_names.resid_pre(block)]
    v, z = cache.get(hook_names.value(block)), cache.get(hook_names.mixed_values(block))
    errors = {}
    if v is not None:
        x = weights.attention.input(resid)
        terms = _terms(x.flatten(0, -2), weights.attention.W_V)
        errors["value vectors"] = _deviation(weights.attention.values(x), v, terms)
    attn_out = cache[hook_names.attn_out(block)]
    if z is not None:
        heads = z.reshape(*resid.shape[:-1], *weights.attention.W_O.shape[:2])
        errors["attention output"] = _deviation(weights.attention.output(heads), attn_out, resid)
    # The first token attends to itself alone, as the linear maps have it. What stands between values and output shows here.
    errors["attention alone"] = _deviation(weights.attention.alone(resid[:, 0]), attn_out[:, 0], resid[:, 0])
    ffn, ffn_out = weights.ffn, cache[hook_names.mlp_out(block)]
    entering = resid if weights.parallel else resid + attn_out
    x = ffn.input(entering)
    if isinstance(ffn, MoEWeights):
        settled = _settled(ffn, x)
        errors["FFN output"] = _deviation(ffn.output(x[settled]), ffn_out.reshape(x.shape)[settled], resid)
        return errors
    pre, linear = ffn.pre(x)
    compared = [(pre, cache.get(hook_names.ffn_pre(block)), ffn.W_in if linear is None else ffn.W_gate)]
    if linear is not None:
        compared.append((linear, cache.get(hook_names.ffn_linear(block)), ffn.W_in))
    deviations = [
        _deviation(got, wanted.reshape(got.shape), _terms(x, weight))
        for got, wanted, weight in compared
        if wanted is not None and weight is not None
    ]
    if deviations:
        errors["FFN pre-activations"] = max(deviations)
    errors["FFN output"] = _deviation(ffn.output(ffn.hidden(x)), ffn_out, resid)
    return errors


def _edited(model: Any, tokens: Tensor, tolerance: float) -> CheckRow:
    """Does an edit of what an FFN reads reach it? Every FFN is given its neighbour's input, and must answer to that."""
    errors: dict[int, float] = {}
    try:
        places = {weights.block: ffn_input(model, weights) for weights in weights_of(model)}
    except ValueError as error:
        return CheckRow(_EDITED, None, detail=str(error))
    given: dict[int, Tensor] = {}

    def shift(block: int) -> Callable[..., Tensor]:
        def hook(activation: Tensor, hook: Any) -> Tensor:
            given[block] = activation.roll(1, dims=1)
            return given[block]

        return hook

    @torch.no_grad()
    def compare(block: int) -> Callable[..., None]:
        def hook(written: Tensor, hook: Any) -> None:
            if block not in given:
                return
            ffn, x = weights_of(model)[block].ffn, given.pop(block)
            if ffn.norm is not None and places[block].gain is None:
                x = x * ffn.norm.gain
                x = x if ffn.norm.bias is None else x + ffn.norm.bias
            if isinstance(ffn, MoEWeights):
                settled = _settled(ffn, x)
                errors[block] = _deviation(ffn.output(x[settled]), written.reshape(x.shape)[settled])
            else:
                errors[block] = _deviation(ffn.output(ffn.hidden(x)), written, _terms(ffn.hidden(x).flatten(0, -2), ffn.W_out))

        return hook

    hooks = [(place.name, shift(block)) for block, place in places.items()]
    hooks += [(hook_names.mlp_out(block), compare(block)) for block in places]
    with inference(model):
        model.run_with_hooks(tokens.to(model.cfg.device), fwd_hooks=hooks, return_type=None)
    silent = next((place.name for block, place in places.items() if block not in errors), None)
    if silent is not None:
        return CheckRow(_EDITED, False, detail=f"never run: {silent}")
    return _row(_EDITED, errors, tolerance)


def _settled(ffn: MoEWeights, x: Tensor) -> Tensor:
    """Which tokens are sent to their experts by more than rounding: between equal scores the model may choose otherwise.

    There is always one: if the scores of all tokens are as good as equal, it is the token where they are least so.
    """
    scores = ffn.logits(x).float()
    if ffn.top_k == scores.shape[-1]:
        return torch.ones_like(scores[..., 0], dtype=torch.bool)
    ranked = scores.sort(dim=-1, descending=True).values
    lead = ranked[..., ffn.top_k - 1] - ranked[..., ffn.top_k]
    rounding = max(1e-4, 2 * torch.finfo(x.dtype).eps) * scores.abs().max()
    return lead >= torch.minimum(rounding, lead.max())
