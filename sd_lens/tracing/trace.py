"""A trace: one norm per token and hook point, with what is needed to read it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.labelled import read_labelled, write_labelled
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import decode_each, unpadded_lengths
from sd_lens.tracing.direction import DefectDirection, DirectionAccumulator

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MIN_RATIO = 6.0
"""A token has a high norm where it is this many times the median norm of the other tokens. Models without the phenomenon stay
below 2.5 on ordinary text and below 4.5 on characters they hardly saw in training; those with it reach 10 (a million parameters) to
1000 (billions)."""


@runtime_checkable
class CacheLike(Protocol):
    """What is needed of an `ActivationCache`; a dict has it too."""

    def keys(self) -> Iterable[str]:
        """Names of the hook points kept."""
        ...

    def __getitem__(self, name: str, /) -> Tensor: ...


@dataclass(frozen=True)
class NormTrace:
    """Residual norms of the tokens of some prompts.

    Attributes:
        norms: Norm of every token; row 0 after the embedding, row ``b + 1`` after block ``b``.
        tokens: Token ids of all prompts, one after the other.
        prompt: Which prompt each token belongs to.
        position: Position of each token in its prompt.
        texts: Each token as text.
        model_name: The model.
        d_model: Its width.
        n_blocks: How many blocks the model has; a trace that was stopped early has fewer rows.
        direction: The defect direction measured along with the norms, None where there is no high-norm token or it was not
            asked for.
    """

    norms: Float[Tensor, "point token"]
    tokens: Int[Tensor, "token"]
    prompt: Int[Tensor, "token"]
    position: Int[Tensor, "token"]
    texts: tuple[str, ...]
    model_name: str
    d_model: int
    n_blocks: int
    direction: DefectDirection | None = None

    @property
    def n_prompts(self) -> int:
        """How many prompts were traced."""
        return int(self.prompt[-1]) + 1

    @cached_property
    def reference(self) -> Float[Tensor, "point"]:
        """Median norm of the tokens after the first of their prompt, at each point: what high norms are compared with.

        NaN where every prompt has one token only: then there is nothing to compare with.
        """
        others = self.norms[:, self.position > 0]
        return others.median(dim=1).values if others.shape[1] else torch.full((len(self.norms),), float("nan"))

    @property
    def ratios(self) -> Float[Tensor, "point token"]:
        """Norms relative to `reference`."""
        return self.norms / self.reference.unsqueeze(1)

    def high_norm(self, min_ratio: float = MIN_RATIO) -> Bool[Tensor, "point token"]:
        """Where a token has a high norm after a block (the embedding's row is always False)."""
        require_ratio(min_ratio)
        high = self.ratios >= min_ratio
        high[0] = False
        return high

    def of_prompt(self, prompt: int) -> Float[Tensor, "point pos"]:
        """Norms of one prompt's tokens."""
        return self.norms[:, self._of(prompt)]

    def texts_of(self, prompt: int) -> list[str]:
        """One prompt's tokens as text."""
        return [self.texts[i] for i in self._of(prompt).nonzero().flatten().tolist()]

    def _of(self, prompt: int) -> Bool[Tensor, "token"]:
        if not 0 <= prompt < self.n_prompts:
            raise ValueError(f"prompt: got {prompt}; allowed: 0 to {self.n_prompts - 1}")
        return self.prompt == prompt

    def to_dataframe(self) -> pd.DataFrame:
        """One row per token and point: prompt, pos, token, id, block (−1 after the embedding), norm, ratio."""
        points, n_tokens = self.norms.shape
        once = {
            "prompt": self.prompt.numpy(),
            "pos": self.position.numpy(),
            "token": self.texts,
            "id": self.tokens.numpy(),
        }
        frame = pd.concat([pd.DataFrame(once)] * points, ignore_index=True)
        frame["block"] = torch.arange(-1, points - 1).repeat_interleave(n_tokens).numpy()
        frame["norm"] = self.norms.flatten().numpy()
        frame["ratio"] = self.ratios.flatten().numpy()
        return frame

    def plot(self, prompt: int = 0) -> Figure:
        """Norms over blocks, one line per token of a prompt, on a log scale."""
        from sd_lens.display.figures import norm_lines

        return norm_lines(self, prompt)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the trace as one safetensors file, its labels in the metadata."""
        tensors = {name: getattr(self, name) for name in ("norms", "tokens", "prompt", "position")}
        labels = {
            "texts": self.texts,
            "model_name": self.model_name,
            "d_model": self.d_model,
            "n_blocks": self.n_blocks,
        }
        if self.direction is not None:
            tensors["direction"] = self.direction.direction
            labels["direction"] = {key: value for key, value in asdict(self.direction).items() if key != "direction"}
        write_labelled(path, "NormTrace", tensors, labels)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NormTrace:
        """Reads a trace that `save` wrote."""
        tensors, labels = read_labelled(path, "NormTrace", "trace")
        fields: dict[str, Any] = {**tensors, **labels, "texts": tuple(labels["texts"])}
        measured = labels.get("direction")
        if measured is not None:
            measured["profiles"] = {group: tuple(profile) for group, profile in measured["profiles"].items()}
            fields["direction"] = DefectDirection(direction=tensors["direction"], **measured)
        return cls(**fields)

    @classmethod
    def from_cache(
        cls,
        cache: CacheLike,
        tokens: Int[Tensor, "batch pos"] | Int[Tensor, "pos"],
        *,
        model: TransformerLensModel | None = None,
        mask: Bool[Tensor, "batch pos"] | None = None,
        min_ratio: float = MIN_RATIO,
    ) -> NormTrace:
        """A trace of activations that exist already.

        Args:
            cache: An `ActivationCache` (or a dict) that holds ``blocks.0.hook_resid_pre`` and ``blocks.b.hook_resid_post`` for every
                block from 0 on, up to where the run was stopped.
            tokens: The token ids that it was run on.
            model: The model it came from, for its tokenizer and number of blocks; default: the cache's own.
            mask: True at real tokens, False at padding (on the right); default: what `trace_norms` takes for padding.
            min_ratio: What counts as a high norm, for the defect direction.

        Returns:
            The trace, with the direction.

        Raises:
            ValueError: Hook points are missing from the cache, shapes do not fit, or the stream is not finite.
        """
        model = getattr(cache, "model", None) if model is None else model
        n_blocks = _blocks_in(cache, model)
        streams = [cache[name] for name in hook_names.residual_points(n_blocks)]
        streams = [(stream.unsqueeze(0) if stream.ndim == 2 else stream).detach() for stream in streams]
        tokens, mask = cached_tokens(streams[0].shape[:2], tokens, model=model, mask=mask)
        trace = labelled(
            torch.stack([stream_norms(stream).cpu()[mask] for stream in streams]),
            [row[keep] for row, keep in zip(tokens, mask, strict=True)],
            model,
            n_blocks=getattr(getattr(model, "cfg", None), "n_layers", n_blocks),
            d_model=streams[0].shape[-1],
        )
        require_finite(trace)
        high = torch.zeros(len(streams), *mask.shape, dtype=torch.bool)
        high[:, mask] = trace.high_norm(min_ratio)
        accumulator = DirectionAccumulator(len(streams), trace.d_model, min_ratio=min_ratio)
        for point, stream in enumerate(streams):
            accumulator.add(point, stream, high[point], high.any(0))
        return replace(trace, direction=accumulator.result())

    def __repr__(self) -> str:
        points, n_tokens = self.norms.shape
        return (
            f"NormTrace({self.model_name}: {n_tokens} tokens of {self.n_prompts} prompts, {points - 1} of {self.n_blocks} blocks)"
        )

    def _repr_html_(self) -> str:
        return self.plot()._repr_html_()


def cached_tokens(
    shape: Sequence[int], tokens: Int[Tensor, "*batch pos"], *, model: Any, mask: Bool[Tensor, "batch pos"] | None = None
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """The tokens of a cache and which of them are real, on the CPU.

    Args:
        shape: The cache's batch and positions; positions only where it has no batch dimension.
        tokens: The token ids that it was run on.
        model: The model it came from, for its tokenizer.
        mask: True at real tokens; default: what `trace_norms` takes for padding.

    Raises:
        ValueError: The tokens are not as many as the cache's, or the mask is not of padding on the right.
    """
    tokens = (tokens.unsqueeze(0) if tokens.ndim == 1 else tokens).cpu()
    shape = (1, *shape) if len(shape) == 1 else tuple(shape)
    if shape != tuple(tokens.shape):
        raise ValueError(f"tokens: got shape {tuple(tokens.shape)}; allowed: the cache's, {shape}")
    if mask is None:
        mask = torch.arange(tokens.shape[1]) < unpadded_lengths(model, tokens).unsqueeze(1)
    if mask.shape != tokens.shape:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}; allowed: the tokens', {tuple(tokens.shape)}")
    mask = mask.cpu().bool()
    if not bool(mask[:, 0].all()) or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("mask: a row is not True at its first tokens and False after them; allowed: padding on the right")
    return tokens, mask


def _blocks_in(cache: CacheLike, model: Any) -> int:
    """How many blocks the cache has the stream after; all of them from the first on must be there."""
    names = set(cache.keys())
    most = getattr(getattr(model, "cfg", None), "n_layers", None)
    if most is None:
        most = 1 + max((int(name.split(".")[1]) for name in names if name.endswith("hook_resid_post")), default=0)
    there = [hook_names.resid_post(block) in names for block in range(most)]
    n_blocks = max((block + 1 for block, present in enumerate(there) if present), default=most)
    missing = [name for name in hook_names.residual_points(n_blocks) if name not in names]
    if missing:
        raise ValueError(
            f"cache: it lacks {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; allowed: a cache with these hook points, kept "
            "by run_with_cache(..., names_filter=lambda name: name == 'blocks.0.hook_resid_pre' or name.endswith('hook_resid_post'))"
        )
    return n_blocks


def require_ratio(min_ratio: float) -> None:
    """Raises `ValueError` unless the threshold can tell a high norm from an ordinary one."""
    if not min_ratio > 1:
        raise ValueError(f"min_ratio: got {min_ratio}; allowed: above 1")


def require_finite(trace: NormTrace) -> None:
    """Raises `ValueError` naming the first place where the stream is NaN or infinite."""
    bad = (~torch.isfinite(trace.norms)).nonzero()
    if len(bad):
        point, token = bad[0].tolist()
        where = "the embedding" if point == 0 else f"block {point - 1}"
        raise not_finite(f"{where} (prompt {int(trace.prompt[token])}, position {int(trace.position[token])})")


def not_finite(where: str) -> ValueError:
    """What is raised where the residual stream is NaN or infinite, for instance after ``"block 3"``."""
    return ValueError(
        f"model: its residual stream is NaN or infinite after {where}; allowed: finite weights, and a dtype that holds the stream "
        "(float16 ends at 65504)"
    )


def stream_norms(stream: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
    """Norms of residual vectors, in float32."""
    # The squares of norms that fp16 holds do not fit into fp16.
    return torch.linalg.vector_norm(stream, dim=-1, dtype=torch.promote_types(stream.dtype, torch.float32)).float()


def labels_of(sequences: Sequence[Int[Tensor, "_"]], model: Any) -> dict[str, Any]:
    """What is known of every token of some prompts, one after the other: ``tokens``, ``prompt``, ``position`` and ``texts``.

    Args:
        sequences: Token ids, one tensor per prompt.
        model: The model, for its tokenizer; None where it is not known.
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    tokens = torch.cat(list(sequences))
    return {
        "tokens": tokens,
        "prompt": torch.arange(len(sequences)).repeat_interleave(lengths),
        "position": torch.cat([torch.arange(int(length)) for length in lengths]),
        "texts": tuple(decode_each(model, tokens.tolist())),
    }


def labelled(
    norms: Float[Tensor, "point token"], sequences: Sequence[Int[Tensor, "_"]], model: Any, *, n_blocks: int, d_model: int
) -> NormTrace:
    """A trace of norms, with what the token ids and the model say about them.

    Args:
        norms: One column per token.
        sequences: Token ids, one tensor per prompt, in the columns' order.
        model: The model, for its tokenizer and name; None where it is not known.
        n_blocks: How many blocks it has.
        d_model: Its width.
    """
    return NormTrace(
        norms=norms,
        **labels_of(sequences, model),
        model_name=str(getattr(getattr(model, "cfg", None), "model_name", "model")),
        d_model=d_model,
        n_blocks=n_blocks,
    )
