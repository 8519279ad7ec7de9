"""A model's signature: the direction of its high-norm tokens, small enough to keep and to compare.

Wang et al. (ICML 2025, arXiv 2502.07004), section 5, observe that the direction hardly moves when a model is fine-tuned, and that models
trained separately have different ones.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.applications.chance import Chance, chance_angle
from sd_lens.applications.signature_files import content_hash, read_signature, write_signature

Method = Literal["activations", "weights"]
METHODS = ("activations", "weights")
Positions = Literal["", "initial", "later", "both"]


@dataclass(frozen=True)
class Signature:
    """The direction of a model's high-norm tokens, or the reason why there is none.

    Attributes:
        direction: Unit vector, float32, on the CPU. Its sign is a convention: the coordinate of largest magnitude is positive. None where
            no defect was found.
        model_name: The model.
        d_model: Its width.
        n_blocks: How many blocks it has.
        method: ``"activations"``, measured on prompts, or ``"weights"``, a singular vector of the explosion block.
        block: The explosion block that adds most; None where there is none.
        because: Why there is no direction; empty where there is one.
        prompts: What was measured on: ``"built-in"``, ``"given"``, or empty where nothing was.
        n_prompts: How many prompts.
        n_tokens: How many high-norm tokens the direction is of.
        tokens: Their texts, each once, most frequent first, at most eight; empty of weights.
        positions: Where they stand: ``"initial"`` in their prompts, ``"later"``, or ``"both"``; empty of weights.
        spread_deg: Mean angle between their residual vectors, degrees; None where it was not measured.
        gap: Of weights, largest over second largest singular value of the FFN's map at ``block``; None of activations.
        notes: What it rests on.
        version: The sd_lens that made it.
    """

    direction: Float[Tensor, "d_model"] | None
    model_name: str
    d_model: int
    n_blocks: int
    method: Method
    block: int | None
    because: str = ""
    prompts: str = ""
    n_prompts: int = 0
    n_tokens: int = 0
    tokens: tuple[str, ...] = ()
    positions: Positions = ""
    spread_deg: float | None = None
    gap: float | None = None
    notes: tuple[str, ...] = ()
    version: str = ""

    @property
    def found(self) -> bool:
        """Whether there is a direction."""
        return self.direction is not None

    @property
    def chance(self) -> Chance:
        """What the angle to a random direction of this width is."""
        return chance_angle(self.d_model)

    @property
    def content_hash(self) -> str:
        """SHA-256 over everything above: labels as canonical JSON, then the vector's little-endian bytes."""
        return content_hash(self._labels(), self.direction)

    def _labels(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _LABELS} | {name: list(getattr(self, name)) for name in _LISTS}

    def largest(self, k: int = 5) -> list[tuple[int, float]]:
        """The coordinates of largest magnitude and what stands there; empty where there is no direction."""
        if self.direction is None:
            return []
        order = torch.argsort(self.direction.abs(), descending=True, stable=True)[:k].tolist()
        return [(index, float(self.direction[index])) for index in order]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes ``PATH.json`` and ``PATH.safetensors``, both or neither.

        Args:
            path: Where, with either ending or with none.

        Raises:
            ValueError: The folder does not exist or cannot be written to.
        """
        write_signature(path, self._labels(), self.direction)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Signature:
        """Reads a signature that `save` wrote.

        Args:
            path: With either file's ending or with none.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: One of the two files is missing or damaged, or was edited since (hash mismatch).
        """
        labels, direction = read_signature(path)
        if set(labels) != {*_LABELS}:
            strange = sorted({*_LABELS} ^ set(labels))
            raise ValueError(
                f"path: {os.fspath(path)} has other fields ({', '.join(strange)}); allowed: a signature of this version"
            )
        if direction is not None and len(direction) != labels["d_model"]:
            raise ValueError(f"path: {os.fspath(path)} has {len(direction)} coordinates; allowed: its d_model, {labels['d_model']}")
        for name in _LISTS:
            labels[name] = tuple(labels[name])
        return cls(direction=direction, **labels)

    @property
    def kind(self) -> str:
        """Which tokens it is of, in words; empty where that is not known, as of weights."""
        listed = ", ".join(map(repr, self.tokens))
        return f"{_WHERE[self.positions]} {listed}" if self.positions else ""

    def of_other_tokens_than(self, other: Signature) -> bool:
        """Whether one is of initial tokens and the other of later ones, with no token in common.

        Initial tokens explode for where they stand, later ones for what they are, so that one model may have a direction for each. Ids and
        texts alone would not tell: models with different tokenizers have none in common.

        Args:
            other: Another signature.
        """
        return {self.positions, other.positions} == {"initial", "later"} and not {*self.tokens} & {*other.tokens}

    def sentence(self, name: str | None = None) -> str:
        """What it is, in one sentence.

        Args:
            name: What to call the model; default: its name.
        """
        name = self.model_name if name is None else name
        if not self.found:
            return f"{name} has no signature by {self.method}: {self.because}."
        if self.method == "weights":
            stands = "" if self.gap is None else f", which stretches it {self.gap:.3g} times as much as any other direction"
            return f"The signature of {name} is the leading left singular vector of block {self.block}'s FFN{stands}."
        where = "no single block" if self.block is None else f"block {self.block}"
        count = f"{self.n_tokens} high-norm token{'s' * (self.n_tokens != 1)}"
        count += f" ({self.kind})" if self.kind else ""
        return f"The signature of {name} is the mean direction of {count}; {where} makes most of their norm."

    def to_dataframe(self) -> pd.DataFrame:
        """One row per coordinate of the direction: ``coordinate``, ``value``, largest magnitude first."""
        return pd.DataFrame(self.largest(self.d_model), columns=["coordinate", "value"])

    def __repr__(self) -> str:
        what = f"block {self.block}, {self.content_hash[:12]}" if self.found else "no defect"
        return f"Signature({self.model_name}, by {self.method}: d_model {self.d_model}, {what})"


_LABELS = tuple(field.name for field in fields(Signature) if field.name != "direction")
_LISTS = ("tokens", "notes")
_WHERE = {"initial": "initial", "later": "later", "both": "initial and later"}


def with_sign(direction: Float[Tensor, "d_model"]) -> Float[Tensor, "d_model"]:
    """A direction as a float32 unit vector on the CPU whose coordinate of largest magnitude is positive."""
    wide = direction.detach().double().cpu()
    wide = wide / wide.norm()
    return (
        wide * (-1.0 if wide[int(wide.abs().argmax())] < 0 else 1.0)
    ).float() + 0.0  # no negative zeros: they would change the hash
