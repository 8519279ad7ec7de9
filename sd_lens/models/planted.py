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

Architecture = Literal["llama", "gpt2", "gpt_neox"]
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


@dataclass
class _Matrices:
    """One block's weights in TransformerLens' orientation, before they are written into a Hugging Face model."""

    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    W_in: Tensor
    W_out: Tensor
    b_in: Tensor
    W_gate: Tensor | None
    gain1: Tensor
    gain2: Tensor


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

    model = _WRITERS[architecture](layout, blocks, _embedding(layout, pathway, generator), context, generator)
    return Planted(
        model=_boot(model),
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


def _background(layout: _Layout, *, gated: bool, generator: torch.Generator) -> _Matrices:
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
    return _Matrices(
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
    layout: _Layout, block: _Matrices, *, reads: Tensor, architecture: Architecture
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


def _quieten(block: _Matrices, factor: float) -> None:
    """Makes a block write less: what those before the head add up to must not drown the faint trigger."""
    block.W_O = factor * block.W_O
    block.W_out = factor * block.W_out


def _plant_head(layout: _Layout, block: _Matrices) -> None:
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


def _flat(heads: Tensor) -> Tensor:
    """(head, d_in, d_head) as one matrix (d_in, head·d_head)."""
    return heads.permute(1, 0, 2).reshape(heads.shape[1], -1)


def _copy(target: torch.nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)


def _llama(layout: _Layout, blocks: list[_Matrices], embedding: Tensor, context: int, generator: torch.Generator) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=layout.d_vocab,
        hidden_size=layout.d_model,
        intermediate_size=layout.d_mlp,
        num_hidden_layers=layout.n_blocks,
        num_attention_heads=layout.n_heads,
        num_key_value_heads=layout.n_kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-12,  # the faint trigger must not drown in it
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = _quietly(LlamaForCausalLM, config)
    for layer, block in zip(model.model.layers, blocks, strict=True):
        _copy(layer.input_layernorm.weight, block.gain1)
        _copy(layer.post_attention_layernorm.weight, block.gain2)
        for projection, weight in (("q_proj", block.W_Q), ("k_proj", block.W_K), ("v_proj", block.W_V)):
            _copy(getattr(layer.self_attn, projection).weight, _flat(weight).T)
        _copy(layer.self_attn.o_proj.weight, block.W_O.flatten(0, 1).T)
        assert block.W_gate is not None
        for projection, weight in (("gate_proj", block.W_gate), ("up_proj", block.W_in), ("down_proj", block.W_out)):
            _copy(getattr(layer.mlp, projection).weight, weight.T)
    _copy(model.model.embed_tokens.weight, embedding)
    _copy(model.get_output_embeddings().weight, torch.randn(embedding.shape, generator=generator) / layout.d_model**0.5)
    return model


def _gpt2(layout: _Layout, blocks: list[_Matrices], embedding: Tensor, context: int, generator: torch.Generator) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=layout.d_vocab,
        n_embd=layout.d_model,
        n_inner=layout.d_mlp,
        n_layer=layout.n_blocks,
        n_head=layout.n_heads,
        n_positions=context,
        layer_norm_epsilon=1e-12,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = _quietly(GPT2LMHeadModel, config)
    for layer, block in zip(model.transformer.h, blocks, strict=True):
        _copy(layer.ln_1.weight, block.gain1)
        _copy(layer.ln_2.weight, block.gain2)
        _copy(layer.attn.c_attn.weight, torch.cat([_flat(block.W_Q), _flat(block.W_K), _flat(block.W_V)], dim=1))
        _copy(layer.attn.c_proj.weight, block.W_O.flatten(0, 1))
        _copy(layer.mlp.c_fc.weight, block.W_in)
        _copy(layer.mlp.c_fc.bias, block.b_in)
        _copy(layer.mlp.c_proj.weight, block.W_out)
        for bias in (layer.attn.c_attn.bias, layer.attn.c_proj.bias, layer.mlp.c_proj.bias):
            _copy(bias, torch.zeros_like(bias))
    _copy(model.transformer.wte.weight, embedding)
    positions = torch.randn(context, layout.tokens.shape[0], generator=generator) @ layout.tokens
    _copy(model.transformer.wpe.weight, 0.02 * _FAINT * positions)
    _copy(model.get_output_embeddings().weight, torch.randn(embedding.shape, generator=generator) / layout.d_model**0.5)
    return model


def _gpt_neox(layout: _Layout, blocks: list[_Matrices], embedding: Tensor, context: int, generator: torch.Generator) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=layout.d_vocab,
        hidden_size=layout.d_model,
        intermediate_size=layout.d_mlp,
        num_hidden_layers=layout.n_blocks,
        num_attention_heads=layout.n_heads,
        max_position_embeddings=context,
        layer_norm_eps=1e-12,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = _quietly(GPTNeoXForCausalLM, config)
    for layer, block in zip(model.gpt_neox.layers, blocks, strict=True):
        _copy(layer.input_layernorm.weight, block.gain1)
        _copy(layer.post_attention_layernorm.weight, block.gain2)
        joint = torch.cat([block.W_Q, block.W_K, block.W_V], dim=-1)  # each head's query, key and value stand together
        _copy(layer.attention.query_key_value.weight, _flat(joint).T)
        _copy(layer.attention.dense.weight, block.W_O.flatten(0, 1).T)
        _copy(layer.mlp.dense_h_to_4h.weight, block.W_in.T)
        _copy(layer.mlp.dense_h_to_4h.bias, block.b_in)
        _copy(layer.mlp.dense_4h_to_h.weight, block.W_out.T)
        for bias in (layer.attention.query_key_value.bias, layer.attention.dense.bias, layer.mlp.dense_4h_to_h.bias):
            _copy(bias, torch.zeros_like(bias))
    _copy(model.gpt_neox.embed_in.weight, embedding)
    _copy(model.get_output_embeddings().weight, torch.randn(embedding.shape, generator=generator) / layout.d_model**0.5)
    return model


_WRITERS: dict[str, Callable[..., Any]] = {"llama": _llama, "gpt2": _gpt2, "gpt_neox": _gpt_neox}


def _quietly(model_class: Any, config: Any) -> Any:
    """A Hugging Face model, built without moving the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        return model_class(config).eval()


def _boot(model: Any) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    with torch.random.fork_rng(devices=[]):
        bridge = build_bridge_from_module(model, architecture=type(model).__name__, hf_config=model.config)
    bridge.cfg.model_name = "planted"
    return bridge
