"""A model folder of a known shape with random weights, written without ever holding the model.

python -m sparse_runtime.eval.latency.shape_folder mistral-7b FOLDER [LAYERS]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparse_runtime.eval.latency.shapes import empty_model, random_values
from sparse_runtime.files import atomic_folder, check_new_folder, write_json


def write_shape_folder(
    shape: str, folder: Path, *, layers: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write config, a tokenizer of bytes, and one shard of weights for each decoder layer.

    Args:
        shape: of ``SHAPES``.
        folder: new.
        layers: as many of its decoder layers; all if None.
        dtype: of the weights.

    Raises:
        ConfigError: the shape is not known, or ``layers`` is out of range.
        OutputFolderError: there is something at ``folder``.
    """
    check_new_folder(folder)
    model: Any = empty_model(shape, layers=layers, dtype=dtype)
    shards: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        number = next((part for part in parts if part.isdecimal()), "rest")
        shards.setdefault(number, {})[name] = tensor
    if model.config.tie_word_embeddings:
        shards["rest"].pop("lm_head.weight", None)
    values = random_values(dtype)
    places: dict[str, str] = {}
    total = 0
    with atomic_folder(folder) as temporary:
        model.config.dtype = dtype
        model.config.save_pretrained(temporary)
        _byte_tokenizer().save_pretrained(temporary)
        for number, tensors in enumerate(shards.values(), start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            filled = {name: values(name, tensor.shape) for name, tensor in tensors.items()}
            total += sum(tensor.nbytes for tensor in filled.values())
            save_file(filled, temporary / file, metadata={"format": "pt"})
            places |= dict.fromkeys(filled, file)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(temporary / "model.safetensors.index.json", index)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


if __name__ == "__main__":
    count = int(sys.argv[3]) if len(sys.argv) > 3 else None
    write_shape_folder(sys.argv[1], Path(sys.argv[2]), layers=count)
