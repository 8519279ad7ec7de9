"""Explosion and decay blocks, the high-norm tokens and the defect direction, found from a trace alone.

No model's blocks are looked up in a table. Tokens whose norm is a multiple of the others' are the high-norm ones; the mean
projection of their residual vectors on the defect direction, followed over the blocks, makes a plateau. A block is an explosion
block if it adds a good part of the plateau's height in one step, and a decay block if it takes away a good part of it later. Initial
tokens and later ones (delimiters) are followed apart, since they may explode in different blocks; and so that rare tokens are not
outvoted by frequent ones, a block where some token makes its largest step is an explosion block as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts
from sd_lens.tracing.direction import DefectDirection
from sd_lens.tracing.norms import measure_direction, trace_norms
from sd_lens.tracing.trace import MIN_RATIO, NormTrace

MIN_JUMP = 0.25
"""An explosion block adds at least this share of the peak projection; a block where it builds up over four is one of four."""
MIN_FALL = 0.25
"""A decay block takes away at least this share of the peak projection."""


@dataclass(frozen=True)
class HighNormToken:
    """One token with a high norm.

    Attributes:
        prompt: Which prompt it is in.
        pos: Its position there.
        token: The token as text.
        id: Its id.
        peak_block: Block after which its norm stands out most.
        norm: Its norm there.
        ratio: That norm relative to the median of the other tokens' at the same block.
    """

    prompt: int
    pos: int
    token: str
    id: int
    peak_block: int
    norm: float
    ratio: float


@dataclass(frozen=True)
class Defects:
    """What a trace shows of high-norm tokens; possibly that there are none.

    Attributes:
        trace: The trace.
        explosion_blocks: Blocks that add a good part of the large norm, in order.
        decay_blocks: Blocks that take away a good part of it.
        tokens: The high-norm tokens.
        profiles: What the blocks were found on: mean projection of high-norm tokens on the defect direction after the embedding
            and after every block, for ``"initial"`` and ``"later"`` tokens.
        min_ratio: Least ratio of a high-norm token.
        min_jump: Least share of the peak that an explosion block adds.
        min_fall: Least share of the peak that a decay block takes away.
    """

    trace: NormTrace
    explosion_blocks: tuple[int, ...]
    decay_blocks: tuple[int, ...]
    tokens: tuple[HighNormToken, ...]
    profiles: Mapping[str, tuple[float, ...]]
    min_ratio: float
    min_jump: float
    min_fall: float

    @property
    def found(self) -> bool:
        """Whether there are high-norm tokens that a block made."""
        return bool(self.explosion_blocks)

    @property
    def main_block(self) -> int | None:
        """The explosion block that adds most to some group's profile; None where there is none."""
        if not self.found:
            return None
        profiles = torch.tensor(list(self.profiles.values()), dtype=torch.float64)
        steps = profiles.abs().diff(dim=1).max(0).values
        return max(self.explosion_blocks, key=lambda block: float(steps[block]))

    @property
    def direction(self) -> DefectDirection | None:
        """The defect direction, where there are high-norm tokens and it was measured."""
        return self.trace.direction

    def mask(self, block: int | None = None) -> Bool[Tensor, "prompt pos"]:
        """Which tokens to leave out of means, of SAE training, of anything that outliers spoil.

        Args:
            block: Tokens with a high norm after this block; None for those with one after any.

        Returns:
            True at high-norm tokens; prompts in rows, False beyond their ends.
        """
        points = len(self.trace.norms)
        if block is not None and not 0 <= block < points - 1:
            raise ValueError(f"block: got {block}; allowed: 0 to {points - 2}, the blocks traced")
        high = self.trace.high_norm(self.min_ratio)
        chosen = high.any(0) if block is None else high[block + 1]
        mask = torch.zeros(self.trace.n_prompts, int(self.trace.position.max()) + 1, dtype=torch.bool)
        mask[self.trace.prompt, self.trace.position] = chosen
        return mask

    def to_dataframe(self) -> pd.DataFrame:
        """One row per high-norm token."""
        return pd.DataFrame([vars(token) for token in self.tokens], columns=list(HighNormToken.__dataclass_fields__))

    def __repr__(self) -> str:
        if not self.tokens:
            return f"Defects({self.trace.model_name}: no high-norm token, largest ratio {_largest_ratio(self.trace):.1f})"
        if not self.found:
            return f"Defects({self.trace.model_name}: {len(self.tokens)} high-norm tokens, but no block that makes them)"
        return (
            f"Defects({self.trace.model_name}: {len(self.tokens)} high-norm tokens, explosion in block "
            f"{_listed(self.explosion_blocks)}, decay in {'block ' + _listed(self.decay_blocks) if self.decay_blocks else 'no block'})"
        )


def _listed(blocks: tuple[int, ...]) -> str:
    return ", ".join(map(str, blocks))


def _largest_ratio(trace: NormTrace) -> float:
    return float(trace.ratios[1:].max())


def find_defects(
    trace: NormTrace, *, min_ratio: float = MIN_RATIO, min_jump: float = MIN_JUMP, min_fall: float = MIN_FALL
) -> Defects:
    """Finds explosion blocks, decay blocks and high-norm tokens in a trace.

    The blocks are those where the high-norm tokens' mean projection on the defect direction jumps or falls. For a trace without
    a direction (``direction_prompts=0``, `NormMonitor`), or with one measured for another ``min_ratio``, the norm in excess of the
    other tokens' takes its place.

    Args:
        trace: From `trace_norms`, `NormTrace.from_cache` or `NormMonitor`.
        min_ratio: Least norm of a high-norm token, as a multiple of the other tokens' median.
        min_jump: Least share of the peak projection that an explosion block adds.
        min_fall: Least share of the peak projection that a decay block takes away.

    Returns:
        What was found; nothing is a valid answer, see `Defects.found`.

    Raises:
        ValueError: A threshold is out of range, or every prompt has one token only, so that there is nothing to compare with.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> find_defects(trace_norms(planted().model, torch.arange(10).unsqueeze(0)))
        Defects(planted: 1 high-norm tokens, explosion in block 1, decay in block 4)
    """
    for name, share in (("min_jump", min_jump), ("min_fall", min_fall)):
        if not 0 < share <= 1:
            raise ValueError(f"{name}: got {share}; allowed: above 0, up to 1")
    if bool((trace.position == 0).all()):
        raise ValueError(
            "trace: every prompt has one token only; allowed: prompts with other tokens, which norms are compared with"
        )
    high = trace.high_norm(min_ratio)
    anywhere = high.any(0)
    profiles = _profiles(trace, anywhere, min_ratio)
    explosion, decay = set[int](), set[int]()
    for profile in profiles.values():
        up, down = _steps(torch.tensor(profile, dtype=torch.float64), min_jump, min_fall)
        explosion.update(up)
        decay.update(down)
    explosion.update(_own_blocks(trace, anywhere, min_jump))
    found = bool(anywhere.any())
    return Defects(
        trace=trace,
        explosion_blocks=tuple(sorted(explosion)) if found else (),
        decay_blocks=tuple(sorted(decay)) if found else (),
        tokens=tuple(_high_norm_tokens(trace, anywhere)),
        profiles=profiles,
        min_ratio=min_ratio,
        min_jump=min_jump,
        min_fall=min_fall,
    )


def _profiles(trace: NormTrace, anywhere: Tensor, min_ratio: float) -> dict[str, tuple[float, ...]]:
    """Profiles on the direction, where they were measured for this threshold and group of tokens; else on excess norms."""
    direction = trace.direction
    measured = dict(direction.profiles) if direction is not None and direction.min_ratio == min_ratio else {}
    return _excess_profiles(trace, anywhere) | measured


def _excess(trace: NormTrace) -> Tensor:
    """Root of the squared norm in excess of the other tokens' median: the part of a norm that the direction must account for."""
    return (trace.norms.double() ** 2 - trace.reference.double().unsqueeze(1) ** 2).clamp(min=0).sqrt()


def _excess_profiles(trace: NormTrace, anywhere: Tensor) -> dict[str, tuple[float, ...]]:
    excess = _excess(trace)
    groups = {"initial": anywhere & (trace.position == 0), "later": anywhere & (trace.position > 0)}
    return {group: tuple(excess[:, members].mean(1).tolist()) for group, members in groups.items() if bool(members.any())}


def _steps(profile: Tensor, min_jump: float, min_fall: float) -> tuple[list[int], list[int]]:
    """Blocks where a profile rises by a share of its peak's height, and those after the first of them where it falls by one."""
    if -profile.min() > profile.max():  # a group of tokens may go the opposite way along the direction
        profile = -profile
    height = float(profile.max())
    if height <= 0:
        return [], []
    steps = (profile.diff() / height).tolist()  # entry b is block b's
    up = [block for block, step in enumerate(steps) if step >= min_jump]
    first = up[0] if up else int(profile.argmax()) - 1  # built up slowly, it may still fall at once
    down = [block for block, step in enumerate(steps) if step <= -min_fall and block > first]
    return up, down


def _own_blocks(trace: NormTrace, anywhere: Tensor, min_jump: float) -> set[int]:
    """Blocks where some high-norm token takes its largest step, if that is a good part of its own peak.

    A mean over tokens shows where most of them explode; those that do in another block must not depend on how many they are.
    """
    excess = _excess(trace)[:, anywhere]
    if excess.shape[1] == 0:
        return set()
    steps = excess.diff(dim=0)
    largest, block = steps.max(dim=0)
    return set(block[largest >= min_jump * excess.max(dim=0).values].tolist())


def _high_norm_tokens(trace: NormTrace, anywhere: Tensor) -> list[HighNormToken]:
    after_blocks, ratios = trace.norms[1:], trace.ratios[1:]
    tokens = []
    for index in anywhere.nonzero().flatten().tolist():
        peak = int(ratios[:, index].argmax())
        tokens.append(
            HighNormToken(
                prompt=int(trace.prompt[index]),
                pos=int(trace.position[index]),
                token=trace.texts[index],
                id=int(trace.tokens[index]),
                peak_block=peak,
                norm=float(after_blocks[peak, index]),
                ratio=float(ratios[peak, index]),
            )
        )
    return tokens


def defect_direction(
    model: TransformerLensModel,
    prompts: Prompts,
    *,
    prepend_bos: bool | None = None,
    min_ratio: float = MIN_RATIO,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: bool | None = None,
) -> DefectDirection:
    """The mean of the residual vectors whose norm is high, over all blocks and positions (Wang et al., arXiv 2502.07004, section 3).

    Two passes: one to find which norms are high, one over the prompts that have any to add up their vectors. Nothing grows with
    the corpus but one number per token and block.

    Args:
        model: A TransformerLens model.
        prompts: The prompts, all of which are used.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        min_ratio: Least norm of a high-norm token, as a multiple of the other tokens' median.
        batch_tokens: Largest number of tokens run at once.
        seed: Seeds the sample that the mean pairwise angle is measured on where there are more than 512 vectors.
        progress: Whether to show progress bars.

    Returns:
        The direction, the number of vectors and tokens, and the mean pairwise angle.

    Raises:
        ValueError: No token has a high norm, or the prompts are unusable.

    Example:
        >>> from sd_lens.linear.angles import acute_angle
        >>> from sd_lens.models.planted import planted
        >>> truth = planted("gpt2")
        >>> measured = defect_direction(truth.model, torch.arange(30).reshape(3, 10))
        >>> measured.n_tokens, bool(acute_angle(measured.direction, truth.direction) < 1)
        (3, True)
    """
    trace = trace_norms(model, prompts, prepend_bos=prepend_bos, batch_tokens=batch_tokens, direction_prompts=0, progress=progress)
    measured = measure_direction(model, trace, min_ratio=min_ratio, batch_tokens=batch_tokens, seed=seed, progress=progress)
    if measured is None:
        raise ValueError(
            f"prompts: no token's norm reaches {min_ratio:g} times the other tokens' median (largest ratio {_largest_ratio(trace):.1f}); "
            "allowed: a model and prompts with high-norm tokens"
        )
    return measured
