"""The one command that makes the relatives of the small model: ``python -m training.train_family [MEMBER ...]``.

It may be killed at any time; the same command goes on from the last checkpoint and ends with the same weights.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from sd_lens.models.loading import TINY
from training.data import Data, data_of_text, load_data
from training.export import export, to_half
from training.family import FAMILY, FAMILY_FOLDER, SHIPPED, Member
from training.loop import train
from training.recipe import Recipe
from training.stories import tell_stories

logger = logging.getLogger(__name__)


def digest(folder: Path) -> str:
    """SHA-256 of a model's weights.

    Args:
        folder: Folder of the model.

    Returns:
        The digest of its ``model.safetensors``.
    """
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def base_folder(member: Member, out: Path) -> Path | None:
    """Where the model is that a run begins from.

    Args:
        member: The run.
        out: Folder of the family.

    Returns:
        Its folder; None for a run that begins from nothing.

    Raises:
        ValueError: It has not been made yet.
    """
    if member.base is None:
        return None
    folder = TINY if member.base == SHIPPED else out / member.base
    if not (folder / "model.safetensors").exists():
        raise ValueError(f"{member.name}: got no model in {folder}; allowed: after {member.base!r} has been made")
    return folder


def story_data(base: Path) -> Data:
    """The stories in a model's own ids.

    Args:
        base: Folder of the model.

    Returns:
        The data.
    """
    stories = tell_stories()
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    return data_of_text(tokenizer, stories.train, stories.held_out, {"sha256": stories.digest})


def load_start(base: Path) -> LlamaForCausalLM:
    """A stored model, ready to be trained further.

    Args:
        base: Folder of the model.

    Returns:
        The model in single precision.
    """
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config.use_cache = False  # a cache is of no use while training; export turns it on
    return model.train()


def is_shipped(model: LlamaForCausalLM) -> bool:
    """Whether a model has the weights of the shipped one, to the bit.

    Args:
        model: A model of the same shape.

    Returns:
        True if every weight is the same in half precision.
    """
    pairs = zip(to_half(model).parameters(), LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float16).parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def export_whole(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a model such that an interruption never leaves half of it under its name.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Folder to write to.
    """
    partial = folder.with_suffix(".partial")
    export(model, tokenizer, partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def make_member(member: Member, out: Path, work: Path) -> LlamaForCausalLM:
    """Carry out one run and put its models into the folder of the family.

    Args:
        member: The run.
        out: Folder of the family.
        work: Folder of corpus and checkpoints.

    Returns:
        The model at the end of the run.

    Raises:
        ValueError: The model it begins from has not been made yet, or a model of a step that was done earlier is missing.
    """
    base = base_folder(member, out)
    # The checkpoint of a fine-tune belongs to one base: another one begins anew.
    run = work / (member.name if base is None else f"{member.name}-{digest(base)[:8]}")
    data = story_data(base) if base and member.text == "stories" else load_data(work, member.recipe.vocab_size)

    def keep(step: int, model: LlamaForCausalLM) -> None:
        if step in member.folders:
            export_whole(model, data.tokenizer, run / member.folders[step])

    model = train(member.recipe, data, run, on_step=keep, start=load_start(base) if base else None)
    keep(member.recipe.steps, model)  # also of a run that had come to its end before
    missing = [name for name in member.folders.values() if not (run / name).exists()]
    if missing:
        raise ValueError(
            f"{run}: got a checkpoint beyond the steps of {', '.join(missing)}; allowed: without it, so remove the folder"
        )
    for name in member.folders.values():
        shutil.copytree(run / name, out / name, dirs_exist_ok=True)
    return model


def main(
    members: Annotated[list[str] | None, typer.Argument(help=f"Which of {', '.join(FAMILY)}; without any, all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the family.")] = FAMILY_FOLDER,
    work: Annotated[Path, typer.Option(help="Folder of corpus and checkpoints.")] = Path("training/work"),
    threads: Annotated[int, typer.Option(help="Threads; another number may change the last bits.")] = 1,
) -> None:
    """Train the relatives of the small model and write them down."""
    unknown = sorted(set(members or ()) - set(FAMILY))
    if unknown:
        raise typer.BadParameter(f"members: got {', '.join(unknown)}; allowed: {', '.join(FAMILY)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    for name, member in FAMILY.items():
        if members and name not in members:
            continue
        logger.info("%s", name)
        model = make_member(member, out, work)
        if member.recipe == Recipe():
            # So that a series from another processor or Python is not taken for the shipped model's own.
            typer.echo(
                f"The run ended with {'the weights' if is_shipped(model) else 'other weights than those'} of the shipped model."
            )
        for folder in member.folders.values():
            typer.echo(f"{digest(out / folder)}  {out / folder}")


if __name__ == "__main__":
    typer.run(main)
