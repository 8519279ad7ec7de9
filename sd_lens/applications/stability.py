"""The result of following a defect direction over training: one row per checkpoint, and what they say together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
from jaxtyping import Float
from scipy.special import polygamma
from torch import Tensor

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SETTLED_DEG = 15.0
"""A direction has settled where it stays within this angle of the last checkpoint's."""


@dataclass(frozen=True)
class CheckpointState:
    """What one checkpoint shows. "The tokens" are the last checkpoint's high-norm tokens, at the blocks after which they are high there.

    Attributes:
        label: The checkpoint.
        step: Its training step, None where it is not known.
        found: Whether it has an explosion of its own: high-norm tokens, any, and a block that makes them.
        explosion_block: The explosion block that adds most; None where nothing was found.
        explosion_blocks: All of them.
        max_ratio: Largest norm of any token after any block, over the median of the other tokens' there.
        n_high: How many tokens have a high norm in it.
        n_same: How many of the tokens are among those.
        norm: Mean norm of the tokens.
        ratio: Mean of that norm over the median of the other tokens' at the same block.
        mean_pairwise_angle_deg: Mean acute angle between the residual vectors of the tokens, degrees (see `DefectDirection`).
        angle_to_last_deg: Angle of their mean vector to that in the last checkpoint, 0° to 180°: it has a sign, other than a singular vector.
        angle_to_previous_deg: The same to the previous checkpoint; NaN in the first.
        others_angle_to_last_deg: What `angle_to_last_deg` is for the mean vector of all other tokens after the same blocks: how far
            the stream as a whole still has to move.
        own_angle_to_last_deg: Angle of the checkpoint's own defect direction, that of its own high-norm tokens, to the last one's;
            NaN where it has none.
    """

    label: str
    step: int | None
    found: bool
    explosion_block: int | None
    explosion_blocks: tuple[int, ...]
    max_ratio: float
    n_high: int
    n_same: int
    norm: float
    ratio: float
    mean_pairwise_angle_deg: float
    angle_to_last_deg: float
    angle_to_previous_deg: float
    others_angle_to_last_deg: float
    own_angle_to_last_deg: float

    @property
    def name(self) -> str:
        """The step where it is known, else the label: ``step 500``, ``tiny``."""
        return self.label if self.step is None else f"step {self.step}"


@dataclass(frozen=True, eq=False)
class DirectionStability:
    """A defect direction over the checkpoints of a training run.

    Attributes:
        model_name: The last checkpoint.
        d_model: Width.
        n_blocks: Number of blocks.
        states: One per checkpoint, in order of training.
        directions: Unit mean vector of the last checkpoint's high-norm tokens in every checkpoint, float32; NaN where there are none,
            or their vectors cancel.
        n_prompts: Prompts traced.
        n_tokens: Tokens of them.
        n_vectors: Residual vectors that each direction is the mean of; 0 where the last checkpoint has no high-norm token.
        min_ratio: Least ratio of a high-norm token.
    """

    model_name: str
    d_model: int
    n_blocks: int
    states: tuple[CheckpointState, ...]
    directions: Float[Tensor, "checkpoint d_model"]
    n_prompts: int
    n_tokens: int
    n_vectors: int
    min_ratio: float

    @property
    def emergence(self) -> CheckpointState | None:
        """The first checkpoint from which on every one has an explosion that takes in some of the tokens; None where the last has none.

        An explosion of other tokens (``n_same`` is 0) is not the one that the last checkpoint has, even where no checkpoint lies
        between the two.
        """
        return _first_of_the_last([state.found and state.n_same > 0 for state in self.states], self.states)

    @property
    def settled(self) -> CheckpointState | None:
        """The first checkpoint from which on the angle to the last stays within 15°; None where only the last itself does."""
        first = _first_of_the_last([state.angle_to_last_deg <= SETTLED_DEG for state in self.states], self.states)
        return None if first is self.states[-1] else first

    @property
    def chance_deg(self) -> tuple[float, float]:
        """Mean and standard deviation of the angle between two random directions of this width, degrees.

        The angle's density is ``sin(θ)^(d-2)``: its mean is 90° and its variance, from the Gamma functions of its characteristic
        function, ``ψ₁(d/2) / 2`` in radians squared.
        """
        return 90.0, math.degrees(math.sqrt(float(polygamma(1, self.d_model / 2)) / 2))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per checkpoint: the fields of `CheckpointState`."""
        frame = pd.DataFrame([vars(state) for state in self.states])
        whole = {"step": "Int64", "explosion_block": "Int64"}  # integers that may be missing
        return frame.astype({name: kind for name, kind in whole.items() if name in frame})

    def plot(self) -> Figure:
        """Norm ratio and angles over training, the emergence marked."""
        from sd_lens.display.dynamics_figures import direction_stability as figure

        return figure(self)

    def sentences(self) -> tuple[str, ...]:
        """When the explosion emerges, how its direction settles, and what the angles before it mean."""
        if self.emergence is None:
            return (self._none(),) if not self.n_vectors else (self._none(), self._angles())
        read = (self._before(),) if self.emergence is not self.states[0] else ()
        return self._emerged(), self._angles(), *read

    def _none(self) -> str:
        last = self.states[-1]
        if self.n_vectors:
            why = f"it has {_tokens(last.n_high)} of high norm, but no block that makes them"
        else:
            why = (
                f"no token's norm reaches {self.min_ratio:g} times the others' median after any block (the largest ratio is {last.max_ratio:.1f}), "
                "so there is no direction to follow"
            )
        gone = "".join(f" Earlier there was one{whose}, at {_listed(states)}." for whose, states in self._explosions(self.states))
        return f"The last checkpoint, {last.name}, has no explosion: {why}.{gone}"

    def _emerged(self) -> str:
        at, last = self.emergence, self.states[-1]
        assert at is not None
        place = self.states.index(at)
        where = f"block{'s' * (len(at.explosion_blocks) != 1)} {', '.join(map(str, at.explosion_blocks))}"
        if at is self.states[0]:
            return f"Every checkpoint has an explosion, from {at.name} on ({where}): the largest norm is {at.max_ratio:.1f} times the others' median there and {last.max_ratio:.1f} times at {last.name}."
        before = self.states[place - 1]
        end = "" if at is last else f", {last.max_ratio:.1f} times at {last.name}"
        there = " (in other tokens)" if before.found else ""  # were it in these, this would be the emergence
        passing = self._explosions(self.states[:place])
        gone = "".join(f" An earlier one{whose}, at {_listed(states)}, did not last." for whose, states in passing)
        return (
            f"The explosion emerges at {at.name} ({where}): the largest norm is {before.max_ratio:.1f} times the others' median at {before.name}{there}, "
            f"{at.max_ratio:.1f} times at {at.name}{end}.{gone}"
        )

    def _explosions(self, states: tuple[CheckpointState, ...]) -> list[tuple[str, list[CheckpointState]]]:
        """Those of these states that have an explosion: first of the tokens followed, then of other tokens alone."""
        followed = [state for state in states if state.found and (state.n_same > 0 or not self.n_vectors)]
        others = [state for state in states if state.found and state not in followed]
        return [(whose, found) for whose, found in (("", followed), (", of other tokens", others)) if found]

    def _angles(self) -> str:
        first, last, at = self.states[0], self.states[-1], self.emergence
        steps = [first, *([at] if at is not None and at not in (first, last) else [])]
        if len(self.states) > 2 and self.states[-2] not in steps:
            steps.append(self.states[-2])
        each = [f"{_degrees(state.angle_to_last_deg)} at {state.name}" for state in steps]
        shown = " and ".join([", ".join(each[:-1]), each[-1]] if len(each) > 1 else each)
        settled = self.settled
        stays = (
            f"It does not stay within {SETTLED_DEG:g}° before the last checkpoint"
            if settled is None
            else f"It stays within {SETTLED_DEG:g}° from {settled.name} on"
        )
        mean, spread = self.chance_deg
        return (
            f"The tokens that have a high norm at {last.name} have a mean residual vector that is {shown} from where it ends. {stays}. "
            f"(That of all other tokens is {_degrees(first.others_angle_to_last_deg)} from its end at {first.name}; random directions are {mean:.0f}° ± {spread:.0f}° apart.)"
        )

    def _before(self) -> str:
        return (
            "Before the explosion that vector is the ordinary residual vector of the same tokens, not a defect: its angle says how far it "
            "still has to turn. That it is alike in all prompts says nothing then: at position 0 the same token has the same vector in all of them."
        )

    def __repr__(self) -> str:
        at = self.emergence
        when = "no explosion in the last" if at is None else f"explosion from {at.name} on"
        turned = "" if not self.n_vectors else f", direction {_degrees(self.states[0].angle_to_last_deg)} from the last at first"
        return f"DirectionStability({self.model_name}: {len(self.states)} checkpoints, {when}{turned})"

    def _repr_html_(self) -> str:
        return self.plot()._repr_html_()


def _first_of_the_last(holds: list[bool], states: tuple[CheckpointState, ...]) -> CheckpointState | None:
    """The first state of the run of states at the end for which something holds."""
    place = len(holds)
    while place and holds[place - 1]:
        place -= 1
    return states[place] if place < len(states) else None


def _listed(states: list[CheckpointState]) -> str:
    return ", ".join(state.name for state in states)


def _degrees(angle: float) -> str:
    return "at no angle" if math.isnan(angle) else f"{angle:.0f}°"


def _tokens(n: int) -> str:
    return f"{n:,} token{'s' * (n != 1)}"
