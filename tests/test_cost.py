"""The currency, by numbers worked out by hand."""

import pytest

from sparse_runtime.cost import FFNCost, PlaneCost


def test_bytes_of_a_token():
    # SmolLM2-135M's FFN in bfloat16: a neuron has 3 · 576 weights of 2 bytes, its look record nine
    # groups of 64 along H, each 2 · 32 bytes of codes and 2 · 2 of scales; a bitmap has 1536 bits.
    plain = FFNCost(576, 1536, extra_elements=1000)
    looks = FFNCost(576, 1536, extra_elements=1000, verified=True)
    assert plain.dense_bytes == looks.dense_bytes == 1536 * 3456
    assert plain.sparse_bytes(700) == 700 * 3456 + 2000 + 192
    assert looks.sparse_bytes(400, 900) == 400 * 3456 + 900 * 612 + 2000 + 2 * 192
    assert looks.share(400, 900) == pytest.approx((400 * 3456 + 900 * 612 + 2384) / (1536 * 3456))
    assert FFNCost(576, 1536, 0, element_size=4).sparse_bytes(1) == 6912 + 192
    assert FFNCost(576, 1536, 0, clustered=False).sparse_bytes(1) == 3456


def test_bytes_without_a_gate():
    # Two rows of 576 weights a neuron; in 4 + 2 bits a group has 32 + 16 bytes, and 2 of scale.
    floats = FFNCost(576, 1536, 0, verified=True, matrices=1)
    assert floats.dense_bytes == 1536 * 2 * 576 * 2
    assert floats.look_bytes == 9 * 34
    planes = PlaneCost(576, 1536, 0, base=4, residual=2, matrices=1)
    assert planes.dense_bytes == floats.dense_bytes
    assert (planes.look_bytes, planes.count_bytes, planes.refine_bytes) == (9 * 34, 9 * 34, 9 * 32)
    assert planes.whole_bytes == 1536 * 9 * 100
    assert planes.sparse_bytes(500, 900, 200) == 9 * (34 * 500 + 34 * 900 + 32 * 200) + 192
    gated = PlaneCost(576, 1536, 0, base=4, residual=2)
    assert (gated.look_bytes, gated.refine_bytes) == (9 * 68, 9 * 48)
