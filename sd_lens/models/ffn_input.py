"""Where what an FFN reads can be edited, so that the FFN alone sees the edit: a hook point that differs between model kinds.

- `TransformerBridge`: ``mlp.hook_in``; its values have gone through the norm's gain and bias. Where the FFN is no module of its own
  (OPT), that point may never be reached, and ``ln2.hook_out`` shows the same.
- `HookedTransformer`: ``ln2.hook_normalized``, before the gain.
- `HookedTransformer` where no norm stands before the FFN (OLMo 2): ``hook_mlp_in``, if the model was told to have it.

Editing ``hook_resid_mid`` would not do: on a bridge it reaches the FFN alone, on a `HookedTransformer` the stream as well, and
blocks with attention and FFN in parallel have no such point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.weights import BlockWeights


@dataclass(frozen=True, eq=False)
class FFNInput:
    """A hook point whose values are ``x * gain + bias``, with ``x`` the normalised stream that the FFN's linear map acts on.

    Attributes:
        name: The hook point.
        gain: The gain that its values have gone through; None where they are ``x`` itself.
        bias: The bias that was added to them, if any.
    """

    name: str
    gain: Float[Tensor, "d_model"] | None = None
    bias: Float[Tensor, "d_model"] | None = None


def ffn_input(model: TransformerLensModel, weights: BlockWeights) -> FFNInput:
    """The hook point at which a block's FFN, and nothing else, sees an edit.

    Args:
        model: A TransformerLens model.
        weights: The block, read from that model.

    Raises:
        ValueError: The model has no such hook point.

    Example:
        >>> from sd_lens.models.loading import load, weights_of
        >>> model = load("tiny")
        >>> ffn_input(model, weights_of(model)[2]).name
        'blocks.2.mlp.hook_in'
    """
    loaded: Any = model
    norm, block = weights.ffn.norm, weights.block
    name = hook_names.ffn_in(block)
    if name in loaded.hook_dict:
        if norm is None:
            return FFNInput(name)
        # A component without a name stands for several modules of the Hugging Face block, and nothing calls it.
        nameless = getattr(loaded.blocks[block].mlp, "name", "") is None
        return FFNInput(hook_names.ffn_norm_out(block) if nameless else name, norm.gain, norm.bias)
    if norm is not None and hook_names.ffn_normalized(block) in loaded.hook_dict:
        return FFNInput(hook_names.ffn_normalized(block))
    if norm is None and getattr(loaded.cfg, "use_hook_mlp_in", False):
        return FFNInput(hook_names.ffn_stream(block))
    raise ValueError(
        f"model: no hook point shows what the FFN of block {block} alone reads; allowed: a TransformerBridge, or a HookedTransformer with a norm "
        "before its FFNs or after set_use_hook_mlp_in(True)"
    )
