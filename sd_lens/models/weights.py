"""One block's matrices in one orientation, whatever model or file they come from.

Everything above ``models/`` sees a transformer block through `BlockWeights` only. Orientation and names are TransformerLens':
vectors are rows, so ``W_in`` is ``(d_model, d_mlp)`` and a layer computes ``x @ W + b``. Tensors are views of the model's own
parameters wherever the layout allows, in the model's dtype and on the model's device.

The layers also compute: applied to hook values they must give back the next hook's values. `sd_lens.check` asserts this on the
user's model, the tests on every architecture of the zoo.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from sd_lens.models.activations import Activation


@dataclass(frozen=True)
class NormWeights:
    """A LayerNorm or RMSNorm.

    Attributes:
        kind: ``"layer"`` subtracts the mean over the width first, ``"rms"`` does not.
        gain: What the normalised vector is multiplied by (an offset such as Gemma's ``1 + w`` is already in it).
        bias: What is added last, if anything.
        eps: Added to the mean square before its root is taken.
    """

    kind: Literal["layer", "rms"]
    gain: Float[Tensor, "d_model"]
    bias: Float[Tensor, "d_model"] | None
    eps: float

    def center(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The norm's linear first step: mean subtraction for a LayerNorm, nothing for an RMSNorm. Symmetric."""
        return x - x.mean(-1, keepdim=True) if self.kind == "layer" else x

    def scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """What the centred vector is divided by."""
        return (self.center(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The norm itself, in float32 or better."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        out = self.center(wide) / self.scale(wide) * self.gain.to(wide.dtype)
        return (out if self.bias is None else out + self.bias.to(wide.dtype)).to(x.dtype)


@dataclass(frozen=True)
class AttentionWeights:
    """The value and output side of an attention layer: what it writes, once it is known where it looks.

    Attributes:
        W_V: Value weights, one per key-value head (fewer than heads under grouped-query attention).
        W_O: Output weights, one per head.
        b_V: Value bias.
        b_O: Output bias.
        norm: The norm of the layer's input; None where the layer reads the stream as it is.
        post_norm: A norm of the layer's output before it joins the stream (Gemma 2 and 3, OLMo 2), else None.
    """

    W_V: Float[Tensor, "kv_heads d_model d_head"]
    W_O: Float[Tensor, "heads d_head d_model"]
    b_V: Float[Tensor, "kv_heads d_head"] | None
    b_O: Float[Tensor, "d_model"] | None
    norm: NormWeights | None
    post_norm: NormWeights | None = None

    @property
    def n_heads(self) -> int:
        """How many heads read."""
        return self.W_O.shape[0]

    @property
    def group_size(self) -> int:
        """How many heads share one key-value head."""
        return self.n_heads // self.W_V.shape[0]

    def input(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What the projections see of the residual stream."""
        return resid if self.norm is None else self.norm(resid)

    def values(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch kv_heads d_head"]:
        """Value vectors (``hook_v``) of an already normalised input."""
        v = einsum(x, self.W_V, "... d_model, kv_heads d_model d_head -> ... kv_heads d_head")
        return v if self.b_V is None else v + self.b_V

    def output(self, z: Float[Tensor, "*batch heads d_head"]) -> Float[Tensor, "*batch d_model"]:
        """What joins the stream (``hook_attn_out``), given the mixed values ``hook_z``."""
        out = einsum(z, self.W_O, "... heads d_head, heads d_head d_model -> ... d_model")
        out = out if self.b_O is None else out + self.b_O
        return out if self.post_norm is None else self.post_norm(out)

    def alone(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The layer's answer to a token that can attend only to itself, as the token at position 0 does."""
        v = self.values(self.input(resid))
        return self.output(repeat(v, "... kv_heads d_head -> ... (kv_heads group) d_head", group=self.group_size))


@dataclass(frozen=True)
class FFNWeights:
    """A feed-forward layer, gated (``act(x W_gate) * (x W_in)``) or plain (``act(x W_in)``).

    Attributes:
        W_in: Input weights; in a gated layer the linear ("up") branch.
        W_out: Output weights, one row per neuron.
        W_gate: Weights of the branch under the activation, None in a plain layer.
        b_in: Bias of ``W_in``.
        b_gate: Bias of ``W_gate``.
        b_out: Output bias.
        b_hidden: Added to the neurons' activations after the branches are multiplied (gated layers of `HookedTransformer`).
        activation: The function applied to the gate (gated) or to the input branch (plain).
        norm: The norm of the layer's input; None where the layer reads the stream as it is.
        post_norm: A norm of the layer's output before it joins the stream, else None.
    """

    W_in: Float[Tensor, "d_model d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    W_gate: Float[Tensor, "d_model d_mlp"] | None
    b_in: Float[Tensor, "d_mlp"] | None
    b_gate: Float[Tensor, "d_mlp"] | None
    b_out: Float[Tensor, "d_model"] | None
    activation: Activation
    norm: NormWeights | None
    post_norm: NormWeights | None = None
    b_hidden: Float[Tensor, "d_mlp"] | None = None

    @property
    def gated(self) -> bool:
        """Whether two branches are multiplied."""
        return self.W_gate is not None

    def input(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What the projections see of the residual stream."""
        return resid if self.norm is None else self.norm(resid)

    def pre(self, x: Float[Tensor, "*batch d_model"]) -> tuple[Float[Tensor, "*batch d_mlp"], Float[Tensor, "*batch d_mlp"] | None]:
        """Pre-activations of an already normalised input.

        Returns:
            What the activation is applied to (``hook_pre``) and, in a gated layer, the linear branch (``hook_pre_linear``).
        """
        linear = _affine(x, self.W_in, self.b_in)
        if self.W_gate is None:
            return linear, None
        return _affine(x, self.W_gate, self.b_gate), linear

    def hidden(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_mlp"]:
        """Neuron activations (``mlp.hook_post``) of an already normalised input."""
        pre, linear = self.pre(x)
        hidden = self.activation(pre) if linear is None else self.activation(pre) * linear
        return hidden if self.b_hidden is None else hidden + self.b_hidden

    def output(self, hidden: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_model"]:
        """What joins the stream (``hook_mlp_out``), given the neuron activations."""
        out = _affine(hidden, self.W_out, self.b_out)
        return out if self.post_norm is None else self.post_norm(out)

    def __call__(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The layer's answer to a residual stream."""
        return self.output(self.hidden(self.input(resid)))


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else x @ weight + bias


@dataclass(frozen=True)
class BlockWeights:
    """The matrices of one transformer block that decide what it writes to the residual stream.

    Attributes:
        block: Its index, from 0.
        attention: Value and output side of the attention layer.
        ffn: The feed-forward layer.
        parallel: True where attention and FFN read the same stream (GPT-NeoX, GPT-J, Falcon, Phi), False where the FFN reads
            the stream after attention.
    """

    block: int
    attention: AttentionWeights
    ffn: FFNWeights
    parallel: bool

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.ffn.W_in.shape[0]

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with a dotted name, for checks and for moving."""
        for part, layer in (("attention", self.attention), ("ffn", self.ffn)):
            for field, value in vars(layer).items():
                if isinstance(value, Tensor):
                    yield f"{part}.{field}", value
                elif isinstance(value, NormWeights):
                    yield f"{part}.{field}.gain", value.gain
                    if value.bias is not None:
                        yield f"{part}.{field}.bias", value.bias

    def require_finite(self) -> None:
        """Raises `ValueError` naming the first tensor that holds a NaN or an infinity."""
        for name, tensor in self.named_tensors():
            if not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise ValueError(
                    f"weights: {name} of block {self.block} holds {bad} NaN or infinite entries; allowed: finite numbers"
                )


class ModelWeights(ABC):
    """The blocks of a model, read one at a time.

    Indexing reads a block when it is asked for and keeps nothing, so no more than one block's weights are held beyond the model.
    """

    @property
    @abstractmethod
    def d_model(self) -> int:
        """Width of the residual stream."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, block: int) -> BlockWeights: ...

    def __getitem__(self, block: int) -> BlockWeights:
        """Reads one block.

        Raises:
            ValueError: The block does not exist, or it is of a kind that has no single FFN (a mixture of experts).
        """
        if not -len(self) <= block < len(self):
            raise ValueError(f"block: got {block}; allowed: 0 to {len(self) - 1} (or negative, from the end)")
        return self._read(block % len(self))

    def __iter__(self) -> Iterator[BlockWeights]:
        return (self[block] for block in range(len(self)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} blocks, d_model={self.d_model})"


def split_heads(weight: Float[Tensor, "d_in flat"], heads: int) -> Float[Tensor, "heads d_in d_head"]:
    """A flat projection as one matrix per head (a view)."""
    return rearrange(weight, "d_in (heads d_head) -> heads d_in d_head", heads=heads)
