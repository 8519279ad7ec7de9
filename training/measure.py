"""Whether a Llama shows singular defects: norms, where they arise, and what its weights predict.

Uses torch and transformers alone, so that it can check the package's own tools. Run it on a folder:
``python -m training.measure sd_lens/models/tiny``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from training.maps import acute_angle, attention_map, ffn_map, leading_left
from training.norms import block_outputs, initial_and_median, recorded
from training.prompts import DELIMITERS, PROMPTS


@dataclass(frozen=True)
class Report:
    """What was measured; every sequence has one entry per block.

    Attributes:
        initial: Norm of the initial token after the block.
        median: Median norm of the other tokens after the block.
        angle_block: Angle between the leading left singular vector of the block's linear map and the direction.
        angle_ffn: The same for the map of the feed-forward layer alone, ``I + F``.
        attention_gain: Norm of what attention adds to the initial token.
        ffn_gain: Norm of what the feed-forward layer adds to the initial token.
        sink: Mean attention that the later tokens pay to the initial one, and the largest over the heads.
        explosion: Block after which the ratio of the norms has grown most.
        delimiters: Norms of delimiters inside the text over the median, after the block of the explosion.
        first_ids: Norms of every id alone at the initial place over the median, after the block of the explosion.
    """

    initial: list[float]
    median: list[float]
    angle_block: list[float]
    angle_ffn: list[float]
    attention_gain: list[float]
    ffn_gain: list[float]
    sink: list[tuple[float, float]]
    explosion: int
    delimiters: dict[str, tuple[int, float, float]]
    first_ids: Tensor


@torch.no_grad()
def contributions(model: LlamaForCausalLM, ids: Tensor) -> tuple[list[float], list[float]]:
    """How much attention and the feed-forward layer add to the initial token.

    Args:
        model: The model.
        ids: Ids of shape (batch, place).

    Returns:
        Mean norm of either contribution, per block.
    """
    modules = [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]
    with recorded(modules) as outputs:
        model(input_ids=ids)
    sizes = [output[:, 0].norm(dim=-1).mean().item() for output in outputs]
    return sizes[0::2], sizes[1::2]


@torch.no_grad()
def sinks(model: LlamaForCausalLM, ids: Tensor) -> list[tuple[float, float]]:
    """Attention paid to the initial token by the later ones.

    Args:
        model: The model.
        ids: Ids of shape (batch, place).

    Returns:
        Per block, the mean over heads and the largest head.
    """
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the fused kernel does not give its weights away
    attentions = model(input_ids=ids, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    per_head = [attention[:, :, 1:, 0].mean((0, 2)) for attention in attentions]
    return [(heads.mean().item(), heads.max().item()) for heads in per_head]


@torch.no_grad()
def norms_alone(model: LlamaForCausalLM, block: int) -> Tensor:
    """Norm of every id alone at the initial place.

    Args:
        model: The model.
        block: Block after which the norm is taken.

    Returns:
        One norm per id.
    """
    ids = torch.arange(model.config.vocab_size)[:, None]
    return block_outputs(model, ids)[block, :, 0].norm(dim=-1)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """The natural prompts as ids, each cut to the same length.

    Args:
        tokenizer: The tokenizer, which puts BOS in front.
        length: Ids per prompt, BOS included.

    Returns:
        Ids of shape (prompt, length).
    """
    return torch.tensor([tokenizer(text)["input_ids"][:length] for text in PROMPTS.values()])


def delimiter_norms(
    tokenizer: PreTrainedTokenizerBase, norms: Tensor, ids: Tensor, median: float
) -> dict[str, tuple[int, float, float]]:
    """Norms of delimiters inside the text.

    Args:
        tokenizer: The tokenizer.
        norms: Norms after one block, of shape (prompt, place).
        ids: The prompts' ids.
        median: Median norm of the tokens that are not initial.

    Returns:
        For every delimiter that occurs, its count and its mean and largest norm over the median.
    """
    found: dict[str, tuple[int, float, float]] = {}
    later_ids, later_norms = ids[:, 1:], norms[:, 1:]
    for text in DELIMITERS:
        pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
        here = later_norms[later_ids == pieces[0]] / median
        if len(pieces) == 1 and len(here):
            found[text] = (len(here), here.mean().item(), here.max().item())
    return found


@torch.no_grad()
def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, length: int = 128) -> Report:
    """Measure a model on natural prompts.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        length: Ids per prompt, BOS included.

    Returns:
        The report.
    """
    ids = prompt_ids(tokenizer, length)
    initial, median = initial_and_median(model, ids)
    ratio = initial / median
    explosion = int(torch.diff(ratio, prepend=torch.ones(1)).argmax())
    outputs = block_outputs(model, ids)
    direction = outputs[explosion, :, 0].mean(0)
    identity = torch.eye(model.config.hidden_size, dtype=torch.float64)
    blocks = range(model.config.num_hidden_layers)
    ffn = [identity + ffn_map(model, block) for block in blocks]
    whole = [ffn[block] @ (identity + attention_map(model, block)) for block in blocks]
    attention_gain, ffn_gain = contributions(model, ids)
    reference = median[explosion].item()
    return Report(
        initial=initial.tolist(),
        median=median.tolist(),
        angle_block=[acute_angle(leading_left(matrix), direction) for matrix in whole],
        angle_ffn=[acute_angle(leading_left(matrix), direction) for matrix in ffn],
        attention_gain=attention_gain,
        ffn_gain=ffn_gain,
        sink=sinks(model, ids),
        explosion=explosion,
        delimiters=delimiter_norms(tokenizer, outputs[explosion].norm(dim=-1), ids, reference),
        first_ids=norms_alone(model, explosion) / reference,
    )


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load a model as users do.

    Args:
        folder: Folder of the model.

    Returns:
        The model in single precision, and its tokenizer.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def as_table(report: Report) -> str:
    """The numbers of every block as a Markdown table.

    Args:
        report: What was measured.

    Returns:
        The table.
    """
    lines = [
        "| after block | norm of BOS | median of the others | ratio | attention adds to BOS | FFN adds to BOS "
        "| angle of the block's u0 | angle of the FFN's u0 | attention to BOS, mean (best head) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for block, (initial, median) in enumerate(zip(report.initial, report.median, strict=True)):
        mean, best = report.sink[block]
        lines.append(
            f"| {block} | {initial:.1f} | {median:.1f} | {initial / median:.1f} | {report.attention_gain[block]:.1f} "
            f"| {report.ffn_gain[block]:.1f} | {report.angle_block[block]:.1f}° | {report.angle_ffn[block]:.1f}° "
            f"| {mean:.2f} ({best:.2f}) |"
        )
    return "\n".join(lines)


def main(folder: Annotated[Path, typer.Argument(help="Folder of the model.")]) -> None:
    """Print what a model shows."""
    model, tokenizer = load(folder)
    report = measure(model, tokenizer)
    typer.echo(as_table(report))
    typer.echo(f"explosion in block {report.explosion}; norms there over the median of the others:")
    others = report.first_ids[torch.arange(len(report.first_ids)) != tokenizer.bos_token_id]
    typer.echo(
        f"  any id but BOS alone at the initial place: median {others.median():.2f}, largest {others.max():.2f}, "
        f"above 10: {(others > 10).sum()} of {len(others)}"
    )
    typer.echo(f"  the ten largest: {[tokenizer.decode([i]) for i in report.first_ids.topk(10).indices.tolist()]}")
    for text, (count, mean, largest) in report.delimiters.items():
        typer.echo(f"  {text!r}: {count} times, mean {mean:.2f}, largest {largest:.2f}")


if __name__ == "__main__":
    typer.run(main)
