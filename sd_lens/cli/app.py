"""The command itself, and what becomes of complaints."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from sd_lens.models.quiet import TALKERS

app = typer.Typer(
    help="Find and explain the high-norm tokens (singular defects, massive activations) of language models.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Registers a command whose complaints about its input end in one line on stderr and exit code 2."""

    @app.command()
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (ValueError, OSError) as error:
            complain(str(error))
            raise typer.Exit(2) from None

    return run


def complain(message: str) -> None:
    """Says what is wrong in one line on stderr."""
    typer.echo(f"sd-lens: {' '.join(message.split())}", err=True)


def _hush() -> None:
    """Keeps the libraries below from talking: stderr is for progress bars and for our own one line."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    for name in TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """The ``sd-lens`` command."""
    _hush()
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except Exception as error:
        # Typer carries its own copy of click, so its exceptions are told by what they can do.
        explain = getattr(error, "format_message", None)
        if explain is None and type(error).__name__ != "Abort":
            raise
        if explain is not None:
            complain(explain())
        code = 1 if explain is None else 2
    sys.exit(code if isinstance(code, int) else 0)
