"""The result of comparing signatures: angles, verdicts, families."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from sd_lens.applications.chance import Verdict, chance_angle
from sd_lens.applications.signature import Signature
from sd_lens.applications.trees import LineageTree, lineage_tree

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class SignaturePair:
    """Two models.

    Attributes:
        a: The first one's name.
        b: The second one's.
        angle_deg: Acute angle between their directions, degrees; NaN where they cannot be compared.
        verdict: ``"same lineage"``, ``"undecided"``, ``"unrelated"`` or ``"cannot be compared"``; see `sd_lens.applications.chance`
            for the thresholds.
        because: Why they cannot be compared; empty where they can.
        chance_mean_deg: Expected angle of two random directions of their width.
        chance_std_deg: Its standard deviation.
        probability: How probable it is that random directions are no further apart.
        note: What the angle leaves open; else empty.
    """

    a: str
    b: str
    angle_deg: float
    verdict: Verdict
    because: str
    chance_mean_deg: float
    chance_std_deg: float
    probability: float
    note: str = ""

    def __str__(self) -> str:
        if self.verdict == "cannot be compared":
            return f"{self.a}, {self.b}: cannot be compared: {self.because}"
        chance = f"{self.chance_mean_deg:.1f}° ± {self.chance_std_deg:.1f}°"
        note = f"; {self.note}" if self.note else ""
        return f"{self.a}, {self.b}: {self.angle_deg:.1f}°, {self.verdict} (random directions: {chance}){note}"


@dataclass(frozen=True)
class SignatureDistances:
    """Angles between the signatures of several models, and what they say.

    Attributes:
        names: What the models are called here, each name once.
        signatures: Their signatures.
        angles: Acute angles, degrees, float64; NaN where two cannot be compared, and on the diagonal of a model without a defect.
        pairs: Every pair of different models, with a verdict.
    """

    names: tuple[str, ...]
    signatures: tuple[Signature, ...]
    angles: Float[Tensor, "item item"]
    pairs: tuple[SignaturePair, ...]

    @cached_property
    def trees(self) -> tuple[LineageTree, ...]:
        """One for each width among the models with a defect, as they first occur."""
        widths: dict[int, list[int]] = {}
        for number, one in enumerate(self.signatures):
            if one.found:
                widths.setdefault(one.d_model, []).append(number)
        return tuple(lineage_tree(members, self.angles) for members in widths.values())

    @property
    def order(self) -> tuple[int, ...]:
        """Numbers of all models as the trees' leaves stand, then those without a defect."""
        leaves = [number for tree in self.trees for number in tree.order]
        return (*leaves, *(number for number in range(len(self.names)) if number not in leaves))

    @property
    def families(self) -> tuple[tuple[str, ...], ...]:
        """Names of models of one lineage: clusters of the trees, cut where pairs stop being of the same lineage."""
        return tuple(
            tuple(self.names[number] for number in family) for tree in self.trees for family in tree.families(self._same_deg(tree))
        )

    def _same_deg(self, tree: LineageTree) -> float:
        width = self.signatures[tree.members[0]].d_model
        return chance_angle(width).same_deg if width > 1 else 0.0

    def pair(self, a: str, b: str) -> SignaturePair:
        """Two models by their names, in any order."""
        for pair in self.pairs:
            if {pair.a, pair.b} == {a, b}:
                return pair
        raise ValueError(f"a, b: got {a!r}, {b!r}; allowed: two different ones of {', '.join(map(repr, self.names))}")

    def sentences(self) -> tuple[str, ...]:
        """What the comparison shows."""
        said = [] if len(self.names) == 1 else [*self._relations()]
        named = zip(self.names, self.signatures, strict=True)
        said += [one.sentence(name) for name, one in named if len(self.names) == 1 or not one.found]
        widths = sorted({one.d_model for one in self.signatures if one.found and one.d_model > 1})
        if len(widths) > 1:
            said.append("Models of different widths cannot be compared.")
        for width in widths:
            chance = chance_angle(width)
            said.append(
                f"Two random directions of width {width} are {chance} apart; a pair is of the same lineage up to {chance.same_deg:.1f}°, "
                f"unrelated from {chance.unrelated_deg:.1f}° on."
            )
        return tuple(said)

    def _relations(self) -> list[str]:
        count = len(self.names)
        families = self.families
        if not families:
            return [f"None of the {count} models can be compared: no defect was found in any of them."]
        listed = "; ".join(", ".join(family) for family in families)
        text = f"{len(families)} {'family' if len(families) == 1 else 'families'} among {count} models: {listed}."
        where = {name: number for number, family in enumerate(families) for name in family}
        known = [pair for pair in self.pairs if pair.angle_deg == pair.angle_deg]
        inside = [pair.angle_deg for pair in known if where[pair.a] == where[pair.b]]
        between = [pair.angle_deg for pair in known if where[pair.a] != where[pair.b]]
        facts = [f"within a family angles are at most {max(inside):.1f}°"] if inside else []
        facts += [f"between families they are at least {min(between):.1f}°"] if between else []
        undecided = sum(pair.verdict == "undecided" for pair in known)
        facts += [f"{undecided} pair{'s' * (undecided != 1)} undecided"] if undecided else []
        joined = ", ".join(facts)
        said = [text, f"{joined[0].upper()}{joined[1:]}."] if facts else [text]
        noted = sum(bool(pair.note) for pair in known)
        if noted:
            said.append(
                f"In {noted} pair{'s' * (noted != 1)} one signature is of initial tokens and the other of later ones: their directions may "
                "differ in one lineage, so a large angle does not make them unrelated."
            )
        return said

    @property
    def notes(self) -> tuple[str, ...]:
        """What the comparison rests on, and what is particular about single signatures."""
        found = [one for one in self.signatures if one.found]
        notes = []
        if len({one.method for one in found}) > 1:
            notes.append(
                "signatures by activations and by weights are compared: the two of one model are some degrees apart, which adds to the angles"
            )
        if len({one.prompts for one in found if one.method == "activations"}) > 1:
            notes.append("some signatures were measured on built-in prompts, others on given ones")
        return (*notes, *(f"{name}: {note}" for name, one in zip(self.names, self.signatures, strict=True) for note in one.notes))

    def tree_text(self) -> str:
        """The trees as text."""
        return "\n\n".join("\n".join(tree.lines(self.names)) for tree in self.trees)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair, see `SignaturePair`."""
        return pd.DataFrame([vars(pair) for pair in self.pairs], columns=list(SignaturePair.__dataclass_fields__))

    def matrix(self) -> pd.DataFrame:
        """The angles, with names on both sides."""
        return pd.DataFrame(self.angles.numpy(), index=list(self.names), columns=list(self.names))

    def plot(self) -> Figure:
        """The angles as a map in the trees' order, with the trees above."""
        from sd_lens.display.figures import lineage_map

        return lineage_map(self)

    def __repr__(self) -> str:
        return f"SignatureDistances({len(self.names)} models, {len(self.families)} families)"

    def _repr_html_(self) -> str:
        return str(self.matrix().to_html(float_format="{:.1f}°".format, na_rep="–"))
