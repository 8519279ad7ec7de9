"""From a block's weights to its linear maps: what is fitted to which inputs, and which conventions hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.linear.blocks import BlockMap
from sd_lens.linear.gaussian import FFNFit, fit_ffn
from sd_lens.linear.inputs import Inputs, in_words, require_inputs, resolve, root
from sd_lens.linear.moments import activation_moments
from sd_lens.linear.sampled import require_samples, sample_fit
from sd_lens.linear.sublayers import AttentionMap, FFNMap, MoEMap
from sd_lens.models.activations import Activation
from sd_lens.models.weights import AttentionWeights, BlockWeights, FFNWeights, MoEWeights, NormWeights

Estimator = Literal["closed_form", "sampled"]
_ESTIMATORS = ("closed_form", "sampled")
_T = TypeVar("_T")
# Vectors that the scale of a norm after a sublayer is averaged over: its relative error is about one in their number of entries' root.
_SCALE_SAMPLES = 256


class PostScales(NamedTuple):
    """What the norms after a block's sublayers divide by.

    Attributes:
        attention: The norm after attention.
        ffn: The norm after the FFN.
    """

    attention: float
    ffn: float


@torch.no_grad()  # an activation of a model may have parameters of its own
def linearize(
    weights: BlockWeights,
    *,
    inputs: Inputs = "unit",
    estimator: Estimator = "closed_form",
    samples: int = 100_000,
    seed: int = 0,
    paper: bool = False,
    router: Float[Tensor, "experts"] | None = None,
    post_scales: PostScales | None = None,
    device: torch.device | str | None = None,
) -> BlockMap:
    """Linearises a block: Wang et al. (arXiv 2502.07004), section 3, with the FFN's fit in closed form.

    Args:
        weights: The block, from `sd_lens.weights_of`.
        inputs: What the FFN is fitted to: ``"unit"``, the paper's ``N(0, I)`` at the projections; ``"gain"``, ``N(0, I)`` before
            the norm's gain and bias; or a `GaussianInput`, for example measured.
        estimator: ``"closed_form"``, or ``"sampled"``, the paper's least squares.
        samples: Number of samples of the sampled estimator.
        seed: Seeds the samples.
        paper: Whether to leave out, as the paper does, all biases and a LayerNorm's mean subtraction.
        router: Mean weight of each expert of a mixture, see `measure_router`; default: uniform.
        post_scales: What the norms after the sublayers divide by (Gemma 2 and 3, OLMo 2; read them off ``ln1_post.hook_scale`` and
            ``ln2_post.hook_scale``); default: the root mean square of the sublayers' outputs, for attention of input ``N(0, I)``
            before the gain, for the FFN of ``inputs``, over 256 seeded samples.
        device: Where to compute; default: where the weights are.

    Returns:
        The block's map ``L``, with ``.attention`` (``A``), ``.ffn`` (``F``; of a mixture with ``.experts``) and ``.update``
        (``R = L − I``). It computes in float32, in float64 where the weights have it.

    Raises:
        ValueError: A weight is NaN or infinite; an option is not one of those allowed or does not fit the block.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> from sd_lens.models.loading import weights_of
        >>> block = linearize(weights_of(planted().model)[1])
        >>> block.ffn.mv(torch.ones(block.d_model)).shape
        torch.Size([64])
    """
    if not isinstance(weights, BlockWeights):
        raise ValueError(f"weights: got {type(weights).__name__}; allowed: BlockWeights, such as weights_of(model)[block]")
    require_inputs(inputs, weights.d_model)
    require_estimator(estimator, samples, weights.d_model)
    _require_fitting(weights, router, post_scales)
    weights.require_finite()
    # Half precision has too few digits to iterate on.
    working = torch.promote_types(weights.attention.W_O.dtype, torch.float32)
    attention, ffn = (
        _rebuilt(layer, lambda _, tensor: tensor.detach().to(device=device, dtype=working))
        for layer in (weights.attention, weights.ffn)
    )
    if paper:
        attention, ffn = _as_in_the_paper(attention), _as_in_the_paper(ffn)
    notes = [f"FFN fitted to {in_words(inputs)}"]
    if paper:
        notes.append("biases and mean subtraction left out, as in the paper")
    if _post_normed(weights):
        found = post_scales or PostScales(_attention_scale(attention), _ffn_scale(ffn, inputs))
        how = "given" if post_scales else "root mean square for Gaussian inputs"
        notes.append(f"norms after the sublayers at scales {found.attention:.4g} and {found.ffn:.4g} ({how})")
        post_scales = found
    scales = post_scales or (None, None)

    def fit(layer: FFNWeights) -> FFNFit:
        if estimator == "sampled":
            return sample_fit(layer, inputs=inputs, samples=samples, seed=seed)
        return fit_ffn(layer, inputs=inputs)

    if isinstance(ffn, FFNWeights):
        ffn_map: FFNMap | MoEMap = FFNMap(ffn, fit(ffn), scales[1])
        method = ffn_map.fit.method
    else:
        ffn_map = _mixture(ffn, fit, router, inputs, scales[1])
        method = ffn_map.experts[0].fit.method
        notes.append(f"router weights {'uniform' if router is None else 'given'} over {len(ffn.experts)} experts")
        if ffn_map.shared is not None and ffn.W_shared_gate is not None:
            notes.append(f"gate of the shared expert at its mean, {ffn_map.shared_weight:.3g}")
    if method != "closed form":
        notes.append(f"FFN fit: {method}")
    return BlockMap(weights.block, AttentionMap(attention, scales[0]), ffn_map, weights.parallel, tuple(notes))


def require_estimator(estimator: str, samples: int, d_model: int) -> None:
    """Raises `ValueError` unless the estimator is known and has enough samples."""
    if estimator not in _ESTIMATORS:
        raise ValueError(f"estimator: got {estimator!r}; allowed: {', '.join(map(repr, _ESTIMATORS))}")
    if estimator == "sampled":
        require_samples(samples, d_model)


def _require_fitting(weights: BlockWeights, router: Tensor | None, post_scales: PostScales | None) -> None:
    """Options that the block has no use for are refused, not ignored."""
    if router is not None:
        if not isinstance(weights.ffn, MoEWeights):
            raise ValueError(f"router: got weights of experts for block {weights.block}, which is dense; allowed: None")
        n = len(weights.ffn.experts)
        if tuple(router.shape) != (n,) or not bool(torch.isfinite(router).all()) or bool((router < 0).any()):
            raise ValueError(f"router: got {tuple(router.shape)} numbers; allowed: {n} finite ones of at least 0, one per expert")
    if post_scales is not None:
        if not _post_normed(weights):
            raise ValueError(
                f"post_scales: got {tuple(post_scales)}, but block {weights.block} has no norm after a sublayer; allowed: None"
            )
        if not all(0 < scale < float("inf") for scale in post_scales):
            raise ValueError(f"post_scales: got {tuple(post_scales)}; allowed: two positive numbers")


def _post_normed(weights: BlockWeights) -> bool:
    return weights.attention.post_norm is not None or weights.ffn.post_norm is not None


def _mixture(
    moe: MoEWeights, fit: Callable[[FFNWeights], FFNFit], router: Tensor | None, inputs: Inputs, post_scale: float | None
) -> MoEMap:
    experts = tuple(FFNMap(expert, fit(expert)) for expert in moe.experts)
    n = len(experts)
    weights = torch.full((n,), 1 / n, dtype=torch.float64) if router is None else router
    if moe.shared is None:
        return MoEMap(moe, experts, weights, post_scale=post_scale)
    gate = 1.0 if moe.W_shared_gate is None else _mean_gate(moe, moe.W_shared_gate, inputs)
    return MoEMap(moe, experts, weights, FFNMap(moe.shared, fit(moe.shared)), gate, post_scale)


def _mean_gate(moe: MoEWeights, gate: Tensor, inputs: Inputs) -> float:
    """Mean of the sigmoid that the shared expert is multiplied by."""
    x = resolve(inputs, moe.norm, gate, gate.shape[0])
    scaled = root(x).times(gate.squeeze(-1))
    mean = (x.mean @ gate).reshape(1)
    return float(activation_moments(Activation("other", torch.sigmoid), mean, scaled.norm().reshape(1)).value)


def _attention_scale(attention: AttentionWeights) -> float:
    """Root mean square of the layer's output for a token that attends to itself and enters as ``N(0, I)`` before the gain."""
    if attention.post_norm is None:
        return 1.0
    x = _noise(attention.W_O, attention.W_O.shape[-1])
    if attention.norm is not None:
        x = attention.norm.center(x) * attention.norm.gain + (0 if attention.norm.bias is None else attention.norm.bias)
    bare = replace(attention, norm=None, post_norm=None, output_scale=1.0)
    return float(attention.post_norm.scale(bare.alone(x)).square().mean().sqrt())


def _ffn_scale(ffn: FFNWeights | MoEWeights, inputs: Inputs) -> float:
    """Root mean square of the layer's output for its Gaussian input."""
    if ffn.post_norm is None:
        return 1.0
    like = ffn.W_out if isinstance(ffn, FFNWeights) else ffn.W_router
    d = ffn.post_norm.gain.shape[0]
    x = resolve(inputs, ffn.norm, like, d)
    bare: FFNWeights | MoEWeights = replace(ffn, norm=None, post_norm=None, output_scale=1.0)
    return float(ffn.post_norm.scale(bare(x.mean + root(x).times(_noise(like, d)))).square().mean().sqrt())


def _noise(like: Tensor, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_SCALE_SAMPLES, d, generator=generator, dtype=torch.float64).to(like)


def _as_in_the_paper(layer: _T) -> _T:
    """Without biases, and with LayerNorms that only multiply."""

    def without(value: Any) -> Any:
        return replace(value, kind="rms", bias=None) if isinstance(value, NormWeights) else value

    return _rebuilt(layer, lambda name, tensor: None if name.startswith("b_") else tensor, without)


def _rebuilt(
    value: Any, on_tensor: Callable[[str, Tensor], Tensor | None], then: Callable[[Any], Any] = lambda value: value, name: str = ""
) -> Any:
    """A nested value with its tensors, and then its dataclasses, replaced."""
    if isinstance(value, Tensor):
        return on_tensor(name, value)
    if isinstance(value, tuple):
        return tuple(_rebuilt(item, on_tensor, then, name) for item in value)
    if is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Activation):
        changed = {field.name: _rebuilt(getattr(value, field.name), on_tensor, then, field.name) for field in fields(value)}
        return then(replace(value, **changed))
    return value
