"""Attention of single tokens by matrix products."""

import pytest
import torch
from helpers import IDS

from sparse_runtime import fast_attention, slow_attention
from sparse_runtime.attention import NAME, _attention


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_is_that_of_torch(tiny_model, padded):
    """Prompts and single tokens of a batch, heads in groups."""
    ids = torch.cat([IDS, IDS.flip(1)])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0 if padded else 1
    found = []
    for change in (slow_attention, fast_attention):
        assert change(tiny_model) is tiny_model
        with torch.inference_mode():
            prompt = tiny_model(ids, attention_mask=mask, use_cache=True)
            step = tiny_model(
                ids[:, :1],
                attention_mask=torch.cat([mask, mask[:, -1:]], 1),
                past_key_values=prompt.past_key_values,
            )
        found.append((prompt.logits, step.logits))
    expected, ours = found
    torch.testing.assert_close(ours[0][0], expected[0][0])
    torch.testing.assert_close(ours[0][1, 2:], expected[0][1, 2:])
    torch.testing.assert_close(ours[1], expected[1])


def test_changes_only_torchs_own_attention(tiny_model):
    tiny_model.set_attn_implementation("eager")
    assert fast_attention(tiny_model).config._attn_implementation == "eager"
    assert slow_attention(tiny_model).config._attn_implementation == "eager"
    tiny_model.set_attn_implementation("sdpa")
    assert fast_attention(tiny_model).config._attn_implementation == NAME
    assert slow_attention(tiny_model).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["heads", "values", "bias"])
def test_odd_shapes(kind):
    """One key-value head for all, values of another size, and a mask that is added."""
    generator = torch.Generator().manual_seed(0)
    keys, size = (1, 8) if kind == "heads" else (2, 5 if kind == "values" else 8)
    query = torch.randn(2, 3, 4, 8, generator=generator).transpose(1, 2)[:, :, :1]
    key = torch.randn(2, keys, 7, 8, generator=generator)
    value = torch.randn(2, keys, 7, size, generator=generator)
    mask = torch.randn(2, 1, 1, 7, generator=generator) if kind == "bias" else None
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // keys
    output, weights = _attention(module, query, key, value, mask, scaling=0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, scale=0.5, enable_gqa=True
    )
    assert weights is None
    torch.testing.assert_close(output, expected.transpose(1, 2))
