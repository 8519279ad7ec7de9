"""What a trained model shows, on natural prompts: the numbers of its model card.

Run it on a folder: ``python -m training.measure sd_lens/models/tiny``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch import Tensor

from sd_lens import Defects, block_directions, find_defects, load, trace_norms
from sd_lens.models import hook_names
from training.prompts import DELIMITERS, PROMPTS

LENGTH = 128
"""Tokens per prompt, BOS included: a window of the training."""


def prompt_ids(model: Any) -> Tensor:
    """The natural prompts as ids, each cut to the same length.

    Args:
        model: The model.

    Returns:
        Ids of shape (prompt, length).
    """
    return torch.stack([model.to_tokens(text)[0, :LENGTH] for text in PROMPTS.values()])


def initial_table(model: Any, ids: Tensor, defects: Defects) -> pd.DataFrame:
    """Per block: norms of the initial token, what is added to it, where the block's map sends, attention paid to it.

    Args:
        model: The model.
        ids: Ids of shape (prompt, place).
        defects: What was found on them.

    Returns:
        One row per block.

    Raises:
        ValueError: Nothing was found, so that there is no direction to compare with.
    """
    trace = defects.trace
    if trace.direction is None:
        raise ValueError("defects: nothing was found; allowed: a model with high-norm tokens")
    names = (hook_names.attn_out, hook_names.mlp_out, hook_names.pattern)
    wanted = [name(block) for block in range(trace.n_blocks) for name in names]
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, names_filter=lambda name: name in wanted)
    directions = block_directions(model, trace.direction.direction)
    rows = []
    for block in range(trace.n_blocks):
        attention, ffn, pattern = (cache[name(block)] for name in names)
        heads = pattern[:, :, 1:, 0].mean((0, 2))
        initial = trace.norms[block + 1, trace.position == 0].mean()
        rows.append(
            {
                "after block": block,
                "norm of BOS": f"{initial:.1f}",
                "median of the others": f"{trace.reference[block + 1]:.1f}",
                "ratio": f"{initial / trace.reference[block + 1]:.1f}",
                "attention adds to BOS": f"{attention[:, 0].norm(dim=-1).mean():.1f}",
                "FFN adds to BOS": f"{ffn[:, 0].norm(dim=-1).mean():.1f}",
                "angle of the block's u0": f"{directions.row(block).angle_deg:.1f}°",
                "angle of the FFN's u0": f"{directions.row(block, 'ffn').angle_deg:.1f}°",
                "attention to BOS, mean (best head)": f"{heads.mean():.2f} ({heads.max():.2f})",
            }
        )
    return pd.DataFrame(rows)


def as_markdown(table: pd.DataFrame) -> str:
    """A table of strings in Markdown.

    Args:
        table: The table.

    Returns:
        Its lines.
    """
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def first_ids(model: Any, block: int) -> Tensor:
    """Norm of every id alone at the initial place, after a block.

    Args:
        model: The model.
        block: The block.

    Returns:
        One norm per id.
    """
    alone = trace_norms(model, torch.arange(model.cfg.d_vocab)[:, None], stop_at=block + 1, direction_prompts=0)
    return alone.norms[-1]


def measure(folder: Annotated[Path, typer.Argument(help="Folder of the model.")]) -> None:
    """Print what a model shows."""
    model: Any = load(folder)
    ids = prompt_ids(model)
    trace = trace_norms(model, ids)
    defects = find_defects(trace)
    typer.echo(defects)
    if not defects.found:
        return
    typer.echo(as_markdown(initial_table(model, ids, defects)))
    block = defects.explosion_blocks[-1]
    reference = trace.reference[block + 1]
    ratios = first_ids(model, block) / reference
    others = ratios[torch.arange(len(ratios)) != model.tokenizer.bos_token_id]
    typer.echo(f"Norms after block {block} over the median of the others:")
    typer.echo(f"  any id but BOS alone at the initial place: median {others.median():.2f}, largest {others.max():.2f}")
    for text in DELIMITERS:
        pieces = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        here = trace.ratios[block + 1, (trace.tokens == pieces[0]) & (trace.position > 0)]
        if len(pieces) == 1 and len(here):
            typer.echo(f"  {text!r} inside the text: {len(here)} times, mean {here.mean():.2f}, largest {here.max():.2f}")


if __name__ == "__main__":
    typer.run(measure)
