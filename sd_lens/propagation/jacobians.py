"""Jacobians of one position's output with respect to every input position, from batched vector-Jacobian products.

The model runs once, on one prompt. `torch.autograd` then takes many cotangents at a time back through that one graph
(``is_grads_batched``), so that neither a run nor its activations are ever repeated, and the Jacobian, ``outputs × positions × width``
numbers, exists in pieces only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.gradients import frozen
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import Hook

Output = Literal["final", "logits"] | int
"""What is differentiated: what the unembedding reads (the representation after the final norm), the logits, or the stream leaving a block."""


class _Enough(Exception):
    """Ends a forward pass where nothing behind is differentiated."""


@dataclass(frozen=True, eq=False)
class Graph:
    """One forward pass, kept for differentiation.

    Attributes:
        inputs: The stream entering each source block.
        output: The last position's representation: what the unembedding reads, or the stream leaving a block.
        logits: The last position's logits, a function of ``output``; None where they are not asked for.
    """

    inputs: tuple[Float[Tensor, "1 pos d_model"], ...]
    output: Float[Tensor, "d_model"]
    logits: Float[Tensor, "d_vocab"] | None

    def products(self, cotangents: Float[Tensor, "row _"]) -> tuple[Float[Tensor, "row pos d_model"], ...]:
        """Cotangents times the Jacobian with respect to every source's input.

        Args:
            cotangents: Of the logits where there are any, else of the representation.
        """
        if self.logits is not None:
            (cotangents,) = batched_vjp(self.logits, (self.output,), cotangents)
        return self.from_output(cotangents)

    def from_output(self, cotangents: Float[Tensor, "row d_model"]) -> tuple[Float[Tensor, "row pos d_model"], ...]:
        """The same for cotangents of the representation."""
        return tuple(grad[:, 0] for grad in batched_vjp(self.output, self.inputs, cotangents))

    def rows(self, chunk: int) -> Float[Tensor, "row d_model"]:
        """Cotangents of the representation that give a matrix with the Jacobian's singular values, and Frobenius norm, at every position.

        For the representation itself these are the unit vectors. For logits, which are far more, the Jacobian is ``M J`` with ``M`` the
        derivative of the logits with respect to the representation; with ``M = Q R`` and orthonormal columns in ``Q``, ``R J`` has its
        singular values and no more rows than the model is wide.

        Args:
            chunk: How many columns of ``M`` to take at once.
        """
        units = torch.eye(len(self.output), dtype=self.output.dtype, device=self.output.device)
        if self.logits is None:
            return units
        # A product with M from the left is linear in its cotangent, so its own derivative is a product with M from the right.
        dual = torch.zeros_like(self.logits, requires_grad=True)
        (pulled,) = torch.autograd.grad(self.logits, self.output, dual, create_graph=True)
        columns = torch.cat([batched_vjp(pulled, (dual,), part)[0] for part in units.split(chunk)])
        triangle = torch.linalg.qr(columns.T.to(wide(columns)), mode="r").R
        return triangle.to(units)


def batched_vjp(
    output: Float[Tensor, "n"], inputs: Sequence[Tensor], cotangents: Float[Tensor, "row n"]
) -> tuple[Float[Tensor, "row ..."], ...]:
    """Vector-Jacobian products of many cotangents at once; zeros where the output does not depend on an input.

    Args:
        output: What is differentiated; its graph is kept.
        inputs: With respect to what.
        cotangents: One per row.
    """
    found = torch.autograd.grad(output, inputs, cotangents, retain_graph=True, is_grads_batched=True, allow_unused=True)
    return tuple(
        source.new_zeros((len(cotangents), *source.shape)) if grad is None else grad.detach()
        for grad, source in zip(found, inputs, strict=True)
    )


@contextmanager
def recorded(
    model: TransformerLensModel,
    tokens: Int[Tensor, "pos"],
    *,
    sources: Sequence[int],
    of: Output,
    edits: Sequence[Hook] = (),
) -> Iterator[Graph]:
    """Runs a prompt once and keeps what its last token's output is to be differentiated by, as long as the body runs.

    The model is as before afterwards, also after an error. Hooks of the caller's act as in any run, but those of the unembedding and behind
    it see the last position alone.

    Args:
        model: The model.
        tokens: Token ids of the prompt, up to the token whose output is wanted.
        sources: Blocks whose input is differentiated by.
        of: What is differentiated.
        edits: Hooks that change activations; they come before those that read them.

    Raises:
        ValueError: The model's hooks cut the output off from the sources.
    """
    kept: dict[Any, Tensor] = {}

    def keep(block: int) -> Hook:
        def hook(stream: Tensor, hook: Any) -> Tensor:
            # A copy, so that the derivative is by what the block gets, and not by what stood in its place before.
            kept[block] = stream.clone() if stream.requires_grad else stream.detach().clone().requires_grad_()
            return kept[block]

        return hook_names.resid_pre(block), hook

    def end(activation: Tensor, hook: Any) -> Tensor:
        kept["output"] = activation[0, -1]
        if of != "logits":
            raise _Enough
        return kept["output"].view(1, 1, -1)

    last = hook_names.unembed_in() if isinstance(of, str) else hook_names.resid_post(of)
    hooks = [*edits, *(keep(block) for block in sources), (last, end)]
    with frozen(model), torch.inference_mode(False), torch.enable_grad():
        with suppress(_Enough):
            run: Any = model.run_with_hooks
            kept["logits"] = run(tokens.unsqueeze(0).to(model.cfg.device), fwd_hooks=hooks, return_type="logits")[0, -1]
        output, logits = kept["output"], kept.get("logits")
        if not (output.requires_grad and (logits is None or logits.requires_grad)):
            raise ValueError("model: its hooks detach what the output is made of; allowed: hooks that let gradients through")
        yield Graph(tuple(kept[block] for block in sources), output, logits)


def wide(like: Tensor) -> torch.dtype:
    """float32, or better where a tensor is."""
    return torch.promote_types(like.dtype, torch.float32)


CPU_TOKENS = 512
"""A CPU is given so many tokens of gradients at once: more gain nothing there, and from some thousands on lose to the memory's speed."""


def chunk_of(model: Any, n_tokens: int, n_sources: int, like: Tensor, memory: int) -> int:
    """How many vector-Jacobian products to take at once: what fits into some memory, on a CPU no more than pays; at least one.

    A product's largest tensors are those of one block's backward pass: a few as large as its attention patterns, its neurons and its
    stream, and at the end one stream per source.

    Args:
        model: The model.
        n_tokens: Positions.
        n_sources: Blocks whose input is differentiated by.
        like: A tensor of the dtype and on the device of the products.
        memory: Bytes.
    """
    cfg = model.cfg
    d_model, heads = int(cfg.d_model), int(cfg.n_heads)
    neurons = int(getattr(cfg, "d_mlp", None) or 4 * d_model)
    per_token = 4 * heads * n_tokens + 5 * neurons + (8 + 2 * n_sources) * d_model
    fitting = memory // (per_token * n_tokens * like.itemsize)
    return max(1, min(fitting, CPU_TOKENS // n_tokens) if like.device.type == "cpu" else fitting)
