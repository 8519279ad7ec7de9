"""How much a model's norms, heads and FFNs stretch what goes through them, measured on one prompt: the constants of the over-squashing bound.

With its attention patterns ``a`` as they are, a block's Jacobian between two tokens is

    (I + F_i) (δ_ij I + P_i Σ_h a^h_ij O_h V_h D C M_j / s_j)

with ``F_i`` the FFN's Jacobian, ``P_i`` that of a norm after attention, and ``M_j C / s_j`` that of the norm before it without its gain
``D``: mean subtraction, a projection, and division by the scale. Spectral norms of the factors therefore bound it, and are what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import einsum, repeat
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.models import hook_names
from sd_lens.models.gradients import frozen
from sd_lens.models.loading import weights_of
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import Hook
from sd_lens.models.weights import AttentionWeights, BlockWeights
from sd_lens.propagation.spectral_norms import jacobian_norms

Heads = Literal["mean", "max", "weighted"]


@dataclass(frozen=True, eq=False)
class BlockGains:
    """What one block does to the run's tokens, at most.

    Attributes:
        attention: Attention of each query to each key, of all heads as one.
        heads: What the heads' output and value weights, with the gain of the norm before them, stretch such a mean by.
        scale: What the norm before attention divides each token by; ones where there is none.
        post: What a norm after attention, and a scale of its output, stretch each token's answer by.
        ffn: Spectral norm of the Jacobian of what the FFN adds to each token.
        ffn_scale: What the norm before the FFN divides each token by; ones where there is none.
    """

    attention: Float[Tensor, "pos pos"]
    heads: float
    scale: Float[Tensor, "pos"]
    post: Float[Tensor, "pos"]
    ffn: Float[Tensor, "pos"]
    ffn_scale: Float[Tensor, "pos"]


class _BlocksDone(Exception):
    """Ends the pass after the last block."""


def measure_gains(
    model: TransformerLensModel,
    tokens: Int[Tensor, "pos"],
    *,
    heads: Heads,
    edits: Sequence[Hook] = (),
    position: int = -1,
    progress: bool | None = None,
) -> tuple[list[BlockGains], float]:
    """Runs a prompt once and measures every block as it is passed.

    Memory beyond a forward pass: the graph of one block's FFN (of parallel blocks also its attention's), what `jacobian_norms` takes, and
    one pattern per block.

    Args:
        model: The model, as before afterwards.
        tokens: Token ids of the prompt.
        heads: How the heads' patterns become one, see `combine_heads`.
        edits: Hooks that change activations; they come before those that measure.
        position: Whose final norm is asked for.
        progress: Whether to show a progress bar; None shows one once the work takes seconds.

    Returns:
        The gains of each block, and the spectral norm of the final norm's Jacobian at the position (1 where there is none).

    Raises:
        ValueError: A block's weights cannot be read.
    """
    n_blocks = int(model.cfg.n_layers)
    weights = weights_of(model)
    for block in range(n_blocks):
        _ = weights[block]  # refused before any work, not in the middle of a pass
    gains: list[BlockGains] = []
    final: list[float] = []
    hidden = None if progress is None else not progress
    with frozen(model), tqdm(total=n_blocks, desc="gains", unit="block", delay=2.0, disable=hidden, leave=False) as bar:

        def done(seen: _Seen, block: int, resid_post: Tensor) -> None:
            gains.append(_gains(weights[block], seen, heads))
            bar.update()
            if block == n_blocks - 1:
                final.append(_final_gain(model, resid_post.detach()[0, position]))
                raise _BlocksDone

        hooks = [*edits, *(hook for block in range(n_blocks) for hook in _Seen(weights[block].parallel).hooks(block, done))]
        with suppress(_BlocksDone):
            model.run_with_hooks(tokens.unsqueeze(0).to(model.cfg.device), fwd_hooks=hooks, return_type=None)
    return gains, final[0]


class _Seen:
    """What one block's hooks see, with a graph of its FFN alone: `leaf` adds to what the FFN reads, and to nothing before it."""

    def __init__(self, parallel: bool):
        self._parallel = parallel
        self.stream = self.attn_out = self.pattern = self.ffn_out = self.leaf = torch.empty(0)

    def hooks(self, block: int, done: Callable[[_Seen, int, Tensor], None]) -> list[Hook]:
        """Hooks of the block, which forget everything once it is passed."""

        def enter(stream: Tensor, hook: Any) -> Tensor:
            self.stream = stream.detach()
            if not self._parallel:
                return self.stream
            self.leaf = self.stream.clone().requires_grad_()
            return self.leaf

        def attend(pattern: Tensor, hook: Any) -> Tensor:
            self.pattern = pattern.detach()
            return self.pattern  # the graph behind it is not needed

        def add(attn_out: Tensor, hook: Any) -> Tensor:
            self.attn_out = attn_out.detach()
            if self._parallel:
                return self.attn_out
            self.leaf = torch.zeros_like(self.attn_out, requires_grad=True)
            return self.attn_out + self.leaf

        def feed(ffn_out: Tensor, hook: Any) -> None:
            self.ffn_out = ffn_out

        def leave(stream: Tensor, hook: Any) -> Tensor:
            done(self, block, stream)
            self.__init__(self._parallel)
            return stream.detach()

        return [
            (hook_names.resid_pre(block), enter),
            (hook_names.pattern(block), attend),
            (hook_names.attn_out(block), add),
            (hook_names.mlp_out(block), feed),
            (hook_names.resid_post(block), leave),
        ]


def _gains(weights: BlockWeights, seen: _Seen, heads: Heads) -> BlockGains:
    n = seen.stream.shape[1]
    layer, ffn = weights.attention, weights.ffn
    pattern = _wide(seen.pattern).reshape(-1, n, n)
    stream = _wide(seen.stream)[0]
    entering = stream if weights.parallel else stream + _wide(seen.attn_out)[0]
    attention, factor = combine_heads(pattern, head_norms(layer), heads)
    ones = torch.ones(n, dtype=torch.float64)
    return BlockGains(
        attention=attention.cpu(),
        heads=factor,
        scale=ones if layer.norm is None else layer.norm.scale(stream).squeeze(-1).double().cpu(),
        post=abs(layer.output_scale) * (ones if layer.post_norm is None else _post_gains(layer, pattern, stream)),
        ffn=_ffn_gains(weights, seen, entering),
        ffn_scale=ones if ffn.norm is None else ffn.norm.scale(entering).squeeze(-1).double().cpu(),
    )


def _ffn_gains(weights: BlockWeights, seen: _Seen, entering: Tensor) -> Tensor:
    out, leaf = seen.ffn_out, seen.leaf
    reached = out.requires_grad and torch.autograd.grad(out.sum(), leaf, retain_graph=True, allow_unused=True)[0] is not None
    if not reached:  # Granite on TransformerLens 3.9: what the hook point after attention is given does not get to the FFN
        leaf = entering.detach().to(seen.stream.dtype).unsqueeze(0).requires_grad_()
        out = weights.ffn(leaf)
    return jacobian_norms(out.reshape(leaf.shape), leaf)[0]


def _post_gains(layer: AttentionWeights, pattern: Tensor, stream: Tensor) -> Tensor:
    """Spectral norms of the Jacobian of the norm after attention, at what attention gives it."""
    assert layer.post_norm is not None
    values = layer.values(layer.input(stream.to(layer.W_V.dtype)))
    values = repeat(values, "key kv_heads d_head -> key (kv_heads group) d_head", group=layer.group_size)
    mixed = einsum(pattern, _wide(values), "head query key, key head d_head -> query head d_head")
    raw = einsum(mixed, _wide(layer.W_O), "query head d_head, head d_head d_model -> query d_model")
    raw = (raw if layer.b_O is None else raw + _wide(layer.b_O)).requires_grad_()
    return jacobian_norms(layer.post_norm(raw), raw)


def _final_gain(model: Any, stream: Tensor) -> float:
    norm = getattr(model, "ln_final", None)
    if norm is None:
        return 1.0
    stream = stream.reshape(1, 1, -1).requires_grad_()
    return float(jacobian_norms(norm(stream), stream))


def head_norms(layer: AttentionWeights) -> Float[Tensor, "heads"]:
    """Spectral norm of each head's map from the normalised stream to the stream, with the gain of the norm before it.

    Args:
        layer: The layer.

    Returns:
        The norms of ``O_h V_h D C``, from QR decompositions of thin matrices, in float64 on the CPU.
    """
    W_V = _wide(layer.W_V)
    if layer.norm is not None:
        W_V = layer.norm.center((W_V * _wide(layer.norm.gain).unsqueeze(-1)).mT).mT
    reading = torch.linalg.qr(W_V, mode="r").R
    writing = torch.linalg.qr(_wide(layer.W_O).mT, mode="r").R
    reading = repeat(reading, "kv_heads r d_head -> (kv_heads group) r d_head", group=layer.group_size)
    return torch.linalg.matrix_norm(reading @ writing.mT, ord=2).double().cpu()


def combine_heads(
    pattern: Float[Tensor, "heads query key"], norms: Float[Tensor, "heads"], heads: Heads
) -> tuple[Float[Tensor, "query key"], float]:
    """One pattern ``Λ`` for all heads, and a factor with which it is nowhere below ``Σ_h norm_h a^h``.

    Args:
        pattern: The heads' patterns ``a^h``.
        norms: The heads' norms.
        heads: ``"mean"``: mean over heads, times their number and the largest norm. ``"max"``: largest attention of any head, times the sum of
            the norms. ``"weighted"``: mean weighted by the norms, times their sum, which is no more than either.

    Returns:
        The pattern and the factor.
    """
    if heads == "max":
        return pattern.amax(0), float(norms.sum())
    if heads == "mean":
        return pattern.mean(0), len(norms) * float(norms.max())
    total = float(norms.sum())
    shares = norms.to(pattern) / total if total > 0 else torch.full_like(norms, 1 / len(norms)).to(pattern)
    return einsum(pattern, shares, "head query key, head -> query key"), total


def _wide(tensor: Tensor) -> Tensor:
    """A tensor without a graph, in float32 or better."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
