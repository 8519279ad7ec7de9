"""How much of each input token the last one can still feel, at most: the bound of the over-squashing theorem, with a model's own numbers."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.interventions.intervention import Intervention
from sd_lens.models import hook_names
from sd_lens.models.loading import require_usable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import require_shown
from sd_lens.models.tokens import Prompts, decode_each
from sd_lens.propagation.arguments import one_prompt, require_intervention, require_position
from sd_lens.propagation.constants import BlockGains, Heads, measure_gains
from sd_lens.propagation.paths import path_weights
from sd_lens.propagation.squashing_result import BlockConstants, SquashingBound


def squashing_bound(
    model: TransformerLensModel,
    prompt: Prompts,
    *,
    heads: Heads = "mean",
    position: int = -1,
    beta1: float | None = None,
    beta2: float | None = None,
    beta3: float | None = None,
    sigma_psi: float | None = None,
    intervention: Intervention | None = None,
    prepend_bos: bool | None = None,
    progress: bool | None = None,
) -> SquashingBound:
    """Bounds how much a token's final representation ``y_n`` can change with the stream ``v_i`` that enters the blocks at each position.

    Theorem 5.1 of Barbero et al. ("Transformers need glasses!", NeurIPS 2024, arXiv 2406.04267) has it for blocks
    ``z_i = Σ_j α_ij norm1(v_j) + v_i``, ``v'_i = ψ(norm2(z_i)) + z_i``, and ``y = norm3(v)`` at the end:

        ‖∂y_n/∂v_i‖ ≤ C [Π_l (Λ_l/β1 + I)]_{n,i},   C = 1/β3 Π_l (σψ/β2 + 1).

    The paper's blocks have neither value nor output weights, and their attention does not depend on the tokens. For a real model the
    constants are therefore measured on this prompt up to the position, so that the bound holds **with the attention patterns kept as they are**:

    - ``1/β1``: division by the norm before attention, at the token where it is smallest; times the heads' output and value weights with that
      norm's gain (``heads``); times the largest spectral norm of the Jacobian of a norm after attention, where there is one.
    - ``σψ/β2``: largest spectral norm over the tokens of the Jacobian of what the FFN adds (gates, experts, a norm behind it included). Where
      ``beta2`` or ``sigma_psi`` is given it is their quotient instead; what is not given is then the smallest scale of the norm before the
      FFN, or the largest product of a token's scale and its Jacobian's norm.
    - ``1/β3``: spectral norm of the Jacobian of the final norm at the token.

    What is *not* bounded: that attention looks elsewhere when an input changes. The true Jacobian has such terms, too, and may exceed the bound.
    Nor does it hold beyond the run, where norms may divide by less. Spectral norms are bounded; Frobenius norms may be larger.

    Beside the theorem's bound stands a sharper one of the same kind, in which every token has its own constants (`SquashingBound.token_shares`):
    a token of high norm is divided by much, so the blocks add hardly anything of it to others, however much attention they pay to it.

    Args:
        model: A TransformerLens model.
        prompt: One prompt, as text or token ids.
        heads: What ``Λ`` is of the heads' patterns: their ``"mean"``, their ``"max"``, or their mean ``"weighted"`` by the norms of the heads'
            weights, which gives the sharpest bound.
        position: Whose final representation is meant; negative from the end.
        beta1: ``β1`` of every block instead of what is measured; with 1 for all constants, as in Proposition 5.2, attention alone counts.
        beta2: ``β2``, likewise.
        beta3: ``β3``, likewise.
        sigma_psi: ``σψ``, likewise; 0 leaves the FFNs out.
        intervention: Edits the run. Patterns, norms and FFNs are those of the edited run; what the edits themselves do to derivatives counts
            where they change what an FFN reads, and is left out where they change the stream.
        prepend_bos: Passed to the tokenisation of a string; None is the model's default.
        progress: Whether to show a progress bar; None shows one once the work takes seconds.

    Returns:
        The bound, over positions and depth, with its constants.

    Raises:
        ValueError: There is more than one prompt, an unknown ``heads``, a position that does not exist, a constant that is not positive
            (``sigma_psi`` negative), an intervention of another model, or a model that is unusable or shows no attention patterns.

    Example:
        >>> from sd_lens.models.loading import load
        >>> model = load("tiny")
        >>> bound = squashing_bound(model, "The cat sat on the mat.")
        >>> bound
        SquashingBound(tiny: position 9 of 10, 6 blocks, heads mean, 10^9.5 at most)
        >>> paper = squashing_bound(model, "The cat sat on the mat.", beta1=1.0, beta2=1.0, beta3=1.0, sigma_psi=0.0)
        >>> round(float(paper.path_weights.sum()), 3)  # each of the 6 blocks doubles the weight
        64.0
    """
    require_usable(model)
    if heads not in get_args(Heads):
        raise ValueError(f"heads: got {heads!r}; allowed: {', '.join(map(repr, get_args(Heads)))}")
    given = {"beta1": beta1, "beta2": beta2, "beta3": beta3, "sigma_psi": sigma_psi}
    for name, value in given.items():
        _require_constant(name, value)
    require_intervention(model, intervention)
    tokens = one_prompt(model, prompt, prepend_bos=prepend_bos)
    place = require_position(position, len(tokens))
    n_blocks = int(model.cfg.n_layers)
    require_shown(model, [hook_names.pattern(block) for block in range(n_blocks)], int(tokens[0]))
    edits = () if intervention is None else intervention.fwd_hooks()
    # Tokens after the position have no part in its output, so constants need not hold for them.
    gains, final = measure_gains(model, tokens[: place + 1], heads=heads, edits=edits, progress=progress)
    constants = tuple(_constants(block, gain, beta1=beta1, beta2=beta2, sigma_psi=sigma_psi) for block, gain in enumerate(gains))
    paths = path_weights([gain.attention.double() / row.beta1 for gain, row in zip(gains, constants, strict=True)])
    by_token = path_weights(
        [_by_token(gain, beta1) for gain in gains],
        token_gains=torch.stack([1 + _ffn_by_token(gain, beta2, sigma_psi) for gain in gains]),
    )
    beta3 = 1 / final if beta3 is None else float(beta3)
    steps = torch.tensor([-math.log10(beta3), *(math.log10(1 + row.ffn_gain) for row in reversed(constants))], dtype=torch.float64)
    return SquashingBound(
        model_name=str(model.cfg.model_name),
        heads=heads,
        position=place,
        tokens=tokens,
        texts=tuple(decode_each(model, tokens.tolist())),
        constants=constants,
        beta3=beta3,
        given=tuple(name for name, value in given.items() if value is not None),
        intervention=None if intervention is None else intervention.name,
        shares=_whole(paths.shares, len(tokens)),
        log10_weight=paths.log10_total,
        log10_constant=steps.cumsum(0),
        token_shares=_whole(by_token.shares, len(tokens)),
        log10_token_bound=by_token.log10_total - math.log10(beta3),
    )


def _whole(shares: Float[Tensor, "depth before"], n_tokens: int) -> Float[Tensor, "depth pos"]:
    """With zeros for the tokens after the position."""
    return torch.nn.functional.pad(shares, (0, n_tokens - shares.shape[-1]))


def _require_constant(name: str, value: Any) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and name != "sigma_psi"):
        allowed = "a finite number from 0" if name == "sigma_psi" else "a finite number above 0"
        raise ValueError(f"{name}: got {value!r}; allowed: {allowed}, or None to measure it")


def _constants(
    block: int, gains: BlockGains, *, beta1: float | None, beta2: float | None, sigma_psi: float | None
) -> BlockConstants:
    norm_scale, post = float(gains.scale.min()), float(gains.post.max())
    smallest, whole = float(gains.ffn_scale.min()), float(gains.ffn.max())
    measured = beta2 is None and sigma_psi is None
    beta2 = smallest if beta2 is None else float(beta2)
    sigma_psi = float((gains.ffn * gains.ffn_scale).max()) if sigma_psi is None else float(sigma_psi)
    gain = gains.heads * post / norm_scale
    return BlockConstants(
        block=block,
        beta1=float(beta1) if beta1 is not None else 1 / gain if gain > 0 else math.inf,
        norm_scale=norm_scale,
        head_factor=gains.heads,
        post_gain=post,
        beta2=beta2,
        sigma_psi=sigma_psi,
        ffn_gain=whole if measured else sigma_psi / beta2,
    )


def _by_token(gains: BlockGains, beta1: float | None) -> torch.Tensor:
    attention = gains.attention.double()
    if beta1 is not None:
        return attention / beta1
    return gains.heads * gains.post.unsqueeze(-1) * attention / gains.scale


def _ffn_by_token(gains: BlockGains, beta2: float | None, sigma_psi: float | None) -> torch.Tensor:
    if beta2 is None and sigma_psi is None:
        return gains.ffn
    above = gains.ffn * gains.ffn_scale if sigma_psi is None else torch.full_like(gains.ffn, sigma_psi)
    return above / (gains.ffn_scale if beta2 is None else beta2)
