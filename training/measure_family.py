"""What the family shows beside the shipped model: the table of its card.

Run it after the family has been made: ``python -m training.measure_family``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from jaxtyping import Float
from torch import Tensor

from sd_lens import Defects, find_defects, load, trace_norms
from sd_lens.linear.angles import acute_angle
from sd_lens.models.loading import TINY
from sd_lens.tracing.prompts import default_prompts
from training.data import Data, load_data
from training.family import FAMILY, FAMILY_FOLDER, SHIPPED
from training.loop import held_out_windows, window_losses
from training.measure import as_markdown
from training.recipe import Recipe
from training.train_family import digest, load_start, story_data

WINDOWS = 64
"""Windows of held-out text that a loss is the mean over."""


def defects_of(folder: Path) -> Defects:
    """What is found in a model on the built-in prompts.

    Args:
        folder: Folder of the model.

    Returns:
        The defects.
    """
    model = load(folder)
    return find_defects(trace_norms(model, default_prompts(model)))


@torch.no_grad()
def held_out_loss(folder: Path, data: Data) -> float:
    """Loss of a model on text it has not learnt.

    Args:
        folder: Folder of the model.
        data: Where the text comes from.

    Returns:
        Nats per token, mean over windows of the training's length.
    """
    ids = held_out_windows(Recipe(), data, WINDOWS)
    return float(window_losses(load_start(folder).eval(), ids).mean())


def folders_and_bases(out: Path) -> list[tuple[Path, str | None]]:
    """All models, the shipped one first.

    Args:
        out: Folder of the family.

    Returns:
        Folder of each model and the name of the member it begins from.
    """
    kept = [(out / folder, member.base) for member in FAMILY.values() for folder in member.folders.values()]
    return [(TINY, None), *kept]


def _angle(one: Defects, other: Defects | None) -> str:
    """Angle between the directions of two models, for a table.

    Args:
        one: What was found in one.
        other: What was found in the other; None where there is no other.

    Returns:
        Degrees, or a dash where there is nothing to compare.
    """
    if other is None or one.direction is None or other.direction is None:
        return "-"
    return f"{acute_angle(_unit(one), _unit(other)):.1f}°"


def _unit(defects: Defects) -> Float[Tensor, "d_model"]:
    """The direction of what was found.

    Args:
        defects: What was found.

    Returns:
        The unit vector.

    Raises:
        ValueError: Nothing was found.
    """
    if defects.direction is None:
        raise ValueError("defects: got none; allowed: a model with high-norm tokens")
    return defects.direction.direction


def family_table(out: Path, library: Data) -> pd.DataFrame:
    """One row per model.

    Args:
        out: Folder of the family.
        library: The documentation of the standard library.

    Returns:
        Losses, ratio, blocks and angles, as text.
    """
    stories = story_data(TINY)
    found: dict[str, Defects] = {}
    rows = []
    for folder, base in folders_and_bases(out):
        name = SHIPPED if folder == TINY else folder.name
        defects = found[name] = defects_of(folder)
        high = sorted({f"`{token.token}`" for token in defects.tokens})
        rows.append(
            {
                "model": name,
                "loss on documentation": f"{held_out_loss(folder, library):.2f}",
                "loss on stories": f"{held_out_loss(folder, stories):.2f}",
                "largest ratio": f"{float(defects.trace.ratios.max()):.1f}",
                "explosion blocks": ", ".join(map(str, defects.explosion_blocks)) or "-",
                "high-norm tokens": " ".join(high) or "-",
                "angle to the shipped": _angle(defects, found[SHIPPED]),
                "angle to its base": _angle(defects, found[base] if base else None),
            }
        )
    return pd.DataFrame(rows)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the family.")] = FAMILY_FOLDER,
    work: Annotated[Path, typer.Option(help="Folder of corpus and checkpoints.")] = Path("training/work"),
) -> None:
    """Print what the family shows, and what its weights hash to."""
    typer.echo(as_markdown(family_table(out, load_data(work, Recipe().vocab_size))))
    for folder, _ in folders_and_bases(out):
        typer.echo(f"{folder.name:<22} {digest(folder)}")


if __name__ == "__main__":
    typer.run(main)
