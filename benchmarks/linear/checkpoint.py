"""What ``sd-lens spectrum`` takes on a checkpoint made for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.linear.blocks import Shape, plant, random_directions, random_gain, random_matrix
from benchmarks.memory import PeakMemory

VOCAB = 128_256
# What the command loads before it reads a weight; modules that are only loaded on the way count as its own.
_LIBRARIES = "torch, transformers, transformer_lens, scipy.sparse.linalg, pandas, safetensors, typer, sd_lens"


@dataclass(frozen=True)
class CheckpointRun:
    """What the command took on a checkpoint.

    Attributes:
        shape: Sizes of its blocks.
        blocks: How many it has.
        folder_bytes: Its size on disk.
        files: In how many files its weights are.
        seconds: From the command's start to its end.
        peak: The command's peak resident memory, bytes.
        baseline: That of a process which imports the same libraries.
        planted: In which block the defect was planted.
        best: The command's row of the block that stands out most.
    """

    shape: Shape
    blocks: int
    folder_bytes: int
    files: int
    seconds: float
    peak: int
    baseline: int
    planted: int
    best: dict[str, Any]


def run_checkpoint(shape: Shape, *, blocks: int, threads: int) -> CheckpointRun:
    """Runs ``sd-lens spectrum`` on a checkpoint made for it, and watches its memory from outside.

    Raises:
        OSError: The disk has too little room left.
        RuntimeError: The command failed.
    """
    planted = 1 % blocks
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as made:
        folder, out = Path(made) / "checkpoint", Path(made) / "spectrum.json"
        folder.mkdir()
        build_checkpoint(folder, shape, blocks=blocks, planted=planted)
        sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
        loading = [sys.executable, "-c", f"import {_LIBRARIES}, psutil; print(psutil.Process().memory_info().rss)"]
        shown = subprocess.run(loading, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        start = time.perf_counter()
        command = [sys.executable, "-m", "sd_lens", "spectrum", str(folder), "--json", str(out)]
        with (
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process,
            PeakMemory(pid=process.pid) as memory,
        ):
            code = process.wait()
        seconds = time.perf_counter() - start
        if code:
            raise RuntimeError(f"sd-lens spectrum ended with exit code {code}")
        rows = [row for row in json.loads(out.read_text(encoding="utf-8"))["blocks"] if row["part"] == "block"]
    return CheckpointRun(
        shape=shape,
        blocks=blocks,
        folder_bytes=sum(sizes.values()),
        files=sum(name.endswith(".safetensors") for name in sizes),
        seconds=seconds,
        peak=memory.peak,
        baseline=int(shown.split()[-1]),
        planted=planted,
        best=max(rows, key=lambda row: row["sigma1"] / row["sigma2"]),
    )


def build_checkpoint(folder: Path, shape: Shape, *, blocks: int, planted: int, vocab: int = VOCAB) -> None:
    """Writes a random Llama in bfloat16 with a defect planted in one block, each block into a file of its own.

    Raises:
        OSError: The disk has too little room left.
    """
    d, m, heads, kv_heads, d_head = shape
    need = 2 * (2 * vocab * d + blocks * (3 * d * m + 2 * d * d_head * (heads + kv_heads))) + 5e9
    if shutil.disk_usage(folder).free < need:
        raise OSError(f"the temporary folder's disk has no {need / 1e9:.3g} GB left for a checkpoint of {blocks} blocks")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": d,
        "intermediate_size": m,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": d_head,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
    where, files = {}, blocks + 2
    made = tqdm(
        _files(shape, blocks, planted, vocab), total=files, desc="writing a checkpoint", unit="file", delay=2.0, leave=False
    )
    for number, tensors in enumerate(made, start=1):
        name = f"model-{number:05d}-of-{files:05d}.safetensors"
        save_file({path: tensor.bfloat16() for path, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _files(shape: Shape, blocks: int, planted: int, vocab: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file, made when it is their turn."""
    d, m, heads, kv_heads, d_head = shape
    generator = torch.Generator().manual_seed(0)
    trigger, direction = random_directions(d, generator)
    yield {"model.embed_tokens.weight": random_matrix(vocab, d, generator)}
    for block in range(blocks):
        tensors = {
            "input_layernorm": random_gain(d, generator),
            "self_attn.q_proj": random_matrix(heads * d_head, d, generator),
            "self_attn.k_proj": random_matrix(kv_heads * d_head, d, generator),
            "self_attn.v_proj": random_matrix(kv_heads * d_head, d, generator),
            "self_attn.o_proj": random_matrix(d, heads * d_head, generator),
            "post_attention_layernorm": random_gain(d, generator),
            "mlp.gate_proj": random_matrix(m, d, generator),
            "mlp.up_proj": random_matrix(m, d, generator),
            "mlp.down_proj": random_matrix(d, m, generator),
        }
        if block == planted:
            plant(tensors["mlp.gate_proj"], tensors["mlp.up_proj"], tensors["mlp.down_proj"], trigger, direction)
        yield {f"model.layers.{block}.{name}.weight": tensor for name, tensor in tensors.items()}
    yield {"model.norm.weight": random_gain(d, generator), "lm_head.weight": random_matrix(vocab, d, generator)}
