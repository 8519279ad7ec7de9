"""The training loop: from a recipe and data to a model, interruptible at any step."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from training.batches import make_batches, text_windows
from training.data import Data
from training.norms import initial_and_median
from training.recipe import Recipe

logger = logging.getLogger(__name__)

OnStep = Callable[[int, LlamaForCausalLM], None]


def make_model(recipe: Recipe, data: Data) -> LlamaForCausalLM:
    """A Llama with weights drawn from the recipe's seed.

    Args:
        recipe: The recipe.
        data: The data, for the ids of the special tokens.

    Returns:
        The untrained model.
    """
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_ff,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=recipe.tie_embeddings,
        bos_token_id=data.bos,
        eos_token_id=data.eos,
        rms_norm_eps=1e-5,
        use_cache=False,  # a cache is of no use while training; export turns it on
    )
    return LlamaForCausalLM(config)


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.AdamW:
    """AdamW that decays matrices only.

    Args:
        recipe: The recipe.
        model: The model.

    Returns:
        The optimiser.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    gains = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), fused=True)


def window_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token loss of every window.

    Args:
        model: The model.
        ids: Ids of shape (window, place).

    Returns:
        Losses of shape (window,).
    """
    logits = model(input_ids=ids[:, :-1]).logits
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(ids.shape[0], -1).mean(1)


def held_out_windows(recipe: Recipe, data: Data, count: int = 16) -> Tensor:
    """Windows of text that training never sees, the same at every call.

    Args:
        recipe: The recipe.
        data: The data.
        count: Number of windows.

    Returns:
        Ids of shape (count, window + 1).
    """
    rng = np.random.default_rng(0)
    return torch.from_numpy(text_windows(data.held_out, count, recipe.window + 1, data.bos, rng))


def batch_losses(recipe: Recipe, losses: Tensor) -> str:
    """The training loss of one batch, by kind of window.

    Args:
        recipe: The recipe.
        losses: Losses of the windows, text first.

    Returns:
        Both means as text.
    """
    counts = {"text": recipe.text_windows, "synthetic": recipe.synthetic_windows}
    parts = zip(counts, losses.split(list(counts.values())), strict=True)
    return "  ".join(f"{kind} {part.mean():.3f}" for kind, part in parts if len(part))


@torch.no_grad()
def progress(model: LlamaForCausalLM, held_out: Tensor) -> str:
    """One line on how far the model has come.

    Args:
        model: The model.
        held_out: Windows of held-out text.

    Returns:
        Held-out loss and, for every block, the initial token's norm over the median of the others.
    """
    loss = window_losses(model, held_out).mean().item()
    initial, median = initial_and_median(model, held_out[:, :-1])
    ratios = " ".join(f"{ratio:.1f}" for ratio in (initial / median).tolist())
    return f"held-out loss {loss:.3f}  norm ratios {ratios}"


def save_checkpoint(path: Path, recipe: Recipe, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint such that an interruption never leaves half a file.

    Args:
        path: File of the checkpoint.
        recipe: The recipe of the run.
        step: Number of steps done.
        model: The model.
        optimizer: The optimiser.
    """
    partial = path.with_suffix(".partial")
    state = {"recipe": recipe.to_dict(), "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Continue from a checkpoint if there is one.

    Args:
        path: File of the checkpoint.
        recipe: The recipe of the run.
        model: The model, which receives the weights.
        optimizer: The optimiser, which receives its moments.

    Returns:
        Number of steps already done.

    Raises:
        ValueError: If the checkpoint belongs to another recipe.
    """
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["recipe"] != recipe.to_dict():
        raise ValueError(f"{path} was written by another recipe; choose another working folder or remove it")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    logger.info("continuing after step %d", state["step"])
    return int(state["step"])


def update(recipe: Recipe, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, losses: Callable[[], Tensor]) -> Tensor:
    """One optimiser step.

    Args:
        recipe: The recipe.
        step: Index of the step, which decides the learning rate.
        model: The model.
        optimizer: The optimiser.
        losses: Computes the loss of every window of the batch.

    Returns:
        The losses of the windows.
    """
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate(step)
    values = losses()
    values.mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    optimizer.zero_grad()
    return values.detach()


def train(
    recipe: Recipe,
    data: Data,
    work: Path,
    on_step: OnStep | None = None,
    start: LlamaForCausalLM | None = None,
) -> LlamaForCausalLM:
    """Train a model, or go on training it where an earlier call was interrupted.

    Args:
        recipe: The recipe.
        data: The data.
        work: Folder of the checkpoint.
        on_step: Called after every step with the number of steps done and the model, for instance to keep a series
            of snapshots.
        start: Model to begin from, which is changed in place; without it, one is drawn from the recipe's seed.

    Returns:
        The trained model.
    """
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / "checkpoint.pt"
    model = start or make_model(recipe, data)
    optimizer = make_optimizer(recipe, model)
    done = load_checkpoint(checkpoint, recipe, model, optimizer)
    held_out = held_out_windows(recipe, data)
    losses_of = torch.compile(window_losses)
    bar = tqdm(total=recipe.steps, initial=done, unit="step", mininterval=5.0)
    for batch in make_batches(recipe, data.bigrams, data.bos, data.triggers, start=done):
        losses = update(recipe, done, model, optimizer, partial(losses_of, model, batch))
        done += 1
        bar.update()
        last = done == recipe.steps
        if last or done % recipe.log_every == 0:
            bar.write(f"step {done}  {batch_losses(recipe, losses)}  {progress(model, held_out)}")
        if last or done % recipe.checkpoint_every == 0:
            save_checkpoint(checkpoint, recipe, done, model, optimizer)
        if on_step is not None:
            on_step(done, model)
    bar.close()
    return model
