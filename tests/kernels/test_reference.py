"""The reference backend against the formula written as a loop in float64."""

import pytest
import torch
from kernels.cases import flat_sparse_ffn

from sparse_runtime.kernels.bitmaps import pack_bits, set_sizes, unpack_bits

# Relative to the largest output. A sum of m products in a format with unit roundoff u errs by about
# sqrt(m)·u of its terms' size; h and y are rounded once more each. m ≤ 200 here, so 16·u is safe for
# float32 and 4·u for the two that accumulate in float32 and only round h and y.
TOLERANCE = {torch.float32: 16 * 2**-24, torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}
ACTIVATIONS = {
    "silu": lambda v: v * torch.sigmoid(v),
    "gelu": lambda v: 0.5 * v * (1 + torch.erf(v / 2**0.5)),
    "gelu_tanh": lambda v: (
        0.5 * v * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3)))
    ),
    "relu": lambda v: v.clamp_min(0),
}


def naive(x, w_gate, w_up, w_down_t, mask, ids, activation):
    x, w_gate, w_up, w_down_t = (t.double() for t in (x, w_gate, w_up, w_down_t))
    y = torch.zeros_like(x)
    for token, cluster in enumerate(ids.tolist()):
        for i in mask[cluster].nonzero().flatten().tolist():
            h = ACTIVATIONS[activation](w_gate[i] @ x[token]) * (w_up[i] @ x[token])
            y[token] += h * w_down_t[i]
    return y


def case(n, hidden, neurons, clusters, density, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, hidden, generator=g).to(dtype)
    weights = [
        (torch.randn(neurons, hidden, generator=g) * hidden**-0.5).to(dtype) for _ in range(3)
    ]
    mask = torch.rand(clusters, neurons, generator=g) < density
    ids = torch.randint(0, clusters, (n,), generator=g)
    return x, weights, mask, ids


def assert_close(actual, expected, dtype):
    scale = expected.abs().max().clamp_min(1e-12)
    assert (actual.double() - expected).abs().max() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize(("hidden", "neurons", "clusters"), [(16, 40, 3), (33, 67, 5), (8, 1, 1)])
def test_matches_formula(n, hidden, neurons, clusters, dtype):
    x, weights, mask, ids = case(n, hidden, neurons, clusters, 0.5, dtype)
    mask[0, 0] = True
    y = flat_sparse_ffn(x, *weights, pack_bits(mask), ids, "silu")
    expected = naive(x, *weights, mask, ids, "silu")
    assert y.dtype == dtype
    assert_close(y, expected, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n", [2, 20])
def test_activations(activation, n):
    x, weights, mask, ids = case(n, 24, 50, 4, 0.5, torch.float32)
    y = flat_sparse_ffn(x, *weights, pack_bits(mask), ids, activation)
    assert_close(y, naive(x, *weights, mask, ids, activation), torch.float32)


@pytest.mark.parametrize("n", [1, 30])
def test_empty_set_gives_zero_and_full_set_is_dense(n):
    x, weights, _, _ = case(n, 24, 50, 2, 0.5, torch.float32)
    mask = torch.tensor([[False] * 50, [True] * 50])
    empty = flat_sparse_ffn(x, *weights, pack_bits(mask), torch.zeros(n, dtype=torch.int64), "silu")
    full = flat_sparse_ffn(x, *weights, pack_bits(mask), torch.ones(n, dtype=torch.int64), "silu")
    gate, up, down_t = weights
    dense = (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down_t
    assert empty.count_nonzero() == 0
    assert_close(full, dense.double(), torch.float32)
    assert dense.abs().min() > 0


def test_no_tokens():
    x, weights, mask, _ = case(1, 24, 50, 2, 0.5, torch.float32)
    y = flat_sparse_ffn(x[:0], *weights, pack_bits(mask), torch.zeros(0, dtype=torch.int64), "silu")
    assert y.shape == (0, 24)


def test_opcheck():
    x, weights, mask, ids = case(3, 24, 50, 4, 0.5, torch.float32)
    torch.library.opcheck(
        torch.ops.sparse_runtime.sparse_ffn,
        (x, *weights, pack_bits(mask), ids, "silu", None, None, None, torch.zeros(2).long()),
    )


def test_compiles_without_graph_break():
    x, weights, mask, ids = case(3, 24, 50, 4, 0.5, torch.float32)
    sets = pack_bits(mask)

    def step(x, ids):
        return flat_sparse_ffn(x, *weights, sets, ids, "silu") + 1

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, ids), step(x, ids))
    other = (ids + 1) % 4
    assert torch.equal(compiled(x, other), step(x, other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"x": torch.zeros(3, 25)}, "x is"),
        ({"x": torch.zeros(24)}, "expected \\[n, H\\]"),
        ({"w_up": torch.zeros(50, 24, dtype=torch.bfloat16)}, "up is torch.bfloat16"),
        ({"w_down_t": torch.zeros(24, 50)}, "down_t is"),
        ({"sets": torch.zeros(4, 8, dtype=torch.uint8)}, "active_sets is"),
        ({"sets": torch.zeros(4, 7)}, "active_sets is torch.float32"),
        ({"cluster_ids": torch.zeros(2, dtype=torch.int64)}, "cluster_ids is"),
        ({"cluster_ids": torch.zeros(3, dtype=torch.int32)}, "cluster_ids is torch.int32"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    x, weights, mask, ids = case(3, 24, 50, 4, 0.5, torch.float32)
    names = ("w_gate", "w_up", "w_down_t")
    arguments = {"x": x, **dict(zip(names, weights, strict=True))}
    arguments |= {"sets": pack_bits(mask), "cluster_ids": ids, "activation": "silu"}
    with pytest.raises(ValueError, match=message):
        flat_sparse_ffn(**(arguments | change))


@pytest.mark.parametrize("neurons", [1, 7, 8, 9, 64, 100])
def test_bitmaps_round_trip(neurons):
    mask = torch.rand(5, neurons, generator=torch.Generator().manual_seed(1)) < 0.5
    packed = pack_bits(mask)
    assert packed.shape == (5, (neurons + 7) // 8)
    assert torch.equal(unpack_bits(packed, neurons), mask)
    assert torch.equal(set_sizes(packed), mask.sum(-1))
