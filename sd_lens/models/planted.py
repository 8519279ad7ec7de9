"""Models with a defect put there by hand: the ground truth that every analysis is tested against.

A planted model is a small transformer with random weights in which one FFN neuron of the explosion block answers to a known
*trigger* by writing along a known *direction*, and one neuron of the decay block answers to that direction by writing against
it. Everything that a detector or a linearisation should find is therefore known in closed form:

- the block's map is ``F ≈ σ · direction ⊗ trigger`` at the explosion block and ``λ · direction ⊗ direction`` at the decay block;
- the norm ``N`` of the explosion is what the decay block's neuron cancels.

What sets the trigger off is one of two pathways, after Wang et al. (ICML 2025, arXiv 2502.07004), section 4:

- ``"embedding"``: one token's embedding has the trigger in it, so it explodes wherever it stands (a delimiter);
- ``"head"``: one head, attending evenly, subtracts what it attends to. A token that sees only itself is all but erased; what is
  left is a faint component along the trigger that every embedding has, and the norm before the FFN amplifies it. So any token
  explodes at position 0 and nowhere else, except that repeated tokens, which see only themselves, explode too.

The width is split into orthogonal subspaces: where embeddings live, where the other blocks read and write, trigger, direction, and
the all-ones vector that a LayerNorm removes. The background writes along the last as well: no norm sees it, but weights whose
output has mean zero would look processed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.integrate import quad
from torch import Tensor

from sd_lens.models.planted_hf import Architecture, Matrices, boot

Pathway = Literal["embedding", "head"]

_SCALE = 4.0  # of a planted neuron's input weights
_THRESHOLD = 5.0  # subtracted before a plain FFN's activation, so that it ignores faint triggers as a gated one does by its square
_FAINT = 1e-3  # of the trigger in every embedding, relative to its norm (pathway "head")
_STRONG = 0.8  # of the trigger in the trigger token's embedding (pathway "embedding")


@dataclass(frozen=True)
class Planted:
    """A planted model and the truth about it.

    Attributes:
        model: The TransformerLens model.
        pathway: What sets the trigger off.
        explosion_block: Block whose FFN writes the large norm.
        decay_block: Block whose FFN takes it away.
        direction: Unit vector along which the norm goes.
        trigger: Unit vector that the explosion block's FFN answers to, in its input before the norm's gain.
        sigma: Leading singular value of the explosion block's FFN map.
        eigenvalue: Eigenvalue of the decay block's update map along the direction.
        norm: What the explosion adds to the stream's norm.
        trigger_token: Token whose embedding has the trigger in it; None on the pathway through a head.
    """

    model: Any
    pathway: Pathway
    explosion_block: int
    decay_block: int
    direction: Float[Tensor, "d_model"]
    trigger: Float[Tensor, "d_model"]
    sigma: float
    eigenvalue: float
    norm: float
    trigger_token: int | None

    def __repr__(self) -> str:
        return (
            f"Planted({self.pathway} pathway, explosion in block {self.explosion_block}, decay in block {self.decay_block}, "
            f"eigenvalue {self.eigenvalue:g}, norm {self.norm:.4g})"
        )


@dataclass(frozen=True)
class _Layout:
    """Sizes and the orthonormal bases that the width is split into (vectors in rows)."""

    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    n_blocks: int
    d_vocab: int
    tokens: Tensor
    others: Tensor
    ones: Tensor
    trigger: Tensor
    direction: Tensor

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads


def planted(
    architecture: Architecture = "llama",
    *,
    pathway: Pathway = "head",
    n_blocks: int = 6,
    explosion_block: int = 1,
    decay_block: int = 4,
    eigenvalue: float = -60.0,
    d_model: int = 64,
    n_heads: int = 4,
    n_kv_heads: int | None = None,
    d_vocab: int = 97,
    context: int = 128,
    seed: int = 0,
) -> Planted:
    """Builds a model with a known defect.

    Args:
        architecture: ``"llama"`` (gated FFN, RMSNorm, rotary positions), ``"gpt2"`` (plain FFN, LayerNorm, learned positions), or
            ``"gpt_neox"`` (plain FFN, LayerNorm, attention and FFN in parallel).
        pathway: ``"head"`` (any token at position 0 explodes) or ``"embedding"`` (one token explodes at any position).
        n_blocks: Number of blocks.
        explosion_block: Where the norm explodes. On the pathway through a head of a parallel block the head sits one block earlier.
        decay_block: Where it decays.
        eigenvalue: Of the decay block along the direction; negative.
        d_model: Width.
        n_heads: Attention heads.
        n_kv_heads: Key-value heads (``"llama"`` only); default: as many as heads.
        d_vocab: Number of tokens; the last is the trigger token of the ``"embedding"`` pathway.
        context: Longest prompt.
        seed: Seeds every random weight.

    Returns:
        The model and what was planted in it.

    Raises:
        ValueError: The blocks are not in order, the eigenvalue is not negative, or sizes do not divide.

    Example:
        >>> planted("gpt2", pathway="embedding").trigger_token
        96
    """
    n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
    first = 1 if pathway == "head" and architecture == "gpt_neox" else 0
    if not first <= explosion_block < decay_block < n_blocks:
        raise ValueError(
            f"explosion_block, decay_block: got {explosion_block}, {decay_block}; allowed: {first} <= explosion < decay < {n_blocks}"
        )
    if eigenvalue >= 0:
        raise ValueError(f"eigenvalue: got {eigenvalue}; allowed: negative numbers")
    if d_model % n_heads or n_heads % n_kv_heads or (architecture != "llama" and n_kv_heads != n_heads):
        raise ValueError(
            f"d_model, n_heads, n_kv_heads: got {d_model}, {n_heads}, {n_kv_heads}; allowed: each a multiple of the next, and grouped "
            "heads on 'llama' only"
        )
    generator = torch.Generator().manual_seed(seed)
    layout = _layout(d_model, n_heads, n_kv_heads, n_blocks, d_vocab, generator)
    activation = F.silu if architecture == "llama" else _gelu_of(architecture)
    blocks = [_background(layout, gated=architecture == "llama", generator=generator) for _ in range(n_blocks)]

    def neuron(x: Tensor | float) -> float:
        """A planted neuron's activation for the pre-activation ``x``."""
        wide = torch.as_tensor(x, dtype=torch.float64)
        return float(activation(wide) * wide if architecture == "llama" else activation(wide - _THRESHOLD))

    # The decay block: its eigenvalue fixes the output weight, and that fixes the norm it cancels.
    d_root = d_model**0.5
    decay_strength = _plant_neuron(layout, blocks[decay_block], reads=layout.direction, architecture=architecture)
    decay_weight = eigenvalue / decay_strength(neuron)
    blocks[decay_block].W_out[0] = decay_weight * layout.direction
    norm = -decay_weight * neuron(_SCALE * d_root)
    # The explosion block: the norm fixes the output weight, and that fixes its singular value.
    strength = _plant_neuron(layout, blocks[explosion_block], reads=layout.trigger, architecture=architecture)
    coefficient = d_root * (_STRONG if pathway == "embedding" else 1.0)
    weight = norm / neuron(_SCALE * coefficient)
    blocks[explosion_block].W_out[0] = weight * layout.direction
    if pathway == "head":
        for distance, block in enumerate(reversed(blocks[:explosion_block]), start=1):
            _quieten(block, 0.25**distance)
        _plant_head(layout, blocks[explosion_block - first])

    embedding = _embedding(layout, pathway, generator)
    positions = 0.02 * _FAINT * torch.randn(context, layout.tokens.shape[0], generator=generator) @ layout.tokens
    unembedding = torch.randn(embedding.shape, generator=generator) / d_root
    model = boot(architecture, blocks, embedding=embedding, unembedding=unembedding, positions=positions)
    return Planted(
        model=model,
        pathway=pathway,
        explosion_block=explosion_block,
        decay_block=decay_block,
        direction=layout.direction,
        trigger=layout.trigger,
        sigma=weight * strength(neuron),
        eigenvalue=eigenvalue,
        norm=norm,
        trigger_token=d_vocab - 1 if pathway == "embedding" else None,
    )


def _gelu_of(architecture: Architecture) -> Callable[[Tensor], Tensor]:
    return (lambda x: F.gelu(x, approximate="tanh")) if architecture == "gpt2" else F.gelu


def _layout(d_model: int, n_heads: int, n_kv_heads: int, n_blocks: int, d_vocab: int, generator: torch.Generator) -> _Layout:
    random = torch.randn(d_model, d_model, generator=generator, dtype=torch.float64)
    random[:, 0] = 1.0  # the first basis vector is the one a LayerNorm removes
    basis = torch.linalg.qr(random).Q.T.float()
    size = d_model // n_heads  # one head must be able to carry all of the embeddings' subspace
    return _Layout(
        d_model=d_model,
        d_mlp=2 * d_model + 8,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        n_blocks=n_blocks,
        d_vocab=d_vocab,
        ones=basis[0],
        trigger=basis[1],
        direction=basis[2],
        tokens=basis[3 : 3 + size],
        others=basis[3 + size :],
    )


def _background(layout: _Layout, *, gated: bool, generator: torch.Generator) -> Matrices:
    """A block that reads and writes the subspace of its own, and listens to the embeddings a little."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def gain() -> Tensor:
        return 1 + 0.1 * draw(layout.d_model)

    gain1, gain2 = gain(), gain()
    d, d_head, dim = layout.d_model, layout.d_head, layout.others.shape[0]
    reads = torch.cat([layout.others, 0.02 * _FAINT * layout.tokens])
    written = layout.others + 0.1 * layout.ones if not gated else layout.others

    def reader(columns: int, gain: Tensor) -> Tensor:
        return (reads.T @ draw(reads.shape[0], columns)) / dim**0.5 / gain.unsqueeze(-1)

    def heads(weight: Tensor, n: int) -> Tensor:
        return weight.reshape(d, n, d_head).permute(1, 0, 2).clone()

    writes = 0.3 * draw(layout.n_heads * d_head, dim) @ written / (layout.n_heads * d_head) ** 0.5
    return Matrices(
        W_Q=heads(draw(d, d) / d, layout.n_heads),
        W_K=heads(draw(d, layout.n_kv_heads * d_head) / d, layout.n_kv_heads),
        W_V=heads(reader(layout.n_kv_heads * d_head, gain1), layout.n_kv_heads),
        W_O=writes.reshape(layout.n_heads, d_head, d),
        W_in=reader(layout.d_mlp, gain2),
        W_out=0.3 * draw(layout.d_mlp, dim) @ written / layout.d_mlp**0.5,
        b_in=torch.zeros(layout.d_mlp),
        W_gate=reader(layout.d_mlp, gain2) if gated else None,
        gain1=gain1,
        gain2=gain2,
    )


def _plant_neuron(
    layout: _Layout, block: Matrices, *, reads: Tensor, architecture: Architecture
) -> Callable[[Callable[[float], float]], float]:
    """Makes neuron 0 answer to a direction of the normalised stream.

    Returns:
        A function of the neuron's response that gives the strength of its linear fit: what unit output weight turns ``reads``
        into, for input ``N(0, I)`` after the gain. It is the regression slope by definition, integrated numerically.
    """
    weight = _SCALE * reads / block.gain2
    block.W_in[:, 0] = weight
    if block.W_gate is not None:
        block.W_gate[:, 0] = weight
    else:
        block.b_in[0] = -_THRESHOLD
    spread = float(weight.norm())

    def strength(neuron: Callable[[float], float]) -> float:
        def integrand(z: float) -> float:
            return z * neuron(spread * z) * float(np.exp(-z * z / 2)) / (2 * np.pi) ** 0.5

        slope = quad(integrand, -10, 10, points=[0.0, _THRESHOLD / spread], limit=200)[0]
        return _SCALE * slope / spread

    return strength


def _quieten(block: Matrices, factor: float) -> None:
    """Makes a block write less: what those before the head add up to must not drown the faint trigger."""
    block.W_O = factor * block.W_O
    block.W_out = factor * block.W_out


def _plant_head(layout: _Layout, block: Matrices) -> None:
    """Makes head 0 attend evenly and subtract what it attends to."""
    block.W_Q[0] = 0.0
    block.W_V[0] = layout.tokens.T / block.gain1.unsqueeze(-1)
    group = layout.n_heads // layout.n_kv_heads
    block.W_O[:group] = 0.0  # the other heads that share its values must not subtract them again
    block.W_O[0] = -layout.tokens / layout.d_model**0.5


def _embedding(layout: _Layout, pathway: Pathway, generator: torch.Generator) -> Tensor:
    """Unit embeddings in their subspace, with the trigger in all of them (faint) or in one (strong)."""
    token = F.normalize(torch.randn(layout.d_vocab, layout.tokens.shape[0], generator=generator), dim=-1) @ layout.tokens
    share = torch.zeros(layout.d_vocab, 1)
    if pathway == "head":
        share[:] = _FAINT
    else:
        share[-1] = _STRONG
    return (1 - share**2).sqrt() * token + share * layout.trigger
