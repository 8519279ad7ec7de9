"""A model held still, so that its activations can be differentiated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sd_lens.models.loading import inference


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Runs the body with gradients, in eval mode and with no parameter asking for a gradient; everything is as before afterwards.

    What is differentiated are activations, so that graphs keep nothing that only the parameters' gradients need.
    """
    # A bridge keeps the Hugging Face model out of its module tree.
    parts = [part for part in (model, getattr(model, "original_model", None)) if isinstance(part, nn.Module)]
    asking = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    with inference(model):
        try:
            for parameter in asking:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            for parameter in asking:
                parameter.requires_grad_(True)
