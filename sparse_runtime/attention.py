"""Attention of single tokens on a CPU; registered with transformers when imported.

torch's ``scaled_dot_product_attention`` is slow there for one token: 646 µs a layer of Mistral's shape
at 160 cached tokens and 4,248 at 1,024, where two matrix products per key-value head take 77 and 338
(docs/LOG.md, 2026-11-26).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ModelT = TypeVar("ModelT", bound=nn.Module)

#: For ``model.set_attn_implementation``.
NAME = "sparse_runtime_decode"


def fast_attention(model: ModelT) -> ModelT:
    """Compute the attention of single tokens by matrix products where that is faster; in place.

    Nothing changes for prompts, on other devices, and on models whose attention is not
    ``scaled_dot_product_attention``. Outputs differ by rounding only. Undo it with
    :func:`slow_attention`.

    Args:
        model: of transformers, sparse or not.

    Returns:
        The same model.
    """
    _change(model, "sdpa", NAME)
    return model


def slow_attention(model: ModelT) -> ModelT:
    """Undo :func:`fast_attention`, in place; nothing happens to a model without it."""
    _change(model, NAME, "sdpa")
    return model


def _change(model: Any, old: str, new: str) -> None:
    if model.device.type == "cpu" and model.config._attn_implementation == old:
        model.set_attn_implementation(new)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of ``query`` [B, heads, n, D] as transformers calls it: [B, n, heads, D]."""
    plain = attention_mask is None or attention_mask.dtype == torch.bool
    plain = plain and kwargs.get("position_bias") is None
    if query.shape[2] != 1 or query.device.type != "cpu" or dropout or not plain:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    batch, heads, _, size = query.shape
    keys, length = key.shape[1:3]
    grouped = query.reshape(batch * keys, heads // keys, size).float()
    scores = torch.bmm(grouped, key.flatten(0, 1).transpose(1, 2).float())
    scores = scores.view(batch, heads, 1, length) * (scaling or size**-0.5)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    shares = torch.softmax(scores, dim=-1).to(value.dtype).view(batch * keys, heads // keys, length)
    return torch.bmm(shares, value.flatten(0, 1)).view(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
