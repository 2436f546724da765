"""Text sampled from the model itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_runtime.errors import ConfigError

_SEQUENCE = 256
# Bounds the memory of the keys and values: sequences that are sampled at a time.
_BATCH = 16
# Added to the seed of text that is to be held out.
_TEST_SEED = 0x7E57


def sampled_tokens(
    model: Any, tokenizer: Any, max_tokens: int | None, *, split: str, seed: int
) -> Tensor:
    """Sample at temperature 1, in sequences of 256 tokens at most, each from the beginning.

    Args:
        model: a causal language model.
        tokenizer: names the token that a text begins with.
        max_tokens: as many.
        split: ``test`` samples from another seed than ``train``.
        seed: of sampling; the global random state stays as it is.

    Returns:
        Token ids [max_tokens] int64.

    Raises:
        ConfigError: no model, or no ``max_tokens``.
    """
    if model is None:
        raise ConfigError("data source 'self' needs the model to sample from; pass model")
    if max_tokens is None:
        raise ConfigError("data source 'self' needs a number of tokens to sample; set max_tokens")
    # A tokenizer may name a token that the model lacks.
    rows = model.get_input_embeddings().weight.shape[0]
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    start = next((token for token in known if token is not None and token < rows), 0)
    length = min(_SEQUENCE, max_tokens)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None:
        length = max(1, min(length, longest - 1))
    sequences: list[Tensor] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed + (_TEST_SEED if split == "test" else 0))
        while sum(len(s) for s in sequences) < max_tokens:
            prompt = torch.full((_BATCH, 1), start, device=model.device)
            sampled = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=length,
                min_new_tokens=length,
                pad_token_id=start,
            )
            sequences += list(sampled[:, 1:].cpu())
    return torch.cat(sequences)[:max_tokens].clone()
