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
from typing import Any, Literal

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
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

    def normalised(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The centred vector divided by its scale, before gain and bias, in float32 or better."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.center(wide) / self.scale(wide)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The norm itself, in float32 or better."""
        out = self.normalised(x)
        out = out * self.gain.to(out.dtype)
        return (out if self.bias is None else out + self.bias.to(out.dtype)).to(x.dtype)


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
        output_scale: What the layer's output is multiplied by last, before it joins the stream (Granite's residual multiplier).
    """

    W_V: Float[Tensor, "kv_heads d_model d_head"]
    W_O: Float[Tensor, "heads d_head d_model"]
    b_V: Float[Tensor, "kv_heads d_head"] | None
    b_O: Float[Tensor, "d_model"] | None
    norm: NormWeights | None
    post_norm: NormWeights | None = None
    output_scale: float = 1.0

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
        return _joining(out if self.b_O is None else out + self.b_O, self.post_norm, self.output_scale)

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
        output_scale: What the layer's output is multiplied by last, before it joins the stream.
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
    output_scale: float = 1.0

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
        return _joining(_affine(hidden, self.W_out, self.b_out), self.post_norm, self.output_scale)

    def __call__(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The layer's answer to a residual stream."""
        return self.output(self.hidden(self.input(resid)))


@dataclass(frozen=True)
class MoEWeights:
    """A mixture of experts: a router sends every token through a few of many feed-forward layers and adds up what they answer.

    Attributes:
        experts: The layers a token may be sent through. Each has the norm of the mixture's input, so that it stands alone as a
            dense layer does, and neither a norm nor a scale of its output.
        W_router: Router weights, one column per expert.
        b_router: Router bias.
        top_k: How many experts a token is sent through.
        renormalized: Whether the probabilities of the experts chosen are divided by their sum.
        norm: The norm of the layer's input, which router and experts share; None where it reads the stream as it is.
        post_norm: A norm of the sum of the experts' answers before it joins the stream, else None.
        shared: An expert that every token goes through besides (Qwen2-MoE), else None.
        W_shared_gate: The shared expert's answer is multiplied by the sigmoid of this projection; None where it is added as it is.
        output_scale: What the layer's output is multiplied by last, before it joins the stream.
    """

    experts: tuple[FFNWeights, ...]
    W_router: Float[Tensor, "d_model experts"]
    b_router: Float[Tensor, "experts"] | None
    top_k: int
    renormalized: bool
    norm: NormWeights | None
    post_norm: NormWeights | None = None
    shared: FFNWeights | None = None
    W_shared_gate: Float[Tensor, "d_model 1"] | None = None
    output_scale: float = 1.0

    def input(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What router and experts see of the residual stream."""
        return resid if self.norm is None else self.norm(resid)

    def logits(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch experts"]:
        """The router's score of every expert, for an already normalised input; the ``top_k`` largest win."""
        return _affine(x, self.W_router, self.b_router)

    def route(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch experts"]:
        """The weight of every expert's answer to an already normalised input: zero where the expert is not chosen."""
        logits = self.logits(x)
        # The softmax over all experts is taken in float32 or better, as models of half precision do.
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        kept, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.renormalized:
            kept = kept / kept.sum(-1, keepdim=True)
        return torch.zeros_like(probabilities).scatter(-1, chosen, kept).to(x.dtype)

    def answers(self, x: Float[Tensor, "tokens d_model"]) -> Iterator[tuple[Int[Tensor, "sent"], Float[Tensor, "sent d_model"]]]:
        """What every expert adds to the mixture's output, one after the other; a shared expert comes last.

        Args:
            x: Normalised inputs.

        Yields:
            Which tokens an expert adds to, and what, the router's weight included.
        """
        for weight, expert in zip(self.route(x).unbind(-1), self.experts, strict=True):
            sent = weight.nonzero().squeeze(-1)
            yield sent, weight[sent].unsqueeze(-1) * expert.output(expert.hidden(x[sent]))
        if self.shared is not None:
            answer = self.shared.output(self.shared.hidden(x))
            gate = 1.0 if self.W_shared_gate is None else torch.sigmoid(x @ self.W_shared_gate)
            yield torch.arange(len(x), device=x.device), gate * answer

    def output(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What joins the stream (``hook_mlp_out``), given the normalised input."""
        out = torch.zeros_like(x.reshape(-1, x.shape[-1]))
        for sent, answer in self.answers(x.reshape(-1, x.shape[-1])):
            out = out.index_add(0, sent, answer)
        return _joining(out, self.post_norm, self.output_scale).reshape(x.shape)

    def __call__(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The layer's answer to a residual stream."""
        return self.output(self.input(resid))


def _finite(tensor: Tensor) -> bool:
    # A sum takes one pass over memory, a twentieth of an element-wise check; it overflows on huge finite numbers only.
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else x @ weight + bias


def _joining(out: Tensor, post_norm: NormWeights | None, scale: float) -> Tensor:
    """What joins the stream of a sublayer's output."""
    out = out if post_norm is None else post_norm(out)
    return out if scale == 1.0 else scale * out


@dataclass(frozen=True)
class BlockWeights:
    """The matrices of one transformer block that decide what it writes to the residual stream.

    Attributes:
        block: Its index, from 0.
        attention: Value and output side of the attention layer.
        ffn: The feed-forward layer, or a mixture of them.
        parallel: True where attention and FFN read the same stream (GPT-NeoX, GPT-J, Falcon, Phi), False where the FFN reads
            the stream after attention.
    """

    block: int
    attention: AttentionWeights
    ffn: FFNWeights | MoEWeights
    parallel: bool

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.attention.W_O.shape[-1]

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with a dotted name, such as ``attention.W_V``, ``ffn.norm.gain`` or ``ffn.experts.3.W_in``.

        The norm that a mixture's experts share is named once, as the mixture's.
        """
        yield from _named("attention", self.attention)
        yield from _named("ffn", self.ffn)

    def require_finite(self) -> None:
        """Raises `ValueError` naming the first tensor that holds a NaN or an infinity."""
        for name, tensor in self.named_tensors():
            if not _finite(tensor):
                bad = int((~torch.isfinite(tensor)).sum())
                raise ValueError(
                    f"weights: {name} of block {self.block} holds {bad} NaN or infinite entries; allowed: finite numbers"
                )


def _named(path: str, value: Any, known: NormWeights | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a nested value, but for those of a norm that is known from elsewhere."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _named(f"{path}.{index}", item, known)
    elif isinstance(value, NormWeights | AttentionWeights | FFNWeights | MoEWeights):
        for field, inner in vars(value).items():
            if inner is not known:
                yield from _named(f"{path}.{field}", inner, value.norm if isinstance(value, MoEWeights) else None)


class ModelWeights(ABC):
    """The blocks of a model, read one at a time.

    Indexing reads a block when it is asked for and keeps nothing, so no more than one block's weights are held beyond the model.
    """

    @property
    def name(self) -> str:
        """What the model is called in results."""
        return "weights"

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
            ValueError: The block does not exist, or its layout is not one that can be read.
        """
        if not -len(self) <= block < len(self):
            raise ValueError(f"block: got {block}; allowed: 0 to {len(self) - 1} (or negative, from the end)")
        return self._read(block % len(self))

    def attention(self, block: int) -> AttentionWeights:
        """Reads one block's attention layer, whatever its FFN is like.

        Raises:
            ValueError: The block does not exist, or its attention is not one that can be read.
        """
        return self[block].attention

    def __iter__(self) -> Iterator[BlockWeights]:
        return (self[block] for block in range(len(self)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} blocks, d_model={self.d_model})"


def split_heads(weight: Float[Tensor, "d_in flat"], heads: int) -> Float[Tensor, "heads d_in d_head"]:
    """A flat projection as one matrix per head (a view)."""
    return rearrange(weight, "d_in (heads d_head) -> heads d_in d_head", heads=heads)
