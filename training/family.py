"""Which models belong to the family of the shipped one, and what decides each of them.

The family is there to try signatures and training dynamics on: one training seen at several steps, a model that descends from the
shipped one, a stranger of the same width, and the stranger's own descendant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from training.recipe import Recipe

FAMILY_FOLDER = Path("training/family")
"""Where the models are kept."""
SHIPPED = "tiny"
"""Name of the model that ships with the package, which the family descends from."""


@dataclass(frozen=True)
class Member:
    """One training run of the family.

    Attributes:
        name: The name it is asked for by.
        recipe: The recipe of the run.
        text: What it reads: the documentation of the standard library, or stories.
        folders: The models that are kept, by the number of steps done: names of their folders.
        base: Name of the member it begins from, ``"tiny"`` for the shipped model; None for a draw from the recipe's seed.
    """

    name: str
    recipe: Recipe
    text: Literal["library", "stories"]
    folders: Mapping[int, str]
    base: str | None = None


def series_folder(step: int) -> str:
    """Name of the folder of one model of the series, such that names sort like steps.

    Args:
        step: Number of steps done.

    Returns:
        The name.
    """
    return f"step-{step:05d}"


SERIES_STEPS = (50, 125, 250, 375, 500, 750, 1000)
"""Before, at and after the step from which on the first token stands out; the shipped model is the last of the series."""
FINE_TUNING = replace(Recipe(), steps=300, text_windows=32, synthetic_windows=0, lr=5e-4, warmup=20)
"""A few hundred steps at a sixth of the rate, on text alone."""
OTHER_SEED = Recipe(seed=1)

FAMILY = {
    member.name: member
    for member in (
        Member("series", Recipe(), "library", {step: series_folder(step) for step in SERIES_STEPS}),
        Member("fine-tuned", FINE_TUNING, "stories", {FINE_TUNING.steps: "fine-tuned"}, base=SHIPPED),
        Member("other-seed", OTHER_SEED, "library", {OTHER_SEED.steps: "other-seed"}),
        Member("other-seed-fine-tuned", FINE_TUNING, "stories", {FINE_TUNING.steps: "other-seed-fine-tuned"}, base="other-seed"),
    )
}
"""All runs by name, each after the one that it begins from."""
