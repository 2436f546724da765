"""One pass over the calibration text that keeps every FFN's input, on disk.

Hidden states are stored in bfloat16 (10.4 GB for 300,000 tokens, 30 layers and hidden size 576),
whatever the model computes in: clusters and routers are trained on means over many tokens, and the
model they serve usually runs in bfloat16 itself.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparse_runtime.architectures import find_ffn_layers
from sparse_runtime.atomic import write_json, write_tensors
from sparse_runtime.progress import ProgressReporter, SilentProgress

_INDEX_FILE = "index.json"
_DTYPE = torch.bfloat16


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

    def layer(self, position: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Hidden states of one layer [N, H], tokens in the order of the windows.

        Only this layer's bytes are read.
        """
        states = torch.empty(self.num_tokens, self.hidden_size, dtype=dtype)
        start = 0
        for number, tokens in enumerate(self._shard_tokens):
            with safe_open(_shard_file(self._folder, number), framework="pt") as shard:
                states[start : start + tokens] = shard.get_tensor(str(position))
            start += tokens
        return states


def capture_hidden_states(
    model: Any,
    windows: Tensor,
    folder: Path,
    *,
    memory_mib: int = 512,
    progress: ProgressReporter | None = None,
) -> HiddenStates:
    """Run a model over windows of text and keep the input of every FFN.

    A shard is written whenever its buffers would exceed ``memory_mib``. A second call with the same
    windows goes on after the last whole shard; shards of other windows are discarded.

    Args:
        model: a dense causal language model.
        windows: token ids [W, window] int64.
        folder: where the shards go.
        memory_mib: bound on the buffers, in MiB; at least one window is held whatever the bound.
        progress: reports one unit per window.

    Raises:
        OutputFolderError: a shard could not be written.
        UnsupportedArchitectureError, NothingMatchedError: see ``find_ffn_layers``.
    """
    layers = find_ffn_layers(model)
    num_windows, window = windows.shape
    hidden_size = layers[0].hidden_size
    bytes_per_window = len(layers) * window * hidden_size * 2
    # The hooks hold one shard, and writing it makes one more copy.
    shard_windows = max(1, memory_mib * 2**20 // (2 * bytes_per_window))
    key = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    index = _load_index(folder, key)
    index |= {"num_layers": len(layers), "hidden_size": hidden_size}
    done = sum(index["shard_tokens"]) // window
    captured: list[list[Tensor]] = [[] for _ in layers]

    def keep(position: int) -> Any:
        def hook(module: Any, arguments: tuple[Tensor, ...]) -> None:
            states = arguments[0].detach().reshape(-1, hidden_size)
            captured[position].append(states.to("cpu", _DTYPE))

        return hook

    handles = [
        layer.mlp.register_forward_pre_hook(keep(position)) for position, layer in enumerate(layers)
    ]
    # The base model leaves out the output head, a fifth of the work of a small model.
    decoder = model.get_decoder()
    try:
        with (progress or SilentProgress()).task("capture", num_windows) as advance:
            advance(done)
            with torch.inference_mode():
                while done < num_windows:
                    shard = windows[done : done + shard_windows]
                    for row in shard.split(1):
                        decoder(input_ids=row.to(model.device), use_cache=False)
                        advance(1)
                    _write_shard(folder, index, captured)
                    done += len(shard)
    finally:
        for handle in handles:
            handle.remove()
    return HiddenStates(folder)


def _write_shard(folder: Path, index: dict[str, Any], captured: list[list[Tensor]]) -> None:
    tensors = {str(position): torch.cat(parts) for position, parts in enumerate(captured)}
    write_tensors(_shard_file(folder, len(index["shard_tokens"])), tensors, {})
    index["shard_tokens"].append(len(tensors["0"]))
    write_json(folder / _INDEX_FILE, index)
    for parts in captured:
        parts.clear()


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:05d}.safetensors"


def _load_index(folder: Path, key: str) -> dict[str, Any]:
    file = folder / _INDEX_FILE
    if file.exists():
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if index["key"] == key:
            return index
    for old in folder.glob("shard_*.safetensors"):
        old.unlink()
    return {"key": key, "shard_tokens": []}
