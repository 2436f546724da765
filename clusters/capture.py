"""One pass over the calibration text that keeps, on disk, every FFN's input and the last states.

FFN inputs are stored in bfloat16 (10.4 GB for 300,000 tokens, 30 layers and hidden size 576),
whatever the model computes in: clusters and routers are trained on means over many tokens, and the
model they serve usually runs in bfloat16 itself.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparse_runtime.cost import element_size
from sparse_runtime.errors import ModelError, OutputFolderError
from sparse_runtime.files import write_json, write_tensors
from sparse_runtime.models.ffn_layers import decoder_of, find_ffn_layers
from sparse_runtime.models.fingerprint import model_fingerprint
from sparse_runtime.models.inline_calls import calling, ffn_module
from sparse_runtime.progress import ProgressReporter, SilentProgress

_INDEX_FILE = "index.json"
_DTYPE = torch.bfloat16
_FINAL = "final"


class HiddenStates:
    """FFN inputs of every layer, on disk in shards of whole windows.

    Attributes:
        num_tokens: tokens captured.
        num_layers: FFN layers.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / _INDEX_FILE).read_text(encoding="utf-8"))
        self._folder = folder
        self._shard_tokens: list[int] = index["shard_tokens"]
        self.num_layers: int = index["num_layers"]
        self.num_tokens = sum(self._shard_tokens)
        self.hidden_size: int = index["hidden_size"]

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
        for first, part in self._parts(str(position), rows):
            states[first : first + len(part)] = part
        return states

    def final(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The decoder's last hidden states, which the output head turns into logits [n, H].

        Of tokens ``start`` to ``stop``, in the dtype that the model computed in.
        """
        rows = range(self.num_tokens)[start:stop]
        return torch.cat([part for _, part in self._parts(_FINAL, rows)])

    def chunks(
        self, position: int, chunk_tokens: int, dtype: torch.dtype = torch.float32
    ) -> Iterator[Tensor]:
        """Hidden states of one layer in pieces [≤ chunk_tokens, H], in the windows' order."""
        for start in range(0, self.num_tokens, chunk_tokens):
            yield self.layer(position, start, start + chunk_tokens, dtype)

    def _parts(self, name: str, rows: range) -> Iterator[tuple[int, Tensor]]:
        """What each shard has of some tokens, and where it goes."""
        first = 0
        for number, tokens in enumerate(self._shard_tokens):
            low, high = max(rows.start, first), min(rows.stop, first + tokens)
            if low < high:
                with safe_open(_shard_file(self._folder, number), framework="pt") as shard:
                    yield low - rows.start, shard.get_slice(name)[low - first : high - first]
            first += tokens


def capture_hidden_states(
    model: Any,
    windows: Tensor,
    folder: Path,
    *,
    batch_windows: int = 1,
    memory_mib: int = 512,
    progress: ProgressReporter | None = None,
) -> HiddenStates:
    """Run a model over windows of text and keep the input of every FFN, and the last hidden states.

    A shard is written whenever its buffers would exceed ``memory_mib``. A second call with the same
    model and windows goes on after the last whole shard; any other shards are discarded.

    Args:
        model: a dense causal language model.
        windows: token ids [W, window] int64.
        folder: where the shards go.
        batch_windows: windows in one forward pass, more for a GPU.
        memory_mib: bound on the buffers, in MiB; at least one window is held whatever the bound.
        progress: reports one unit per window.

    Raises:
        ModelError: hidden states hold infinities or NaN.
        OutputFolderError: a shard could not be written, or the disk has no room for all of them.
        UnsupportedArchitectureError, NothingMatchedError: see ``find_ffn_layers``.
    """
    layers = find_ffn_layers(model)
    num_windows, window = windows.shape
    hidden_size = layers[0].hidden_size
    values_per_window = window * hidden_size
    bytes_per_window = values_per_window * (2 * len(layers) + element_size(model.dtype))
    # The hooks hold one shard, and writing it makes one more copy.
    shard_windows = max(1, memory_mib * 2**20 // (2 * bytes_per_window))
    folder.mkdir(parents=True, exist_ok=True)
    index = _load_index(folder, _key(model, windows))
    index |= {"num_layers": len(layers), "hidden_size": hidden_size}
    done = sum(index["shard_tokens"]) // window
    _check_space(folder, (num_windows - done) * bytes_per_window)
    captured: dict[str, list[Tensor]] = {str(position): [] for position in range(len(layers))}
    captured[_FINAL] = []

    def keep(position: int) -> Any:
        def hook(module: Any, arguments: tuple[Tensor, ...]) -> None:
            states = arguments[0].detach().reshape(-1, hidden_size)
            if not states.isfinite().all():
                raise not_finite(model, f"the input of {layers[position].name}")
            captured[str(position)].append(states.to("cpu", _DTYPE))

        return hook

    ffns = [ffn_module(layer) for layer in layers]
    handles = [ffn.register_forward_pre_hook(keep(position)) for position, ffn in enumerate(ffns)]
    # The base model leaves out the output head, a fifth of the work of a small model.
    decoder = decoder_of(model)
    try:
        with (
            calling(layers, ffns),
            (progress or SilentProgress()).task("capture", num_windows) as advance,
        ):
            advance(done)
            with torch.inference_mode():
                while done < num_windows:
                    shard = windows[done : done + shard_windows]
                    for batch in shard.split(batch_windows):
                        output = decoder(input_ids=batch.to(model.device), use_cache=False)
                        final = output.last_hidden_state.flatten(0, -2)
                        if not final.isfinite().all():
                            raise not_finite(model, "the decoder's last hidden state")
                        captured[_FINAL].append(final.cpu())
                        advance(len(batch))
                    _write_shard(folder, index, captured)
                    done += len(shard)
    finally:
        for handle in handles:
            handle.remove()
    return HiddenStates(folder)


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


def _key(model: Any, windows: Tensor) -> str:
    """Identify what is captured: the model's weights and the windows, with their shape."""
    digest = hashlib.sha256(json.dumps(model_fingerprint(model), sort_keys=True).encode())
    digest.update(f"{_FINAL} {model.dtype}".encode())  # what shards hold
    digest.update(repr(tuple(windows.shape)).encode())
    digest.update(windows.numpy().tobytes())
    return digest.hexdigest()


def _check_space(folder: Path, needed: int) -> None:
    """Fail before hours of work rather than after them."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputFolderError(
            f"{folder} has {free} bytes free, but the hidden states need {needed} more; free some "
            "space, choose another output folder or lower max_tokens"
        )


def _write_shard(folder: Path, index: dict[str, Any], captured: dict[str, list[Tensor]]) -> None:
    tensors = {name: torch.cat(parts) for name, parts in captured.items()}
    write_tensors(_shard_file(folder, len(index["shard_tokens"])), tensors, {})
    index["shard_tokens"].append(len(tensors[_FINAL]))
    write_json(folder / _INDEX_FILE, index)
    for parts in captured.values():
        parts.clear()


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:05d}.safetensors"


def _load_index(folder: Path, key: str) -> dict[str, Any]:
    file = folder / _INDEX_FILE
    if file.exists():
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if index["key"] == key:
            return index
    # The index goes first: it must never name shards that are gone.
    file.unlink(missing_ok=True)
    for old in folder.glob("shard_*.safetensors"):
        old.unlink()
    return {"key": key, "shard_tokens": []}
