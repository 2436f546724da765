"""One pass over the calibration text that keeps, on disk, every FFN's input and the last states.

FFN inputs are stored in bfloat16 (10.4 GB for 300,000 tokens, 30 layers and hidden size 576),
whatever the model computes in: clusters and routers are trained on means over many tokens, and the
model they serve usually runs in bfloat16 itself.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sparse_runtime.clusters.buffers import Buffers
from sparse_runtime.clusters.ranks import Ranks
from sparse_runtime.clusters.sweep import Sweep
from sparse_runtime.cost import element_size
from sparse_runtime.errors import ModelError, OutputFolderError
from sparse_runtime.files import free_space, write_json, write_tensors
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.fingerprint import model_fingerprint
from sparse_runtime.models.inline_calls import calling, ffn_module
from sparse_runtime.progress import ProgressReporter, SilentProgress

_INDEX_FILE = "index.json"
_DTYPE = torch.bfloat16
_FINAL, _BETWEEN, _STATES = "final", "between", "states"
# Seconds after which it is noted how far a capture is.
_NOTE_EVERY = 60.0


class HiddenStates:
    """FFN inputs of every layer, on disk in shards of whole windows.

    Attributes:
        num_tokens: tokens captured.
        num_layers: FFN layers.
    """

    def __init__(self, *folders: Path) -> None:
        indices = [
            json.loads((folder / _INDEX_FILE).read_text(encoding="utf-8")) for folder in folders
        ]
        # Folder, its first token, its tokens and those of each of its shards.
        self._folders: list[tuple[Path, int, int, int]] = []
        self.num_tokens = 0
        for folder, index in zip(folders, indices, strict=True):
            tokens = index["num_tokens"]
            self._folders.append((folder, self.num_tokens, tokens, index["shard_tokens"]))
            self.num_tokens += tokens
        self.num_layers: int = indices[0]["num_layers"]
        self.hidden_size: int = indices[0]["hidden_size"]

    def layer(
        self,
        position: int,
        start: int = 0,
        stop: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Hidden states of tokens ``start`` to ``stop`` of one layer [n, H], in the windows' order.

        Only these bytes are read.
        """
        rows = range(self.num_tokens)[start:stop]
        states = torch.empty(len(rows), self.hidden_size, dtype=dtype)
        for first, part in self._parts(_ffn(position), rows):
            states[first : first + len(part)] = part
        return states

    def final(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The decoder's last hidden states, which the output head turns into logits [n, H].

        Of tokens ``start`` to ``stop``, in the dtype that the model computed in.
        """
        rows = range(self.num_tokens)[start:stop]
        return torch.cat([part for _, part in self._parts(_FINAL, rows)])

    def chunks(self, position: int, chunk_tokens: int) -> Iterator[Tensor]:
        """Hidden states of one layer in pieces [≤ chunk_tokens, H] bfloat16, in the windows' order."""
        for start in range(0, self.num_tokens, chunk_tokens):
            yield self.layer(position, start, start + chunk_tokens, _DTYPE)

    def _parts(self, name: str, rows: range) -> Iterator[tuple[int, Tensor]]:
        """What each shard has of some tokens, and where it goes."""
        for folder, start, tokens, size in self._folders:
            begin, end = max(rows.start, start) - start, min(rows.stop, start + tokens) - start
            if begin > end:
                continue
            for number in range(begin // size, -(-end // size)):
                first = number * size
                low, high = max(begin, first), min(end, first + size)
                with safe_open(_shard_file(folder, name, number), framework="pt") as shard:
                    part = shard.get_slice(_STATES)[low - first : high - first]
                yield start + low - rows.start, part


def capture_hidden_states(
    model: Any,
    windows: Tensor,
    folder: Path,
    *,
    fingerprint: dict[str, Any] | None = None,
    memory_mib: int = 512,
    ranks: Ranks | None = None,
    progress: ProgressReporter | None = None,
) -> HiddenStates:
    """Run a model over windows of text and keep the input of every FFN, and the last hidden states.

    One decoder layer at a time (:class:`Sweep`), whose weights alone must be in memory. A second call
    with the same model and windows goes on after the last layer that was noted: about every minute;
    any other shards are discarded.

    Args:
        model: a dense causal language model.
        windows: token ids [W, window] int64.
        folder: where the shards go.
        fingerprint: the model's, if it is known.
        memory_mib: bound, each, on the buffers of shards and on hidden states between layers, in MiB;
            at least one window is held whatever the bound.
        ranks: processes that each take a part of the windows, one or more.
        progress: reports one unit per window and decoder layer.

    Raises:
        ModelError: hidden states hold infinities or NaN.
        OutputFolderError: a shard could not be written, or the disk has no room for all of them.
        UnsupportedArchitectureError, NothingMatchedError: see ``find_ffn_layers``.
    """
    ranks = ranks or Ranks()
    reporter = progress or SilentProgress()
    key = _key(model, windows, fingerprint or model_fingerprint(model))
    if ranks.count == 1:
        _capture(model, windows, folder, key, memory_mib, reporter)
        return HiddenStates(folder)
    folders = [folder / f"{rank}_of_{ranks.count}" for rank in range(ranks.count)]
    mine = windows[ranks.rows(len(windows))]
    ranks.together(lambda: _capture(model, mine, folders[ranks.rank], key, memory_mib, reporter))
    return HiddenStates(*folders)


def _capture(
    model: Any,
    windows: Tensor,
    folder: Path,
    key: str,
    memory_mib: int,
    reporter: ProgressReporter,
) -> None:
    """Capture into a folder of its own."""
    layers = find_ffn_layers(model)
    folder.mkdir(parents=True, exist_ok=True)
    with Buffers(memory_mib, folder / "sweep") as buffers:
        sweep = Sweep(model, windows, buffers)
        capture = _Capture(model, layers, sweep, windows, folder, key, memory_mib)
        with reporter.task("capture", sweep.steps) as advance, torch.inference_mode():
            advance(capture.first * len(windows))
            if not capture.finished:
                sweep.forward(capture.around, first=capture.first, ran=capture.ran, advance=advance)
                capture.finish()


class _Capture:
    """Writes what a sweep's FFNs get, and where it stands.

    Attributes:
        first: part of the sweep to go on with.
        finished: whether nothing is left to do.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[FFNLayer],
        sweep: Sweep,
        windows: Tensor,
        folder: Path,
        key: str,
        memory_mib: int,
    ) -> None:
        self._model, self._layers, self._sweep, self._folder = model, layers, sweep, folder
        self._ffns = [ffn_module(layer) for layer in layers]
        self._owned = sweep.owners(layers)
        num_windows, window = windows.shape
        width = layers[0].hidden_size
        self._windows = num_windows
        # What one window adds to the buffers; writing a shard makes one more copy.
        bytes_held = 2 * window * width * max(2 * max(map(len, self._owned)), 4)
        self._shard_windows = max(1, memory_mib * 2**20 // (2 * bytes_held))
        self._index = _load_index(folder, key)
        self._index |= {
            "num_layers": len(layers),
            "hidden_size": width,
            "num_tokens": windows.numel(),
        }
        self._shard_windows = self._index.setdefault("shard_windows", self._shard_windows)
        self._index["shard_tokens"] = self._shard_windows * window
        self.first: int = self._index.setdefault("parts", 0)
        self.finished = bool(self._index.get("finished"))
        self._captured: dict[str, list[Tensor]] = {}
        self._noted = time.monotonic()
        if self.finished:
            self.first = len(sweep.parts)
            return
        left = sum(len(owned) for owned in self._owned[self.first :])
        # What goes between layers is noted anew before the note before is dropped.
        kept = 2 * left + 3 * element_size(model.dtype)
        _check_space(folder, windows.numel() * width * kept)
        if self.first:
            self._restore()

    @contextmanager
    def around(self, number: int) -> Iterator[None]:
        """Watch the FFNs of a part of the sweep; what it is done with is on the disk."""
        own = self._owned[number]
        ffns = [self._ffns[position] for position in own]
        handles = [
            ffn.register_forward_pre_hook(self._keep(position))
            for position, ffn in zip(own, ffns, strict=True)
        ]
        try:
            with calling([self._layers[position] for position in own], ffns):
                yield
        finally:
            for handle in handles:
                handle.remove()
        if time.monotonic() - self._noted > _NOTE_EVERY:
            self._note(number + 1)

    def ran(self, number: int, window: int) -> None:
        """Write a shard when it is full."""
        if (window + 1) % self._shard_windows == 0 or window + 1 == self._windows:
            self._write(window // self._shard_windows)

    def finish(self) -> None:
        """Write the last hidden states, and that everything is there."""
        for window in range(self._windows):
            final = self._sweep.final(window)
            if not final.isfinite().all():
                raise not_finite(self._model, "the decoder's last hidden state")
            self._captured.setdefault(_FINAL, []).append(final.cpu())
            self.ran(len(self._owned), window)
        self._index["finished"] = True
        write_json(self._folder / _INDEX_FILE, self._index)
        self._drop_notes()

    def _keep(self, position: int) -> Any:
        def hook(module: Any, arguments: tuple[Tensor, ...]) -> None:
            states = arguments[0].detach()
            if not states.isfinite().all():
                raise not_finite(self._model, f"the input of {self._layers[position].name}")
            states = states.reshape(-1, states.shape[-1]).to("cpu", _DTYPE)
            self._captured.setdefault(_ffn(position), []).append(states)

        return hook

    def _write(self, shard: int) -> None:
        for name, parts in self._captured.items():
            write_tensors(_shard_file(self._folder, name, shard), {_STATES: torch.cat(parts)}, {})
        self._captured = {}

    def _note(self, parts: int) -> None:
        """Note that so many parts are done, with the hidden states that the next one gets."""
        name = f"{_BETWEEN}_{parts}"
        for shard, states in enumerate(self._sweep.states.split(self._shard_windows)):
            write_tensors(
                _shard_file(self._folder, name, shard), {_STATES: states.contiguous()}, {}
            )
        self._index["parts"] = parts
        write_json(self._folder / _INDEX_FILE, self._index)
        self._drop_notes(but=name)
        self._noted = time.monotonic()

    def _restore(self) -> None:
        states, size = self._sweep.states, self._shard_windows
        for shard, own in enumerate(states.split(size)):
            file = _shard_file(self._folder, f"{_BETWEEN}_{self.first}", shard)
            own.copy_(load_file(file)[_STATES])

    def _drop_notes(self, but: str = "") -> None:
        for file in self._folder.glob(f"{_BETWEEN}_*"):
            if not but or not file.name.startswith(f"{but}_"):
                file.unlink()


def not_finite(model: Any, where: str) -> ModelError:
    """The error about values that are not finite; tells wrong weights from a dtype too narrow."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not parameter.isfinite().all():
            return ModelError(
                f"{where} holds infinities or NaN, as the weights {name} do ({parameter.dtype}); "
                "load the checkpoint in the dtype it was saved in, or fetch it again"
            )
    return ModelError(
        f"{where} holds infinities or NaN, computed in {model.dtype} from finite weights; build in "
        "bfloat16 or float32 (--dtype)"
    )


def _key(model: Any, windows: Tensor, fingerprint: dict[str, Any]) -> str:
    """Identify what is captured: the model's weights and the windows, with their shape."""
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode())
    digest.update(f"one layer at a time {model.dtype}".encode())  # what shards hold
    digest.update(repr(tuple(windows.shape)).encode())
    digest.update(windows.numpy().tobytes())
    return digest.hexdigest()


def _check_space(folder: Path, needed: int) -> None:
    """Fail before hours of work rather than after them."""
    free = free_space(folder)
    if needed > free:
        raise OutputFolderError(
            f"{folder} has {free} bytes free, but the hidden states need {needed} more; free some "
            "space, choose another output folder or lower max_tokens"
        )


def _ffn(position: int) -> str:
    return f"ffn_{position}"


def _shard_file(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}_{number:05d}.safetensors"


def _load_index(folder: Path, key: str) -> dict[str, Any]:
    file = folder / _INDEX_FILE
    if file.exists():
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if index["key"] == key:
            return index
    # The index goes first: it must never name shards that are gone.
    file.unlink(missing_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    return {"key": key}
