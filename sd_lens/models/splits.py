"""What single heads, neurons and experts add to the stream along a direction.

A sublayer's output is a sum over its heads, neurons or experts, and so is its projection on a direction. What stands between the sum and
the stream (a norm after the sublayer, a scale of its output) is kept at what it is for the token at hand, as the frozen norm of
direct logit attribution is: then the parts add up to the projection of what joins the stream, exactly but for rounding.

Each class takes a layer and a direction once, so that tokens cost one product with a vector per head or neuron, not a matrix.
"""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from sd_lens.models.weights import AttentionWeights, FFNWeights, MoEWeights


class _Seen:
    """A direction of the stream as a sublayer's output weights see it, through what stands behind them."""

    def __init__(self, layer: AttentionWeights | FFNWeights | MoEWeights, direction: Float[Tensor, "d_model"]):
        like = wide(_output_weights(layer)[..., :0, :])
        seen = direction.to(like) * layer.output_scale
        self._post_norm = layer.post_norm
        self.constant = 0.0
        if layer.post_norm is not None:
            if layer.post_norm.bias is not None:
                self.constant = float(seen @ layer.post_norm.bias.to(like))
            seen = layer.post_norm.center(seen * layer.post_norm.gain.to(like))
        self.vector = seen

    @property
    def needs_output(self) -> bool:
        """Whether the whole output must be known: a norm after the sublayer divides by its scale."""
        return self._post_norm is not None

    def scale(self, output: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """What the norm after the sublayer divides this output by."""
        assert self._post_norm is not None
        return self._post_norm.scale(output)


def wide(tensor: Tensor) -> Tensor:
    """A tensor in float32, or better if it is better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _output_weights(layer: AttentionWeights | FFNWeights | MoEWeights) -> Tensor:
    if isinstance(layer, AttentionWeights):
        return layer.W_O
    return layer.experts[0].W_out if isinstance(layer, MoEWeights) else layer.W_out


class HeadSplit:
    """Splits an attention layer's output along a direction over its heads and its biases.

    Args:
        attention: The layer.
        direction: The direction, in the stream.
    """

    def __init__(self, attention: AttentionWeights, direction: Float[Tensor, "d_model"]):
        self._attention = attention
        self._seen = _Seen(attention, direction)
        self._heads = einsum(wide(attention.W_O), self._seen.vector, "heads d_head d_model, d_model -> heads d_head")
        self._bias = 0.0 if attention.b_O is None else float(wide(attention.b_O) @ self._seen.vector)

    @property
    def n_parts(self) -> int:
        """How many heads there are."""
        return len(self._heads)

    def __call__(
        self, z: Float[Tensor, "*batch heads d_head"], of: Float[Tensor, "*batch heads d_head"] | None = None
    ) -> tuple[Float[Tensor, "*batch heads"], Float[Tensor, "*batch"]]:
        """The parts.

        Args:
            z: Mixed values (``hook_z``).
            of: The share of them that is asked for, such as what a token takes from itself; default: all.

        Returns:
            What each head adds, and what the biases add.
        """
        z = wide(z)
        parts = einsum(z if of is None else wide(of), self._heads, "... heads d_head, heads d_head -> ... heads")
        bias = torch.full_like(parts[..., 0], self._bias)
        if self._seen.needs_output:
            out = einsum(z, wide(self._attention.W_O), "... heads d_head, heads d_head d_model -> ... d_model")
            scale = self._seen.scale(out if self._attention.b_O is None else out + wide(self._attention.b_O))
            parts, bias = parts / scale, bias / scale.squeeze(-1)
        return parts, bias + self._seen.constant


class NeuronSplit:
    """Splits a feed-forward layer's output along a direction over its neurons and its biases.

    Args:
        ffn: The layer.
        direction: The direction, in the stream.
    """

    def __init__(self, ffn: FFNWeights, direction: Float[Tensor, "d_model"]):
        self._ffn = ffn
        self._seen = _Seen(ffn, direction)
        self._neurons = wide(ffn.W_out) @ self._seen.vector
        self._bias = 0.0 if ffn.b_out is None else float(wide(ffn.b_out) @ self._seen.vector)

    @property
    def n_parts(self) -> int:
        """How many neurons there are."""
        return len(self._neurons)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> tuple[Float[Tensor, "*batch d_mlp"], Float[Tensor, "*batch"]]:
        """The parts.

        Args:
            x: The layer's normalised input.

        Returns:
            What each neuron adds (activation times output row), and what the biases add.
        """
        hidden = wide(self._ffn.hidden(x))
        parts = hidden * self._neurons
        bias = torch.full_like(parts[..., 0], self._bias)
        if self._seen.needs_output:
            out = hidden @ wide(self._ffn.W_out)
            scale = self._seen.scale(out if self._ffn.b_out is None else out + wide(self._ffn.b_out))
            parts, bias = parts / scale, bias / scale.squeeze(-1)
        return parts, bias + self._seen.constant


class ExpertSplit:
    """Splits the output of a mixture of experts along a direction over its experts; a shared one, if there is one, comes last.

    Args:
        mixture: The layer.
        direction: The direction, in the stream.
    """

    def __init__(self, mixture: MoEWeights, direction: Float[Tensor, "d_model"]):
        self._mixture = mixture
        self._seen = _Seen(mixture, direction)

    @property
    def n_parts(self) -> int:
        """How many experts there are, a shared one included."""
        return len(self._mixture.experts) + (self._mixture.shared is not None)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> tuple[Float[Tensor, "*batch experts"], Float[Tensor, "*batch"]]:
        """The parts.

        Args:
            x: The layer's normalised input.

        Returns:
            What each expert adds, its router's weight included (zero where a token is not sent to it), and what a norm's bias adds.
        """
        tokens = x.reshape(-1, x.shape[-1])
        parts = self._seen.vector.new_zeros(len(tokens), self.n_parts)
        total = torch.zeros_like(wide(tokens)) if self._seen.needs_output else None
        for expert, (sent, answer) in enumerate(self._mixture.answers(tokens)):
            parts[sent, expert] = wide(answer) @ self._seen.vector
            if total is not None:
                total[sent] += wide(answer)
        if total is not None:
            parts = parts / self._seen.scale(total)
        parts = parts.reshape(*x.shape[:-1], self.n_parts)
        return parts, torch.full_like(parts[..., 0], self._seen.constant)
