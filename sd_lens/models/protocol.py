"""The model type every analysis accepts, without naming a class of either TransformerLens generation."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class TransformerLensModel(Protocol):
    """What `TransformerBridge` (3.9 and 4) and `HookedTransformer` (3.9) share and sd_lens uses."""

    cfg: Any

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model with hooks that are gone afterwards."""
        ...

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model and keeps activations."""
        ...

    def to_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Token ids of a string."""
        ...
