"""The Triton kernels against the reference in float64, on a GPU or by Triton's interpreter."""

import pytest
import torch
from kernels.cases import SHAPES, case, exact, verified_case, verified_exact

from sparse_runtime.bitmaps import pack_bits
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS, sparse_ffn_reference

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_ffn = pytest.importorskip("sparse_runtime.kernels.triton_ffn")
if DEVICE == "cpu" and not triton_ffn.INTERPRETED:
    pytest.skip("no GPU, and TRITON_INTERPRET was not set", allow_module_level=True)

# As for the C++ library: sums in fp32 and one rounding to the output's dtype; the interpreter cuts
# bfloat16 off instead of rounding it. Several tokens also round their activations.
ACCUMULATION = 32 * 2**-24
ROUNDING = {
    torch.float32: 0,
    torch.bfloat16: 2**-7 if DEVICE == "cpu" else 2**-8,
    torch.float16: 2**-11,
}


def assert_close(actual, expected, dtype, tokens):
    assert actual.dtype == dtype
    scale = expected.abs().max()
    assert scale > 0
    tolerance = ACCUMULATION + ROUNDING[dtype] * (1 if tokens == 1 else 2)
    assert (actual.cpu().double() - expected).abs().max() <= tolerance * scale


def moved(*tensors):
    return [tensor.to(DEVICE) if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("n", [1, 2, 7, 64, 70])
@pytest.mark.parametrize(("hidden", "neurons", "clusters"), SHAPES)
def test_given_clusters(hidden, neurons, clusters, dtype, n):
    if n >= 64 and hidden * neurons > 4000 and DEVICE == "cpu":
        hidden, neurons = 40, 50  # the interpreter takes seconds for more
    x, weights, mask, ids = case(n, hidden, neurons, clusters, dtype)
    counts = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    y = triton_ffn.triton_sparse_ffn(
        *moved(x, *weights, pack_bits(mask), ids, "silu"), row_counts=counts
    )
    assert_close(y, exact(x, weights, mask, ids), dtype, n)
    assert counts.tolist() == [int(mask[ids].sum()), 0]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("activation", ACTIVATION_FUNCTIONS)
def test_activations(activation, n):
    x, weights, mask, ids = case(n, 33, 67, 5, torch.float32)
    y = triton_ffn.triton_sparse_ffn(*moved(x, *weights, pack_bits(mask), ids, activation))
    # The interpreter's erf is float32's.
    assert_close(y, exact(x, weights, mask, ids, activation), torch.float32, n)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_neurons_and_all(density, n):
    x, weights, mask, ids = case(n, 24, 50, 3, torch.float32)
    mask = torch.full_like(mask, bool(density))
    y = triton_ffn.triton_sparse_ffn(*moved(x, *weights, pack_bits(mask), ids, "silu"))
    if density:
        assert_close(y, exact(x, weights, mask, ids), torch.float32, n)
    else:
        assert torch.equal(y.cpu(), torch.zeros(n, 24))
    assert triton_ffn.triton_sparse_ffn(
        *moved(x[:0], *weights, pack_bits(mask), ids[:0], "silu")
    ).shape == (0, 24)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(
    ("hidden", "neurons", "clusters"), [(64, 40, 3), (70, 131, 4), (1, 9, 2), (600, 37, 2)]
)
def test_looks(hidden, neurons, clusters, n, dtype):
    arguments, computed, looked = verified_case(n, hidden, neurons, clusters, dtype)
    counts = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    y = triton_ffn.triton_sparse_ffn(*moved(*arguments), row_counts=counts)
    assert_close(y, verified_exact(arguments, computed), dtype, n)
    assert counts.tolist() == [int(computed.sum()), int(looked.sum())]


def test_looks_at_what_is_not_finite():
    """As in the reference, a token with NaN computes all it looks at, and one with tiny values none."""
    arguments, _, _ = verified_case(3, 70, 131, 4, torch.float32)
    x = arguments[0]
    x[0, 3], x[1] = float("nan"), 1e-35
    counts = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    y = triton_ffn.triton_sparse_ffn(*moved(*arguments), row_counts=counts).cpu()
    expected = torch.zeros(2, dtype=torch.int64)
    sparse_ffn_reference(*arguments, row_counts=expected)
    assert counts.tolist() == expected.tolist()
    assert y[0].isnan().all()
    assert not y[1:].isnan().any()


@pytest.fixture
def routed():
    """Arguments of the routed operation and what must come out, on the CPU in float64."""

    def make(n, rank, *, bias, correction, verify, dtype=torch.float32, hidden=70, neurons=131):
        clusters = 5
        arguments, _, _ = verified_case(n, hidden, neurons, clusters, dtype, seed=n)
        x, gate, up, down, sets, _, activation, *look = arguments
        g = torch.Generator().manual_seed(7)

        def random(*shape):
            return (torch.randn(shape, generator=g) * shape[-1] ** -0.5).to(dtype)

        router = (
            None if rank is None else random(rank, hidden),
            random(clusters, hidden if rank is None else rank),
            random(clusters),
        )
        extras = [random(clusters, hidden) if bias else None]
        correction = (random(3, hidden), random(3, hidden)) if correction else (None, None)
        low = x.double() if rank is None else x.double() @ router[0].double().t()
        ids = (low @ router[1].double().t() + router[2].double()).argmax(-1)
        look = look if verify else [None] * 3
        counts = torch.zeros(2, dtype=torch.int64)
        wide = [t.double() for t in (x, gate, up, down)]
        expected = sparse_ffn_reference(*wide, sets, ids, activation, *look, row_counts=counts)
        if bias:
            expected = expected + extras[0].double()[ids]
        if correction[0] is not None:
            expected = expected + x.double() @ correction[0].double().t() @ correction[1].double()
        cluster_counts = torch.zeros(clusters, dtype=torch.int64)
        found = torch.zeros(2, dtype=torch.int64)
        counters = torch.zeros(triton_ffn.num_counters(hidden), dtype=torch.int32)
        call = moved(
            x, gate, up, down, sets, *router, *extras, cluster_counts, activation, *look, found,
            *correction, counters,
        )  # fmt: skip
        return call, expected, ids, counts

    return make


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("rank", [None, 1, 6])
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(("bias", "correction"), [(False, False), (True, False), (True, True)])
def test_routed(routed, n, rank, verify, bias, correction):
    call, expected, ids, counts = routed(n, rank, bias=bias, correction=correction, verify=verify)
    y = torch.ops.sparse_runtime.triton_routed_ffn(*call)
    assert_close(y, expected, torch.float32, n)
    assert call[9].tolist() == torch.bincount(ids, minlength=5).tolist()
    assert call[14].tolist() == counts.tolist()
    assert not call[17].any()  # ready for the next call
    assert torch.equal(torch.ops.sparse_runtime.triton_routed_ffn(*call), y)
    assert call[14].tolist() == (2 * counts).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 3])
def test_routed_in_half_precision(routed, n, dtype):
    call, expected, ids, _ = routed(n, 6, bias=True, correction=True, verify=True, dtype=dtype)
    y = torch.ops.sparse_runtime.triton_routed_ffn(*call)
    assert_close(y, expected, dtype, n)
    assert call[9].tolist() == torch.bincount(ids, minlength=5).tolist()


def test_many_tokens_go_in_parts(routed):
    call, expected, ids, _ = routed(
        70, 2, bias=True, correction=True, verify=False, hidden=16, neurons=24
    )
    y = torch.ops.sparse_runtime.triton_routed_ffn(*call)
    assert_close(y, expected, torch.float32, 70)
    assert call[9].tolist() == torch.bincount(ids, minlength=5).tolist()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("n", [1, 4])
def test_one_graph_serves_every_token(routed, n):
    """A captured call follows ids that change after the capture."""
    call, *_ = routed(n, 6, bias=True, correction=True, verify=True, dtype=torch.bfloat16)
    torch.ops.sparse_runtime.triton_routed_ffn(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.sparse_runtime.triton_routed_ffn(*call)
    clusters = set()
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        call[0].copy_(torch.randn(call[0].shape, generator=generator))
        before = call[9].clone()
        graph.replay()
        clusters |= set((call[9] - before).nonzero().flatten().tolist())
        replayed = captured.clone()
        assert torch.equal(replayed, torch.ops.sparse_runtime.triton_routed_ffn(*call))
    assert len(clusters) > 1
