"""The checkpoint is one that sd_lens reads, with the defect where it was put."""

import pytest

from benchmarks.linear import checkpoint
from benchmarks.linear.blocks import SHAPES
from benchmarks.linear.checkpoint import build_checkpoint
from sd_lens.spectrum import block_directions

TINY = SHAPES["tiny"]


def test_a_checkpoint_is_sharded_and_has_its_defect_where_it_was_put(tmp_path):
    build_checkpoint(tmp_path, TINY, blocks=3, planted=1, vocab=100)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{number}-of-00005.safetensors" for number in range(1, 6)]
    table = block_directions(tmp_path, progress=False)
    assert table.reference_source == "block 1"
    assert table.row(1).gap > 5 * table.row(0).gap


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    with pytest.raises(OSError, match="has no 5 GB left for a checkpoint of 2 blocks"):
        build_checkpoint(tmp_path, TINY, blocks=2, planted=1, vocab=100)
    assert not list(tmp_path.iterdir())
