"""The matrix of importance, in memory or in a file."""

import errno
import os
from pathlib import Path

import pytest
import torch

from sparse_runtime.clusters import BuildConfig, build_clusters
from sparse_runtime.clusters.buffers import Buffer
from sparse_runtime.errors import OutputFolderError


@pytest.mark.parametrize("by_system", [True, False])
def test_space_is_reserved_before_it_is_used(tmp_path, monkeypatch, by_system):
    if not by_system:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    elif not hasattr(os, "posix_fallocate"):
        pytest.skip("this system cannot reserve space")
    file = tmp_path / "importance.bin"
    matrix = Buffer((600, 1000), torch.bfloat16, memory_mib=1, spill_file=file)
    assert file.stat().st_size == 1_200_000
    if by_system:
        assert file.stat().st_blocks * 512 >= 1_200_000
    matrix.values.copy_(torch.arange(1000).expand(600, -1))
    assert matrix.values[599, 7] == 7
    matrix.close()
    assert not file.exists()


def full_disk(*unused):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no such call here")
def test_a_full_disk_is_told_before_anything_is_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    file = tmp_path / "importance.bin"
    with pytest.raises(OutputFolderError, match=r"importance\.bin.*1200000 bytes.*No space left"):
        Buffer((600, 1000), torch.bfloat16, memory_mib=1, spill_file=file)
    assert not file.exists()


def test_a_disk_with_too_little_room_where_space_cannot_be_reserved(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(
        "sparse_runtime.clusters.buffers.shutil.disk_usage",
        lambda path: type("Usage", (), {"free": 100})(),
    )
    with pytest.raises(OutputFolderError, match="1200000 bytes, and 100 are free"):
        Buffer((600, 1000), torch.bfloat16, memory_mib=1, spill_file=tmp_path / "importance.bin")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no such call here")
def test_a_build_goes_on_once_there_is_room(
    tiny_model, tiny_tokenizer, text, tmp_path, monkeypatch
):
    # One MiB holds 11,900 tokens of 44 neurons.
    long = tmp_path / "long.txt"
    long.write_text(Path(text).read_text() * 5)
    config = BuildConfig(
        num_clusters=6,
        budget=0.7,
        router="2",
        window=50,
        max_tokens=14_000,
        distill=0,
        memory_mib=1,
    )
    run = lambda: build_clusters(  # noqa: E731
        tiny_model, tiny_tokenizer, [str(long)], config, output=tmp_path / "clusters"
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full_disk)
        with pytest.raises(OutputFolderError, match=r"needs 1792000 bytes"):
            run()
    assert len(run().layers) == 3
    assert not (tmp_path / "clusters" / ".build").exists()
