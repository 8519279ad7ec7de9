"""Libraries that talk when they are imported are asked not to."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

TALKERS = ("torchao", "torch.utils._pytree")
"""Loggers: torchao, which transformers imports wherever it is installed, lists the kernels that it has for other machines."""


@contextmanager
def quiet() -> Iterator[None]:
    """Lets these loggers say errors only while the context is open."""
    loggers = [logging.getLogger(name) for name in TALKERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
