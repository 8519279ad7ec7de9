"""Arguments that commands share, and what is checked of them before any work."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import typer

Model = Annotated[str, typer.Argument(help="'tiny' (ships with sd_lens), a checkpoint folder, or a name on the Hugging Face hub.")]
Text = Annotated[list[str] | None, typer.Option("--text", help="A prompt; may be given several times.")]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts-file", help="A text file with one prompt per line, or a .json file with a list of strings."),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the machine-readable result here.")]
Out = Annotated[Path | None, typer.Option("--out", help="Write the picture here (HTML, self-contained).")]
MinRatio = Annotated[float, typer.Option(help="Least norm of a high-norm token, as a multiple of the other tokens' median.")]
BatchTokens = Annotated[int, typer.Option(help="Largest number of tokens run at once.")]
Top = Annotated[int, typer.Option(help="How many rows of each table are printed.", min=1)]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="What the weights are converted to: float32, bfloat16, float16 or float64.")]


class BadInput(ValueError):
    """Input that the user can mend."""


def boot(model: str, device: str, dtype: str) -> Any:
    """The model asked for."""
    import torch

    from sd_lens.models.loading import load

    require_dtype(dtype)
    require_device(device)
    go_offline_if_needed(model)
    from transformers.utils import logging

    logging.disable_progress_bar()
    return load(model, device=device, dtype=getattr(torch, dtype))


def require_dtype(dtype: str) -> None:
    """Raises `BadInput` unless weights can be converted to this."""
    allowed = ("float32", "bfloat16", "float16", "float64")
    if dtype not in allowed:
        raise BadInput(f"--dtype: got {dtype!r}; allowed: {', '.join(allowed)}")


def require_device(device: str) -> None:
    """Raises `BadInput` unless this machine has such a device."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise BadInput(f"--device: got {device!r}; allowed: a device that this machine has, such as cpu") from None


def go_offline_if_needed(model: str) -> None:
    """Where the hub's name does not resolve, a hub model is looked for in the local cache at once, not after minutes of retries."""
    if model == "tiny" or os.path.exists(os.path.expanduser(model)) or {"https", "all"} & getproxies().keys():
        return
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which nothing has done yet


def read_text(file: Path, option: str, *, allowed: str = "a text file") -> str:
    """What a file holds; `BadInput` where it cannot be read as text."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{option}: {file} cannot be read ({error.strerror}); allowed: {allowed}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{option}: {file} is not UTF-8 text; allowed: {allowed}") from None


def given_prompts(text: list[str] | None, file: Path | None) -> list[str] | None:
    """The prompts asked for; None for the built-in ones."""
    if text and file:
        raise BadInput("--text, --prompts-file: got both; allowed: one of them")
    if text:
        return text
    if file is None:
        return None
    content = read_text(file, "--prompts-file", allowed="a text or .json file")
    prompts = _json_prompts(file, content) if file.suffix == ".json" else [line for line in content.splitlines() if line.strip()]
    if not prompts:
        raise BadInput(f"--prompts-file: {file} holds no prompt; allowed: at least one line of text")
    return prompts


def _json_prompts(file: Path, content: str) -> list[str]:
    try:
        prompts = json.loads(content)
    except json.JSONDecodeError as error:
        raise BadInput(f"--prompts-file: {file} is not valid JSON ({error}); allowed: a list of strings") from None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise BadInput(f"--prompts-file: {file} holds something else than a list of strings; allowed: a list of strings")
    return prompts


def require_writable_files(out: Path | None, json_file: Path | None) -> None:
    """Raises unless the files asked for can be written, which is seen before any work."""
    from sd_lens.models.files import require_writable

    if out is not None and json_file is not None and out.resolve() == json_file.resolve():
        raise BadInput(f"--out, --json: got {out} for both; allowed: two files")
    for path, option in ((out, "--out"), (json_file, "--json")):
        if path is not None:
            require_writable(path, argument=option)
