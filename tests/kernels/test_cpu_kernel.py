"""The C++ library against the reference computed in float64, in every instruction set there is.

The cases are covering arrays: any three factors take all their values together.
"""

import pytest
import torch
from kernels.cases import (
    ACCUMULATION,
    SHAPES,
    TOLERANCE,
    assert_close,
    case,
    first_largest,
    integers,
    spaced,
)
from kernels.covering import covering, name_of
from kernels.library import ISAS, forced, ops

from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS

DTYPES = list(TOLERANCE)
#: One pass of a loop over tokens, several, the most that a pass of the FFN takes, and more.
TOKENS = [1, 2, 3, 7, 64, 70]
#: More neurons than a pass of many tokens holds values of; more groups than a look prepares.
FFN_SHAPES = [*SHAPES, (6, 1100, 3), (4200, 9, 2)]


def rows(**factors):
    array = covering(3, isa=ISAS, dtype=DTYPES, n=TOKENS, **factors)
    return pytest.mark.parametrize("row", array, ids=name_of)


@pytest.fixture(autouse=True, scope="module")
def references_on_one_thread():
    with forced(threads=1):
        yield


@pytest.fixture(params=ISAS)
def isa(request):
    """Force each instruction set that this machine has."""
    with forced(request.param):
        yield request.param


def random(g, *shape, dtype):
    return (torch.randn(shape, generator=g) * shape[-1] ** -0.5).to(dtype)


@rows(
    shape=FFN_SHAPES,
    activation=list(ACTIVATION_FUNCTIONS),
    density=[0.0, 0.1, 0.6, 1.0],
    looks=[False, True],
    threads=[1, 3, 4],
    rank=[None, 1, 20],
    router_bias=[False, True],
    cluster_bias=[False, True],
    correction=[None, 1, 5, 150],
    layout=["dense", "spaced"],
)
def test_ffn(row):
    """The three operations, their counters, and the same bits when called again."""
    check_ffn(**row)


def check_ffn(
    n, shape, dtype, activation, density, looks, rank, router_bias, cluster_bias, correction,
    layout, isa, threads,
):  # fmt: skip
    hidden, _, clusters = shape
    given = case(n, shape, dtype, activation=activation, density=density, looks=looks)
    g = torch.Generator().manual_seed(9)
    down = None if rank is None else random(g, rank, hidden, dtype=dtype)
    router = random(g, clusters, rank or hidden, dtype=dtype) * 3
    bias = random(g, clusters, dtype=dtype) if router_bias else None
    offsets = random(g, clusters, hidden, dtype=dtype) if cluster_bias else None
    ranks = None if correction is None else random(g, 2, correction, hidden, dtype=dtype)

    placed = spaced if layout == "spaced" else lambda tensor: tensor

    ffn = [placed(tensor) for tensor in (given.x, *given.weights)]
    sets = placed(given.sets)
    if layout == "spaced" and given.sure.shape[1] % 8:
        sets[:, -1] |= 255 << given.sure.shape[1] % 8 & 255  # padding bits may hold anything
    maybe, look, factors = given.band
    band = (placed(maybe), placed(look), factors)
    down, router, offsets = map(placed, (down, router, offsets))
    low, high = (None, None) if ranks is None else map(placed, ranks)
    counts, routed_counts = torch.tensor([[5, 7], [5, 7]])
    cluster_counts = torch.arange(clusters)
    with forced(isa, threads):
        given.ids = ops.cpu_route(ffn[0], down, router, bias)
        spaced_ids = given.ids.repeat_interleave(3)[::3]
        sparse = ops.cpu_sparse_ffn(*ffn, sets, spaced_ids, activation, *band, counts)
        again = ops.cpu_sparse_ffn(*ffn, sets, given.ids, activation, *band)
        dense = ops.cpu_dense_ffn(*ffn, activation)
        routed = ops.cpu_routed_ffn(
            *ffn, sets, down, router, bias, offsets, cluster_counts, activation, *band,
            routed_counts, low, high,
        )  # fmt: skip

    check_route(given.ids, given.x, down, router, bias, TOLERANCE[dtype])
    expected = given.exact()
    scale = expected.abs().max().clamp_min(1e-9)  # where nothing is computed
    assert_close(sparse, expected, TOLERANCE[dtype], scale)
    assert torch.equal(again, sparse)
    assert sparse.is_contiguous()
    assert counts.tolist() == [5 + given.counts[0], 7 + given.counts[1]]
    every = given.dense().exact()
    assert_close(dense, every, TOLERANCE[dtype], every.abs().max().clamp_min(1e-9))
    if offsets is not None:
        expected = expected + offsets[given.ids].double()
    if low is not None:
        expected = expected + given.x.double() @ low.double().t() @ high.double()
    assert_close(routed, expected, TOLERANCE[dtype], max(scale, expected.abs().max()))
    assert routed.dtype == dtype
    assert routed_counts.tolist() == counts.tolist()
    chosen = given.ids.bincount(minlength=clusters)
    assert torch.equal(cluster_counts, torch.arange(clusters) + chosen)


def check_route(ids, x, down, router, bias, tolerance):
    """The chosen logit is the largest, but for rounding."""
    inner = x.double() if down is None else (x.double() @ down.double().t()).to(x.dtype).double()
    logits = inner @ router.double().t() + (0 if bias is None else bias.double())
    short = logits.amax(-1) - logits.gather(1, ids[:, None])[:, 0]
    assert (short <= 2 * tolerance * logits.abs().max() + 1e-6).all()


@rows(rank=[None, 1, 20], clusters=[1, 5, 37], with_bias=[False, True], threads=[1, 3])
def test_route(row):
    """Integers, so that logits are exact: the winner, and the first of several."""
    n, rank, clusters, dtype = row["n"], row["rank"], row["clusters"], row["dtype"]
    x = integers(n, 50, dtype=dtype)
    down = None if rank is None else integers(rank, 50, dtype=dtype, seed=1)
    up = integers(clusters, rank or 50, dtype=dtype, seed=2)
    bias = integers(clusters, dtype=dtype, seed=3) if row["with_bias"] else None
    inner = x if down is None else (x.double() @ down.double().t()).to(dtype)
    logits = inner.double() @ up.double().t() + (0 if bias is None else bias.double())
    with forced(row["isa"], row["threads"]):
        ids = ops.cpu_route(x, down, up, bias)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, first_largest(logits))
    assert n < 7 or clusters == 1 or len(ids.unique()) > 1


def test_route_on_many_threads():
    x, up = integers(2, 600, dtype=torch.float32), integers(250, 600, dtype=torch.float32, seed=1)
    expected = first_largest(x.double() @ up.double().t())
    assert expected.max() > 50
    for threads in (1, 3, 5):
        with forced(threads=threads):
            assert torch.equal(ops.cpu_route(x, None, up, None), expected)


def test_route_ties_and_nan(isa):
    up = torch.zeros(5, 4)
    x = torch.ones(2, 4)
    assert ops.cpu_route(x, None, up, None).tolist() == [0, 0]
    bias = torch.tensor([0.0, 1.0, 0.0, 1.0, -1.0])
    assert ops.cpu_route(x, None, up, bias).tolist() == [1, 1]
    bias[2] = float("nan")
    assert ops.cpu_route(x, None, up, bias).tolist() == [2, 2]
    assert ops.cpu_route(x, None, up, torch.full((5,), -torch.inf)).tolist() == [0, 0]


@rows(
    shape=[(16, 40), (33, 67), (8, 1), (1, 9), (576, 1030)],
    with_bias=[False, True],
    threads=[1, 3],
    layout=["dense", "spaced"],
)
def test_linear(row):
    length, count = row["shape"]
    dtype = row["dtype"]
    x, weight = (
        integers(row["n"], length, dtype=dtype),
        integers(count, length, dtype=dtype, seed=1),
    )
    bias = integers(count, dtype=dtype, seed=2) if row["with_bias"] else None
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    if row["layout"] == "spaced":
        x, weight = spaced(x), spaced(weight)
    with forced(row["isa"], row["threads"]):
        y = ops.cpu_linear(x, weight, bias)
    assert torch.equal(y, expected.to(dtype))  # integers: the only rounding is the output's
    assert y.any()


@pytest.mark.parametrize("activation", ACTIVATION_FUNCTIONS)
def test_activation_values(isa, activation):
    """H = 1 and unit up and down weights: y is the activation itself."""
    values = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, 1e-30, -1e-30])])
    ones = torch.ones(1, 1)
    y = ops.cpu_dense_ffn(values[:, None], ones, ones, ones, activation)[:, 0]
    expected = ACTIVATION_FUNCTIONS[activation](values.double()) * values
    error = (y.double() - expected).abs()
    # Relative to |act(v) v| plus what is left of v itself after cancellation.
    assert (error <= 8 * 2**-24 * (expected.abs() + values.abs())).all()


def test_activations_keep_nan(isa):
    x = torch.tensor([[float("nan")], [1.0]])
    ones = torch.ones(1, 1)
    for activation in ACTIVATION_FUNCTIONS:
        y = ops.cpu_dense_ffn(x, ones, ones, ones, activation)
        assert y[0].isnan()
        assert y[1].isfinite()
        assert ops.cpu_dense_ffn(x[1:], ones * torch.nan, ones, ones, activation).isnan()


@pytest.mark.parametrize("n", [1, 30])
def test_empty_set_gives_zero(isa, n):
    given = case(n, (24, 50, 2), torch.bfloat16)
    given.sure[0] = False
    x, *weights, _, _, _ = given.arguments[:7]
    zeros = torch.zeros(n, dtype=torch.int64)
    assert not ops.cpu_sparse_ffn(x, *weights, given.sets, zeros, "silu").any()
    given.ids = zeros.clone()
    given.ids[n // 2] = 1
    y = ops.cpu_sparse_ffn(x, *weights, given.sets, given.ids, "silu")
    assert_close(y, given.exact(), TOLERANCE[torch.bfloat16])


def test_nothing_to_compute(isa):
    given = case(3, (24, 50, 2), torch.float32)
    x, weights, sets, ids = given.x, given.weights, given.sets, given.ids
    assert ops.cpu_sparse_ffn(x[:0], *weights, sets, ids[:0], "silu").shape == (0, 24)
    none = [w[:0] for w in weights]
    no_neurons = torch.zeros(2, 0, dtype=torch.uint8)
    y = ops.cpu_sparse_ffn(x, *none, no_neurons, ids, "silu")
    assert torch.equal(y, torch.zeros(3, 24))
    assert torch.equal(ops.cpu_dense_ffn(x, *none, "silu"), torch.zeros(3, 24))
    y = ops.cpu_sparse_ffn(x[:, :0], *[w[:, :0] for w in weights], sets, ids, "silu")
    assert y.shape == (3, 0)
    nowhere, no_weight = torch.empty(3, 0).bfloat16(), torch.empty(50, 0).bfloat16()
    assert ops.cpu_dense_ffn(nowhere, no_weight, no_weight, no_weight, "silu").shape == (3, 0)
    assert ops.cpu_linear(x, torch.zeros(0, 24), None).shape == (3, 0)
    assert torch.equal(ops.cpu_linear(x[:, :0], torch.zeros(4, 0), None), torch.zeros(3, 4))


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_a_wide_output_is_added_up_by_columns(threads):
    """More partial sums than the last thread adds up alone, and fewer tokens than threads."""
    given = case(1, (33_000, 9, 2), torch.float32, density=1.0)
    with forced(threads=threads):
        y = ops.cpu_dense_ffn(given.x, *given.weights, "silu")
    assert_close(y, given.exact(), ACCUMULATION)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_matches_torch(isa, dtype):
    """The output conversion is to nearest even, with infinities, NaN and subnormals as in torch."""
    g = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=g).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), torch.randn(4096, generator=g)])
    values = values.to(dtype)
    # value · 1 + value · 2^-9: products are exact, so the sum is one fp32 rounding away.
    small = torch.tensor([[1.0, 2.0**-9]]).to(dtype)
    usable = values[values.float().isfinite() & (values.float().abs() > 1e-30)]
    y = ops.cpu_linear(torch.stack([usable, usable], -1), small, None)[:, 0]
    expected = (usable.float() + usable.float() * 2.0**-9).to(dtype)
    assert torch.equal(y, expected)
    special = torch.tensor([[torch.inf], [-torch.inf], [torch.nan], [0.0]]).to(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    same = ops.cpu_linear(special, one, None)
    assert torch.equal(same.isnan(), special.isnan())
    assert torch.equal(same.nan_to_num(), special.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_are_rounded_to_even(isa, dtype):
    """Values plus half a unit in their last place, by both conversions: of linear and of the FFN."""
    digits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[dtype]
    values = torch.randn(8191, generator=torch.Generator().manual_seed(3)).to(dtype).float()
    halves = 2.0 ** (values.frexp().exponent - 1 - digits)
    usable = halves >= 2.0**-24 if dtype == torch.float16 else halves > 0
    both = torch.stack([values[usable], halves[usable]])
    expected = both.sum(0).to(dtype)
    assert (expected != both[0].to(dtype)).float().mean() > 0.4  # every other one goes up
    both = both.to(dtype)
    assert torch.equal(both[1].float(), halves[usable])
    one = torch.ones(1, 2, dtype=dtype)
    assert torch.equal(ops.cpu_linear(both.t().contiguous(), one, None)[:, 0], expected)
    first = torch.zeros(2, both.shape[1], dtype=dtype)
    first[:, 0] = 1
    assert torch.equal(ops.cpu_dense_ffn(first[:1], first, first, both, "relu")[0], expected)


@pytest.mark.parametrize("threads", [1, 5])
def test_read(isa, threads):
    data = torch.randint(-(2**62), 2**62, (100_003,), generator=torch.Generator().manual_seed(1))
    with forced(isa, threads):
        assert ops.cpu_read(data).item() == data.sum().item()
        assert ops.cpu_read(data[:0]).item() == 0


def test_isa_names():
    assert ops.cpu_isa() == ISAS[0]
    assert ISAS[-1] == "scalar"
    with pytest.raises(ValueError, match="unknown or not usable"):
        ops.cpu_force_isa("mmx")
    assert ops.cpu_isa() == ISAS[0]
