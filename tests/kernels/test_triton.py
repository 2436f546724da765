"""The Triton kernels against the reference in float64, on a GPU or by Triton's interpreter."""

import pytest
import torch
from kernels.cases import ACCUMULATION, SHAPES, case, close_calls, flat_reference
from kernels.cases import assert_close as assert_within
from kernels.covering import covering, name_of

from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_ffn = pytest.importorskip("sparse_runtime.kernels.triton.ffn")
if DEVICE == "cpu" and not triton_ffn.INTERPRETED:
    pytest.skip("no GPU, and TRITON_INTERPRET was not set", allow_module_level=True)

# As for the C++ library: sums in fp32 and one rounding to the output's dtype; the interpreter cuts
# bfloat16 off instead of rounding it. Several tokens also round their activations.
ROUNDING = {
    torch.float32: 0,
    torch.bfloat16: 2**-7 if DEVICE == "cpu" else 2**-8,
    torch.float16: 2**-11,
}


def assert_close(actual, expected, dtype, tokens):
    assert actual.dtype == dtype
    tolerance = ACCUMULATION + ROUNDING[dtype] * (1 if tokens == 1 else 2)
    assert_within(actual, expected, tolerance, expected.abs().max().clamp_min(1e-9))


def moved(*tensors):
    return [tensor.to(DEVICE) if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]


@pytest.mark.parametrize(
    "row",
    covering(
        2,
        n=[1, 2, 7, 70],
        shape=[*SHAPES, (600, 37, 2)],
        dtype=list(ROUNDING),
        activation=list(ACTIVATION_FUNCTIONS),
        density=[0.0, 0.5, 1.0],
        looks=[False, True],
    ),
    ids=name_of,
)
def test_given_clusters(row):
    n, dtype = row["n"], row["dtype"]
    if n == 70 and DEVICE == "cpu":  # seconds for the interpreter
        small = row["shape"][0] * row["shape"][1] <= 3000
        row = row | {"looks": False, "shape": row["shape"] if small else (40, 50, 3)}
    given = case(**row)
    counts = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    y = triton_ffn.triton_sparse_ffn(*moved(*given.arguments), row_counts=counts)
    assert_close(y, given.exact(), dtype, n)
    assert counts.tolist() == given.counts
    assert y.any() == given.computed.any()


def test_no_tokens():
    given = case(2, (24, 50, 3), torch.float32)
    x, *weights, sets, ids, activation = given.arguments[:7]
    counts = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    arguments = moved(x[:0], *weights, sets, ids[:0], activation)
    y = triton_ffn.triton_sparse_ffn(*arguments, None, None, None, counts)
    assert y.shape == (0, 24)


def test_looks_at_what_is_not_finite():
    """As in the reference, a token with NaN computes all it looks at, and one with tiny values none."""
    arguments = case(3, (70, 131, 4), torch.float32, looks=True).arguments
    x = arguments[0]
    x[0, 3], x[1] = float("nan"), 1e-35
    counts = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    y = triton_ffn.triton_sparse_ffn(*moved(*arguments), row_counts=counts).cpu()
    expected = torch.zeros(2, dtype=torch.int64)
    flat_reference(*arguments, row_counts=expected)
    assert counts.tolist() == expected.tolist()
    assert y[0].isnan().all()
    assert not y[1:].isnan().any()


def test_decisions_do_not_depend_on_other_tokens():
    x, *weights, sets, ids, activation, band, records, factors = moved(*close_calls(5, 200, 40))

    def run(tokens):
        counts = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        call = x[tokens], *weights, sets, ids[tokens], activation, band, records, factors
        return triton_ffn.triton_sparse_ffn(*call, counts)[:, :40] != 0

    together = run(slice(None))
    for size in (1, 2):
        parts = [run(slice(first, first + size)) for first in range(0, 5, size)]
        assert torch.equal(torch.cat(parts), together)
    assert 0.2 < together.float().mean() < 0.8


@pytest.fixture
def routed():
    """Arguments of the routed operation and what must come out, on the CPU in float64."""

    def make(n, rank, *, bias, correction, verify, dtype=torch.float32, hidden=70, neurons=131):
        clusters = 5
        given = case(n, (hidden, neurons, clusters), dtype, density=0.3, looks=True, seed=n)
        x, gate, up, down, sets, _, activation, *look = given.arguments
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
        expected = flat_reference(*wide, sets, ids, activation, *look, row_counts=counts)
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


@pytest.mark.parametrize(
    "row",
    covering(
        2,
        n=[1, 4],
        rank=[None, 1, 6],
        verify=[False, True],
        bias=[False, True],
        correction=[False, True],
    ),
    ids=name_of,
)
def test_routed(routed, row):
    call, expected, ids, counts = routed(**row)
    n = row["n"]
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
