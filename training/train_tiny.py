"""The one command that makes the small model of the package: ``python -m training.train_tiny``.

It may be killed at any time; the same command goes on from the last checkpoint and ends with the same weights.
"""

from __future__ import annotations

import json
import logging
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer

from training.data import load_data
from training.export import export
from training.loop import train
from training.measure import measure
from training.recipe import Recipe

_DEFAULTS = Recipe()


def main(
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the batches.")] = _DEFAULTS.seed,
    steps: Annotated[int, typer.Option(help="Number of optimiser steps.")] = _DEFAULTS.steps,
    out: Annotated[Path, typer.Option(help="Folder the model is written to.")] = Path("sd_lens/models/tiny"),
    work: Annotated[Path, typer.Option(help="Folder of corpus and checkpoints.")] = Path("training/work"),
    threads: Annotated[int, typer.Option(help="Threads; another number may change the last bits.")] = 1,
) -> None:
    """Make the corpus, train the model, write it down and print what it shows."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    recipe = Recipe(seed=seed, steps=steps)
    data = load_data(work, recipe.vocab_size)
    model = train(recipe, data, work / f"seed-{seed}-steps-{steps}")
    export(model, data.tokenizer, out)
    facts = {"torch": torch.__version__, "python": platform.python_version(), "threads": threads}
    typer.echo(json.dumps({"recipe": recipe.to_dict(), "corpus": data.facts, "made with": facts}, indent=2))
    measure(out)


if __name__ == "__main__":
    typer.run(main)
