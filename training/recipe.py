"""What one training run consists of: every number that decides its result, in one frozen place."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights a run ends with, given the corpus and the torch build.

    Attributes:
        seed: Seeds the initial weights and, together with the step number, every batch.
        steps: Number of optimiser steps.
        n_layers: Number of transformer blocks.
        d_model: Width of the residual stream.
        n_heads: Attention heads per block.
        d_ff: Width of the gated feed-forward layer.
        vocab_size: Size of the byte-level BPE vocabulary, special tokens included.
        max_positions: Longest sequence the configuration announces.
        tie_embeddings: Whether the unembedding shares the embedding's weights.
        window: Tokens the model reads per window, the leading BOS included.
        text_windows: Windows of natural text in each batch.
        synthetic_windows: Windows of bigram-backcopy sequences in each batch.
        trigger_rate: Probability of a trigger token at each place of a synthetic window.
        lr: Peak learning rate.
        warmup: Steps of linear warm-up.
        decay_share: Share of the steps, at the end, over which the rate falls linearly.
        final_lr_share: Rate at the last step as a share of the peak.
        beta1: First AdamW moment coefficient.
        beta2: Second AdamW moment coefficient.
        weight_decay: AdamW weight decay of the matrices; gains of the norms are left alone.
        clip: Gradients are clipped to this global norm.
        log_every: Steps between two measurements of loss and norms.
        checkpoint_every: Steps between two checkpoints.
    """

    seed: int = 0
    steps: int = 1250
    n_layers: int = 6
    d_model: int = 128
    n_heads: int = 4
    d_ff: int = 344
    vocab_size: int = 1024
    max_positions: int = 512
    tie_embeddings: bool = True
    window: int = 128
    text_windows: int = 16
    synthetic_windows: int = 16
    trigger_rate: float = 0.15
    lr: float = 3e-3
    warmup: int = 100
    decay_share: float = 0.2
    final_lr_share: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    log_every: int = 50
    checkpoint_every: int = 250

    def learning_rate(self, step: int) -> float:
        """Learning rate of one step: linear warm-up, constant, linear fall at the end.

        Args:
            step: Index of the step, from 0.

        Returns:
            The learning rate.
        """
        decay_steps = max(1, int(self.steps * self.decay_share))
        remaining = (self.steps - 1 - step) / decay_steps
        falling = self.final_lr_share + (1 - self.final_lr_share) * min(1.0, max(0.0, remaining))
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * falling

    def to_dict(self) -> dict[str, int | float | bool]:
        """Plain dictionary of the fields, for checkpoints and model cards.

        Returns:
            Field names and values.
        """
        return asdict(self)
