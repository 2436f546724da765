"""Capture: what the hooks see, shards bounded by memory, resumption, cleaning up."""

import errno
from collections import namedtuple

import pytest
import torch

import sparse_runtime.clusters.capture as capture
import sparse_runtime.files as atomic
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_what_logits_are_made_of(tiny_model, windows, tmp_path, dtype):
    model = tiny_model.to(dtype)
    # A window of 16 tokens a shard: the tokens asked for begin and end inside of one.
    states = capture_hidden_states(model, windows, tmp_path, memory_mib=0)
    part = states.final(20, 100)
    assert part.dtype == dtype
    with torch.inference_mode():
        expected = torch.cat([model(row.unsqueeze(0)).logits[0] for row in windows])
        assert torch.equal(model.lm_head(part), expected[20:100])


def ffn_calls(model):
    """Counts calls of each layer's FFN."""
    calls = [0] * len(model.model.layers)

    def count(number):
        def hook(*unused):
            calls[number] += 1

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(count(number))
    return calls


def test_goes_on_after_the_layers_that_were_noted(tiny_model, windows, tmp_path, monkeypatch):
    # A bound of 0 MiB is one window a shard: nine, and nine more with the note after each layer.
    monkeypatch.setattr(capture, "_NOTE_EVERY", -1.0)
    written = []
    original = atomic.save_file

    def fail_in_third_layer(tensors, file, metadata):
        if len(written) == 2 * 18 + 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file)
        original(tensors, file, metadata)

    monkeypatch.setattr(atomic, "save_file", fail_in_third_layer)
    with pytest.raises(OutputFolderError, match="disk is full"):
        capture_hidden_states(tiny_model, windows, tmp_path, memory_mib=0)
    assert not list(tmp_path.glob(".*tmp"))
    assert not (tmp_path / "sweep").exists()
    assert not any(layer.mlp._forward_pre_hooks for layer in tiny_model.model.layers)
    assert {file.name[:9] for file in tmp_path.glob("between*")} == {"between_2"}

    monkeypatch.setattr(atomic, "save_file", original)
    calls = ffn_calls(tiny_model)
    states = capture_hidden_states(tiny_model, windows, tmp_path, memory_mib=0)
    assert calls == [0, 0, 9]
    assert not list(tmp_path.glob("between*"))
    for layer in range(3):
        expected = expected_states(tiny_model, windows, layer)
        assert torch.equal(states.layer(layer), expected.bfloat16().float())
    before = list(calls)
    assert capture_hidden_states(tiny_model, windows, tmp_path).num_tokens == 144
    assert calls == before


def test_other_windows_discard_old_shards(tiny_model, windows, tmp_path):
    capture_hidden_states(tiny_model, windows, tmp_path, memory_mib=0)
    states = capture_hidden_states(tiny_model, windows[:2].flip(0), tmp_path, memory_mib=0)
    assert states.num_tokens == 32
    assert len(list(tmp_path.glob("ffn_2_*"))) == 2
    expected = expected_states(tiny_model, windows[:2].flip(0), 2)
    assert torch.equal(states.layer(2), expected.bfloat16().float())


def test_another_model_discards_old_shards(tiny_model, windows, tmp_path):
    capture_hidden_states(tiny_model, windows, tmp_path)
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.mul_(1.5)
    states = capture_hidden_states(tiny_model, windows, tmp_path)
    expected = expected_states(tiny_model, windows, 2)
    assert torch.equal(states.layer(2), expected.bfloat16().float())


def test_windows_of_another_length_discard_old_shards(tiny_model, windows, tmp_path):
    capture_hidden_states(tiny_model, windows, tmp_path)
    halves = windows.reshape(18, 8)
    states = capture_hidden_states(tiny_model, halves, tmp_path)
    expected = expected_states(tiny_model, halves, 2)
    assert torch.equal(states.layer(2), expected.bfloat16().float())


def test_interruption_while_discarding(tiny_model, windows, tmp_path, monkeypatch):
    capture_hidden_states(tiny_model, windows, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(capture, "write_tensors", lambda *unused: (_ for _ in ()).throw(OSError()))
        with pytest.raises(OSError):  # noqa: PT011
            capture_hidden_states(tiny_model, windows.flip(0), tmp_path)
    states = capture_hidden_states(tiny_model, windows, tmp_path)
    expected = expected_states(tiny_model, windows, 0)
    assert torch.equal(states.layer(0), expected.bfloat16().float())


def test_parts_of_a_layer_across_shards(tiny_model, windows, tmp_path):
    states = capture_hidden_states(tiny_model, windows, tmp_path, memory_mib=0)
    whole = states.layer(1)
    assert torch.equal(whole, expected_states(tiny_model, windows, 1).bfloat16().float())
    assert torch.equal(states.layer(1, 10, 53), whole[10:53])
    assert torch.equal(states.layer(1, 140), whole[140:])
    assert states.layer(1, 7, 7).shape == (0, 32)
    assert states.layer(1, 3, 5, torch.bfloat16).dtype == torch.bfloat16
    chunks = list(states.chunks(1, 50))
    assert [len(chunk) for chunk in chunks] == [50, 50, 44]
    assert torch.equal(torch.cat(chunks), whole.bfloat16())


def test_too_small_a_disk_fails_at_once(tiny_model, windows, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda folder: usage)
    # Three inputs in bfloat16; in float32 the last states, and what is noted between two layers.
    needed = 9 * 16 * 32 * (3 * 2 + 3 * 4)
    with pytest.raises(OutputFolderError, match=f"1000 bytes free.*need {needed} more"):
        capture_hidden_states(tiny_model, windows, tmp_path)
    assert not any(tmp_path.iterdir())
