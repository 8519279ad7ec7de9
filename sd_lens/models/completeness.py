"""Does a checkpoint folder hold every weight of its model?

Loading fills a weight that the files lack with random numbers and goes on, so a damaged copy would be analysed as if it had been
trained like that.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sd_lens.models.shards import find_shards


def missing_tensors(folder: Path) -> list[str]:
    """Names of the weights that a model of this configuration has and its safetensors files do not.

    Compared by the ends of the names, as checkpoints may leave out the first part of them. Mixtures of experts are not compared, since
    files and models pack and name their parts differently, nor is the output head, which may share the embedding's weight.

    Args:
        folder: A checkpoint folder with a config.json.

    Returns:
        The names; none where there is nothing to compare (no safetensors file, or a model that needs code from its folder).

    Raises:
        ValueError: A file cannot be read, or one that the index names is absent.
    """
    shards = find_shards(folder)
    if shards is None:
        return []
    ends = {end for name in shards.tensors for end in _ends(name)}
    return [name for name in _expected_names(folder) if not ends & _ends(name)]


def _ends(name: str) -> set[str]:
    """A dotted name, and what is left of it without its first part and without its first two."""
    parts = name.split(".")
    return {".".join(parts[skip:]) for skip in range(3) if len(parts) - skip >= 2}


def _expected_names(folder: Path) -> list[str]:
    """Parameters to look for, of a model built without memory for them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # what is wrong with such a folder, loading it will say
        return []
    names = [name for name, _ in model.named_parameters() if not name.startswith("lm_head.")]
    return [] if any("expert" in name for name in names) else names
