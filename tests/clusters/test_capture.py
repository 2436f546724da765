"""Capture: what the hooks see, shards bounded by memory, resumption, cleaning up."""

import errno

import pytest
import torch

import sparse_runtime.atomic as atomic
from sparse_runtime.clusters.capture import capture_hidden_states
from sparse_runtime.errors import OutputFolderError


@pytest.fixture
def windows():
    return torch.randint(0, 250, (9, 16), generator=torch.Generator().manual_seed(0))


def expected_states(model, windows, layer):
    states = []
    handle = model.model.layers[layer].mlp.register_forward_pre_hook(
        lambda module, arguments: states.append(arguments[0].reshape(-1, 32))
    )
    with torch.inference_mode():
        for row in windows:
            model(row.unsqueeze(0))
    handle.remove()
    return torch.cat(states)


def test_captures_the_input_of_every_ffn(tiny_model, windows, tmp_path):
    states = capture_hidden_states(tiny_model, windows, tmp_path)
    assert (states.num_tokens, states.num_layers) == (9 * 16, 3)
    for layer in range(3):
        expected = expected_states(tiny_model, windows, layer)
        assert expected.abs().mean() > 0.1
        assert torch.equal(states.layer(layer), expected.bfloat16().float())


def test_memory_bound_makes_shards_and_they_resume(tiny_model, windows, tmp_path, monkeypatch):
    # Three layers of 16 tokens · 32 · 2 bytes per window; a bound of 0 MiB is one window a shard.
    written = []
    original = atomic.save_file

    def fail_at_fourth(tensors, file, metadata):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file)
        original(tensors, file, metadata)

    monkeypatch.setattr(atomic, "save_file", fail_at_fourth)
    with pytest.raises(OutputFolderError, match="disk is full"):
        capture_hidden_states(tiny_model, windows, tmp_path, memory_mib=0)
    assert len(list(tmp_path.glob("shard_*"))) == 3
    assert not list(tmp_path.glob(".*tmp"))
    assert not any(layer.mlp._forward_pre_hooks for layer in tiny_model.model.layers)

    monkeypatch.setattr(atomic, "save_file", original)
    calls = []
    handle = tiny_model.model.register_forward_pre_hook(lambda *unused: calls.append(1))
    states = capture_hidden_states(tiny_model, windows, tmp_path, memory_mib=0)
    handle.remove()
    assert len(calls) == 6
    assert len(list(tmp_path.glob("shard_*"))) == 9
    expected = expected_states(tiny_model, windows, 1)
    assert torch.equal(states.layer(1), expected.bfloat16().float())


def test_other_windows_discard_old_shards(tiny_model, windows, tmp_path):
    capture_hidden_states(tiny_model, windows, tmp_path, memory_mib=0)
    states = capture_hidden_states(tiny_model, windows[:2].flip(0), tmp_path, memory_mib=0)
    assert states.num_tokens == 32
    assert len(list(tmp_path.glob("shard_*"))) == 2
    expected = expected_states(tiny_model, windows[:2].flip(0), 2)
    assert torch.equal(states.layer(2), expected.bfloat16().float())
