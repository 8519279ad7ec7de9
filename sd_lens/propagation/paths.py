"""How much of every input reaches the last token along all paths of attention and residual connections.

A path goes from one position to a later one or the same in every block. Its weight is the product of its steps' weights, and the weights
of all paths add up to a product of matrices, which is how the over-squashing theorem of Barbero et al. ("Transformers need glasses!",
NeurIPS 2024, arXiv 2406.04267, Theorem 5.1) counts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.propagation.arguments import require_position
from sd_lens.tracing.arguments import require_whole


@dataclass(frozen=True)
class PathWeights:
    """Weights of all paths from each position to one, over depth; kept as shares and logarithms, as products over many blocks overflow.

    Attributes:
        shares: Share of the paths' weight that starts at each position, after walking back through 0, 1, ... of the last blocks.
        log10_total: Logarithm of the whole weight.
    """

    shares: Float[Tensor, "depth pos"]
    log10_total: Float[Tensor, "depth"]

    @property
    def weights(self) -> Float[Tensor, "depth pos"]:
        """The weights themselves; infinite where float64 cannot hold them."""
        return self.shares * 10 ** self.log10_total.unsqueeze(-1)


def path_weights(
    attention: Sequence[Float[Tensor, "pos pos"]] | Float[Tensor, "block pos pos"],
    *,
    position: int = -1,
    token_gains: Float[Tensor, "block pos"] | None = None,
) -> PathWeights:
    """The row of ``Π_l G_l (A_l + I)`` that belongs to one position, after every number of blocks.

    It is computed as a row vector times matrices from the last block down, ``O(blocks · pos²)``, in float64.

    Args:
        attention: ``A_l`` of each block, first block first: non-negative weights of (query, key), such as ``Λ / β1``.
        position: Where the paths end; negative from the end.
        token_gains: ``G_l``'s diagonals, what a block multiplies each token by after attention and residual connection; default: ones.

    Returns:
        The weights of all paths from each position, for 0, 1, ... blocks, counted from the last.

    Raises:
        ValueError: There is no block, the matrices are not square or have negative entries, or there is no such position.

    Example:
        >>> import torch
        >>> uniform = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
        >>> path_weights(torch.stack([uniform, uniform])).weights.tolist()
        [[0.0, 1.0], [0.5, 1.5], [1.75, 2.25]]
    """
    if len(attention) == 0:
        raise ValueError("attention: got no block; allowed: at least one")
    n = attention[0].shape[-1]
    for block, matrix in enumerate(attention):
        if matrix.shape != (n, n) or n == 0:
            raise ValueError(f"attention: got shape {tuple(matrix.shape)} in block {block}; allowed: square matrices of one size")
        if not bool((matrix >= 0).all()):
            raise ValueError(f"attention: got negative entries or NaN in block {block}; allowed: non-negative weights")
    if token_gains is not None and tuple(token_gains.shape) != (len(attention), n):
        raise ValueError(f"token_gains: got shape {tuple(token_gains.shape)}; allowed: {(len(attention), n)}")
    row = torch.zeros(n, dtype=torch.float64)
    row[require_position(position, n)] = 1.0
    shares, totals = [row], [0.0]
    for block in reversed(range(len(attention))):
        if token_gains is not None:
            row = row * token_gains[block].cpu().double()
        row = row + row @ attention[block].cpu().double()
        total = float(row.sum())
        row = row / total
        shares.append(row)
        totals.append(totals[-1] + math.log10(total))
    return PathWeights(torch.stack(shares), torch.tensor(totals, dtype=torch.float64))


def lazy_walk(attention: Float[Tensor, "pos pos"], steps: int) -> Float[Tensor, "pos pos"]:
    """``[½ (Λ + I)]^steps``: where a walk is that follows an attention pattern or stays where it is, each half of the time.

    Proposition 5.2 of Barbero et al.: if every later token pays the first one some attention, the matrix tends to its first column as the
    steps increase. A deep model of such blocks (``β1 = β2 = 1``) then hears its first token only. How fast is decided by the token that
    pays others least: the second-largest eigenvalue is ``½ (1 + Λ_ii)``, with the largest ``Λ_ii`` but the first.

    Args:
        attention: A causal attention pattern: lower-triangular, rows adding up to 1.
        steps: How many steps.

    Returns:
        Row ``i``: where a walk that started at position ``i`` is. In float64.

    Raises:
        ValueError: The matrix is not lower-triangular with non-negative rows that add up to 1, or ``steps`` is negative.

    Example:
        >>> import torch
        >>> pattern = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
        >>> [round(float(lazy_walk(pattern, steps)[-1, 0]), 4) for steps in (1, 4, 16, 64)]
        [0.1, 0.4305, 0.9579, 1.0]
    """
    require_whole("steps", steps, 0)
    matrix = attention.double()
    shape = tuple(matrix.shape)
    if matrix.ndim != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"attention: got shape {shape}; allowed: a square matrix")
    sums = matrix.sum(-1)
    if not bool((matrix >= 0).all()) or not bool(((sums - 1).abs() < 1e-4).all()):
        raise ValueError("attention: got negative entries or rows that do not add up to 1; allowed: a pattern, rows adding up to 1")
    if bool((matrix.triu(1) > 0).any()):
        raise ValueError("attention: got weight above the diagonal; allowed: a causal pattern, lower-triangular")
    half = 0.5 * (matrix / sums.unsqueeze(-1) + torch.eye(shape[0], dtype=torch.float64, device=matrix.device))
    return torch.linalg.matrix_power(half, steps)
