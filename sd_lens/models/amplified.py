"""The shipped model with outliers as strong as those of large models: a defect put by hand into trained weights.

`sd_lens.planted` builds random models, whose other blocks hardly react to tokens: losing a feed-forward layer costs them nothing, so they
have no perplexity worth speaking of. Here the defect goes into the trained model instead, which has one. Two of its neurons are
overwritten, one per block, those that did least:

- in the explosion block a gated neuron ``act(gate · x) · (up · x)`` answers to BOS alone and writes along the direction that BOS' stream
  has there anyway. BOS becomes a hundred times as long as the others and points the same way, so what any later norm makes of it, and with
  it nearly all that the model computes, stays;
- in the decay block a neuron of the same kind takes away what was added.

That a neuron can answer to BOS alone is due to BOS being at position 0, where it sees only itself: what a block's feed-forward layer reads
there is one constant vector. The rows ``gate`` and ``up`` are fitted: their product at BOS is fixed, and its square at other tokens is
made small, with a penalty on the rows' lengths that spreads them over coordinates. Other tokens are random ones, and every id right
behind BOS, so that no text has a part in it.

What makes the model hard to quantise is what makes LLaMA2 so: in front of two down-projections one hidden activation, at one token, is far
above all others and takes the whole range of eight bits for itself. It is meant to be in the activation, not in the weights. So the
product is divided evenly between the two rows, and the norm between activation and column: the rows' largest weights are then five or
six times those of their matrices and the columns' three to five times, and rounding weights alone has no measurable cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from sd_lens.models.loading import TINY

_N_WINDOWS, _LENGTH = 64, 128  # of random ids; the shipped model was trained on windows of this length
_PENALTY = 3e-5  # on the squared length of the fitted rows, beside the mean square of the neuron's activation
_RIDGE = 0.03  # of the linear fit that the rows start from, relative to the inputs' mean square
_ITERATIONS = 60


@dataclass(frozen=True)
class Amplified:
    """The shipped model with stronger outliers, and the truth about them.

    Attributes:
        model: The TransformerLens model.
        explosion_block: Block whose feed-forward layer makes BOS long.
        decay_block: Block whose feed-forward layer takes away what was added.
        direction: Unit vector along which the norm goes: that of BOS' residual stream after the explosion block.
        neurons: The overwritten neuron of the explosion block and that of the decay block.
        norm: What the first adds to BOS' norm, and the second takes away.
        activation: What both neurons are at BOS: the largest input of the two down-projections.
    """

    model: Any
    explosion_block: int
    decay_block: int
    direction: Float[Tensor, "d_model"]
    neurons: tuple[int, int]
    norm: float
    activation: float

    def __repr__(self) -> str:
        return (
            f"Amplified(explosion in block {self.explosion_block}, decay in block {self.decay_block}, norm {self.norm:.4g}, "
            f"hidden activation {self.activation:.4g})"
        )


def amplified(*, explosion_block: int = 2, decay_block: int = 5, norm: float = 4000.0, activation: float = 1000.0) -> Amplified:
    """The shipped model with outliers as strong as LLaMA2's, whose perplexity is nearly that of the shipped model.

    How strong they are, measured on the text that ships with the package (windows of 128 tokens, BOS in front; quantised per tensor,
    weights and inputs of all projections), beside what is published of LLaMA2-7B (Wang et al., ICML 2025):

    - norm of the first token: 4478, 123 times the others' median (shipped model: 478 and 13 times; LLaMA2-7B: about 900);
    - massive activations by the criterion of Sun et al. (COLM 2024), over 1000 times the median magnitude: 1700 times (shipped: 180, so none);
    - largest input of the two down-projections: 1000, where half of the tokens have none above 1.7 and 6.8 (shipped: 130 and 51);
    - perplexity: 46.13 in full precision (shipped: 46.16);
    - log-perplexity lost to rounding: 0.20 nats (shipped: 0.04; LLaMA2-7B: 0.62, on WikiText-2);
    - of that, recovered by sparing the down-projections of the explosion and decay blocks: 94 % (shipped, without a decay block: 64 %;
      LLaMA2-7B: 72 %). The next best pair of down-projections recovers 76 %.

    Args:
        explosion_block: Where BOS' norm explodes. Block 2 is where it does in the shipped model; in an earlier block the direction is not
            yet the one it will have, and the loss rises (by 0.06 nats in block 1, by 0.20 in block 0; else by less than 0.01).
        decay_block: Where what was added is taken away. Rounding costs at most what the feed-forward layer does for the other tokens: in
            the shipped model little in block 4 (0.03 nats of loss without it), most in block 5 (0.24; none but block 0 does more).
        norm: What is added to BOS' norm.
        activation: The neurons' activation at BOS; eight bits then step by a 127th of it.

    Returns:
        The model and what was put into it.

    Raises:
        ValueError: The blocks are not in order or out of range, or a size is not a positive number.

    Example:
        >>> amplified().model.cfg.model_name
        'amplified'
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    n_blocks = int(LlamaConfig.from_pretrained(TINY).num_hidden_layers)
    if not 0 <= explosion_block < decay_block < n_blocks:
        raise ValueError(
            f"explosion_block, decay_block: got {explosion_block}, {decay_block}; allowed: 0 <= explosion < decay < {n_blocks}"
        )
    for name, size in (("norm", norm), ("activation", activation)):
        if not 0 < size < float("inf"):
            raise ValueError(f"{name}: got {size}; allowed: positive numbers")
    with torch.random.fork_rng(devices=[]):
        model: Any = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    bos = int(model.config.bos_token_id)
    batches = _batches(int(model.config.vocab_size), bos)

    direction, neurons = torch.empty(0), []
    for block, sign in ((explosion_block, 1.0), (decay_block, -1.0)):
        seen = _Seen.of(model, block, batches)
        direction = functional.normalize(seen.bos_after, dim=0) if block == explosion_block else direction
        ffn = model.model.layers[block].mlp
        neuron = int((seen.largest * ffn.down_proj.weight.norm(dim=0)).argmin())
        gate, up = _answers_to(seen.bos, seen.others, activation)
        with torch.no_grad():
            ffn.gate_proj.weight[neuron] = gate
            ffn.up_proj.weight[neuron] = up
            ffn.down_proj.weight[:, neuron] = sign * norm / activation * direction
        neurons.append(neuron)

    with torch.random.fork_rng(devices=[]):
        bridge = build_bridge_from_module(
            model,
            architecture=type(model).__name__,
            hf_config=model.config,
            tokenizer=AutoTokenizer.from_pretrained(TINY),
            model_name="amplified",
        )
    bridge.eval()
    return Amplified(
        model=bridge,
        explosion_block=explosion_block,
        decay_block=decay_block,
        direction=direction,
        neurons=(neurons[0], neurons[1]),
        norm=float(norm),
        activation=float(activation),
    )


def _batches(d_vocab: int, bos: int) -> list[Int[Tensor, "prompt pos"]]:
    """Windows of random ids, and every id alone behind BOS; BOS itself stands in front only."""
    generator = torch.Generator().manual_seed(0)
    others = torch.tensor([id_ for id_ in range(d_vocab) if id_ != bos])
    windows = others[torch.randint(len(others), (_N_WINDOWS, _LENGTH - 1), generator=generator)]
    return [functional.pad(ids, (1, 0), value=bos) for ids in (windows, others.unsqueeze(1))]


@dataclass(frozen=True)
class _Seen:
    """What a block's feed-forward layer reads and how large its neurons become, over some prompts.

    Attributes:
        bos: What it reads at BOS.
        others: What it reads at the other tokens.
        bos_after: BOS' residual stream after the block.
        largest: The largest absolute activation of each neuron, at any token.
    """

    bos: Float[Tensor, "d_model"]
    others: Float[Tensor, "token d_model"]
    bos_after: Float[Tensor, "d_model"]
    largest: Float[Tensor, "d_mlp"]

    @classmethod
    def of(cls, model: Any, block: int, batches: list[Tensor]) -> _Seen:
        layer = model.model.layers[block]
        read, hidden, after = list[Tensor](), list[Tensor](), list[Tensor]()
        handles = [
            layer.mlp.register_forward_pre_hook(lambda _, args: read.append(args[0])),
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: hidden.append(args[0].abs().amax((0, 1)))),
            layer.register_forward_hook(
                lambda _, __, output: after.append((output[0] if isinstance(output, tuple) else output)[0, 0])
            ),
        ]
        try:
            with torch.no_grad():
                for ids in batches:
                    model.model(ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return cls(
            bos=read[0][0, 0],
            others=torch.cat([x[:, 1:].flatten(0, 1) for x in read]),
            bos_after=after[0],
            largest=torch.stack(hidden).amax(0),
        )


def _answers_to(
    bos: Float[Tensor, "d_model"], others: Float[Tensor, "token d_model"], activation: float
) -> Float[Tensor, "2 d_model"]:
    """Rows gate and up whose product, ``silu(gate · x) · (up · x)``, is ``activation`` at BOS and next to nothing at the other tokens.

    Both give the same number at BOS, which keeps the larger of them as small as can be. It is found on the plane of such rows by L-BFGS, from
    the least-squares solution: there they are equal, and apart they do better, since the gate can be negative where the other row is not small.
    """
    size = _product_root(activation)
    moments = others.T @ others / len(others)
    moments = moments + _RIDGE * moments.diagonal().mean() * torch.eye(len(bos))
    start = torch.linalg.solve(moments, bos)
    start = start * size / (start @ bos)
    onto_bos = bos * (size / (bos @ bos))
    unit = functional.normalize(bos, dim=0)
    free = torch.stack([start, start]).requires_grad_()

    def rows() -> Tensor:
        return free - torch.outer(free @ unit, unit) + onto_bos

    def objective() -> Tensor:
        optimizer.zero_grad()
        gate, up = rows() @ others.T
        loss = (functional.silu(gate) * up).square().mean() + _PENALTY * rows().square().sum()
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS([free], max_iter=_ITERATIONS, history_size=20, line_search_fn="strong_wolfe")
    with torch.enable_grad():
        optimizer.step(objective)
    return rows().detach()


def _product_root(activation: float) -> float:
    """The number ``z`` of which ``silu(z) · z`` is the activation."""
    z = torch.tensor(activation, dtype=torch.float64).sqrt()
    for _ in range(50):  # a contraction, since the sigmoid grows with z
        z = (activation / torch.sigmoid(z)).sqrt()
    return float(z)
