"""The C++ library against the reference computed in float64, in every instruction set there is."""

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from kernels.cases import SHAPES, case, exact

import sparse_runtime.kernels
from sparse_runtime.bitmaps import pack_bits
from sparse_runtime.kernels.cpu import load_cpu_library
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS

LIBRARY = Path(sparse_runtime.kernels.__file__).with_name("libsparse_ffn_cpu.so")
if not load_cpu_library():
    pytest.skip(
        "libsparse_ffn_cpu.so is not built: pip install -e . with a C++ compiler",
        allow_module_level=True,
    )
ops = torch.ops.sparse_runtime

# Largest error over the largest output. Everything between the inputs and the output is fp32: a sum
# of m products errs by about sqrt(m) of fp32's unit roundoff 2**-24, m <= 600 here, and the output
# is rounded once, by at most the unit roundoff of its dtype.
ACCUMULATION = 32 * 2**-24
TOLERANCE = {
    torch.float32: ACCUMULATION,
    torch.bfloat16: 2**-8 + ACCUMULATION,
    torch.float16: 2**-11 + ACCUMULATION,
}


@pytest.fixture(params=ops.cpu_isas().split(","))
def isa(request):
    """Force each instruction set that this machine has."""
    ops.cpu_force_isa(request.param)
    yield request.param
    ops.cpu_force_isa("")


@pytest.fixture(params=[1, 2, 3, 5])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    scale = expected.abs().max()
    assert scale > 0
    assert (actual.double() - expected).abs().max() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 2, 7, 64, 70])
@pytest.mark.parametrize(("hidden", "neurons", "clusters"), SHAPES)
def test_sparse_ffn(isa, n, hidden, neurons, clusters, dtype):
    x, weights, mask, ids = case(n, hidden, neurons, clusters, dtype)
    y = ops.cpu_sparse_ffn(x, *weights, pack_bits(mask), ids, "silu")
    assert_close(y, exact(x, weights, mask, ids), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 2, 7, 64, 70])
@pytest.mark.parametrize(("hidden", "neurons", "clusters"), SHAPES)
def test_dense_ffn(isa, n, hidden, neurons, clusters, dtype):
    x, weights, mask, ids = case(n, hidden, neurons, clusters, dtype, density=1.1)
    expected = exact(x, weights, mask, ids)
    assert_close(ops.cpu_dense_ffn(x, *weights, "silu"), expected, dtype)
    assert_close(ops.cpu_sparse_ffn(x, *weights, pack_bits(mask), ids, "silu"), expected, dtype)


@pytest.mark.parametrize("activation", ACTIVATION_FUNCTIONS)
@pytest.mark.parametrize("n", [1, 5])
def test_activations(isa, activation, n):
    x, weights, mask, ids = case(n, 48, 100, 4, torch.float32)
    y = ops.cpu_sparse_ffn(x, *weights, pack_bits(mask), ids, activation)
    assert_close(y, exact(x, weights, mask, ids, activation), torch.float32)


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


@pytest.mark.parametrize("n", [1, 30])
def test_empty_set_gives_zero(isa, n):
    x, weights, mask, _ = case(n, 24, 50, 2, torch.bfloat16)
    mask[0] = False
    zeros = torch.zeros(n, dtype=torch.int64)
    assert ops.cpu_sparse_ffn(x, *weights, pack_bits(mask), zeros, "silu").count_nonzero() == 0
    mixed = zeros.clone()
    mixed[n // 2] = 1
    y = ops.cpu_sparse_ffn(x, *weights, pack_bits(mask), mixed, "silu")
    assert_close(y, exact(x, weights, mask, mixed), torch.bfloat16)


def test_nothing_to_compute(isa):
    x, weights, mask, ids = case(3, 24, 50, 2, torch.float32)
    sets = pack_bits(mask)
    assert ops.cpu_sparse_ffn(x[:0], *weights, sets, ids[:0], "silu").shape == (0, 24)
    none = [w[:0] for w in weights]
    no_neurons = torch.zeros(2, 0, dtype=torch.uint8)
    y = ops.cpu_sparse_ffn(x, *none, no_neurons, ids, "silu")
    assert torch.equal(y, torch.zeros(3, 24))
    assert torch.equal(ops.cpu_dense_ffn(x, *none, "silu"), torch.zeros(3, 24))
    assert ops.cpu_sparse_ffn(x[:, :0], *[w[:, :0] for w in weights], sets, ids, "silu").shape == (
        3,
        0,
    )
    assert ops.cpu_linear(x, torch.zeros(0, 24), None).shape == (3, 0)
    assert torch.equal(ops.cpu_linear(x[:, :0], torch.zeros(4, 0), None), torch.zeros(3, 4))


def test_padding_bits_are_ignored(isa):
    x, weights, mask, ids = case(3, 24, 51, 4, torch.float32)
    sets = pack_bits(mask)
    dirty = sets.clone()
    dirty[:, -1] |= 0b11111000
    assert not torch.equal(sets, dirty)
    y = ops.cpu_sparse_ffn(x, *weights, dirty, ids, "silu")
    assert torch.equal(y, ops.cpu_sparse_ffn(x, *weights, sets, ids, "silu"))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_strides(isa, dtype):
    x, weights, mask, ids = case(5, 40, 70, 4, dtype)
    expected = exact(x, weights, mask, ids)
    wide = [torch.full((70, 55), float("nan"), dtype=dtype) for _ in range(3)]
    for whole, weight in zip(wide, weights, strict=True):
        whole[:, 9:49] = weight
    x_rows = torch.full((9, 45), float("nan"), dtype=dtype)
    x_rows[::2, :40] = x
    spaced_ids = torch.full((15,), 99)
    spaced_ids[::3] = ids
    sets = torch.full((8, 20), 255, dtype=torch.uint8)
    sets[::2, :9] = pack_bits(mask)
    y = ops.cpu_sparse_ffn(
        x_rows[::2, :40],
        *(w[:, 9:49] for w in wide),
        sets[::2, :9],
        spaced_ids[::3],
        "silu",
    )
    assert_close(y, expected, dtype)
    assert y.is_contiguous()


@pytest.mark.parametrize("n", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_threads(num_threads, n, dtype):
    x, weights, mask, ids = case(n, 600, 1000, 9, dtype, density=0.3)
    sets = pack_bits(mask)
    expected = exact(x, weights, mask, ids)
    y = ops.cpu_sparse_ffn(x, *weights, sets, ids, "silu")
    scale = expected.abs().max()
    assert (y.double() - expected).abs().max() <= 2 * TOLERANCE[dtype] * scale
    for _ in range(5):
        assert torch.equal(ops.cpu_sparse_ffn(x, *weights, sets, ids, "silu"), y)
    weight = weights[0]
    linear = ops.cpu_linear(x, weight, None)
    assert_close(linear, x.double() @ weight.double().t(), dtype)


def test_concurrent_calls():
    """Scratch memory belongs to the calling thread."""
    cases = [case(n, 64, 200, 4, torch.float32, seed=n) for n in (1, 3, 8, 20)]
    arguments = [(x, *w, pack_bits(mask), ids, "silu") for x, w, mask, ids in cases]
    expected = [ops.cpu_sparse_ffn(*a) for a in arguments]
    wrong = []

    def work(i):
        for _ in range(50):
            if not torch.allclose(ops.cpu_sparse_ffn(*arguments[i]), expected[i], rtol=1e-4):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def integers(*shape, dtype, low=-2, high=3, seed=0):
    """Small integers: every sum of their products is exact in fp32."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=g).to(dtype)


def first_largest(logits):
    """The lowest index among the largest logits."""
    return (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 2, 7, 65])
@pytest.mark.parametrize("rank", [None, 1, 20])
@pytest.mark.parametrize("with_bias", [False, True])
def test_route(isa, n, rank, dtype, with_bias):
    hidden, clusters = 50, 37
    x = integers(n, hidden, dtype=dtype)
    down = None if rank is None else integers(rank, hidden, dtype=dtype, seed=1)
    up = integers(clusters, rank or hidden, dtype=dtype, seed=2)
    bias = integers(clusters, dtype=dtype, seed=3) if with_bias else None
    inner = x if down is None else (x.double() @ down.double().t()).to(dtype)
    logits = inner.double() @ up.double().t()
    if with_bias:
        logits += bias.double()
    ids = ops.cpu_route(x, down, up, bias)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, first_largest(logits))
    assert n < 7 or len(ids.unique()) > 1


def test_route_ties_and_nan(isa):
    up = torch.zeros(5, 4)
    x = torch.ones(2, 4)
    assert ops.cpu_route(x, None, up, None).tolist() == [0, 0]
    bias = torch.tensor([0.0, 1.0, 0.0, 1.0, -1.0])
    assert ops.cpu_route(x, None, up, bias).tolist() == [1, 1]
    bias[2] = float("nan")
    assert ops.cpu_route(x, None, up, bias).tolist() == [2, 2]
    assert ops.cpu_route(x, None, up, torch.full((5,), -torch.inf)).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 2, 7, 70])
@pytest.mark.parametrize("rank", [None, 6])
@pytest.mark.parametrize("compensated", [False, True])
def test_routed_ffn(isa, n, rank, dtype, compensated):
    hidden, neurons, clusters = 33, 67, 5
    x, weights, mask, _ = case(n, hidden, neurons, clusters, dtype)
    g = torch.Generator().manual_seed(9)
    down = None if rank is None else torch.randn(rank, hidden, generator=g).to(dtype)
    up = torch.randn(clusters, rank or hidden, generator=g).to(dtype)
    bias = torch.randn(clusters, generator=g).to(dtype)
    cluster_bias = torch.randn(clusters, hidden, generator=g).to(dtype) if compensated else None
    counts = torch.arange(clusters)
    y = ops.cpu_routed_ffn(
        x, *weights, pack_bits(mask), down, up, bias, cluster_bias, counts, "silu"
    )
    ids = ops.cpu_route(x, down, up, bias)
    expected = exact(x, weights, mask, ids)
    if compensated:
        expected += cluster_bias[ids].double()
    assert_close(y, expected, dtype)
    assert torch.equal(counts, torch.arange(clusters) + ids.bincount(minlength=clusters))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 7, 70])
@pytest.mark.parametrize("rank", [1, 5, 150])
@pytest.mark.parametrize("density", [0.0, 0.5])
def test_correction(isa, num_threads, n, rank, dtype, density):
    """correction_upᵀ·(correction_down·x) joins the output; wide and many-threaded ones too."""
    x, weights, mask, _ = case(n, 33, 67, 5, dtype)
    mask &= density > 0
    g = torch.Generator().manual_seed(9)
    up = torch.randn(5, 33, generator=g).to(dtype)
    down, back = (torch.randn(2, rank, 33, generator=g) * rank**-0.5).to(dtype)
    bias = torch.randn(5, 33, generator=g).to(dtype)
    y = ops.cpu_routed_ffn(
        x, *weights, pack_bits(mask), None, up, None, bias, None, "silu",
        correction_down=down, correction_up=back,
    )  # fmt: skip
    ids = ops.cpu_route(x, None, up, None)
    expected = exact(x, weights, mask, ids) + bias[ids].double()
    assert_close(y, expected + x.double() @ down.double().t() @ back.double(), dtype)


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        ((3, 33), None, "both or neither"),
        ((3, 33), (4, 33), "correction_up"),
        ((3, 32), (3, 33), "correction_down"),
        ((3, 33), (3, 34), "correction_up"),
    ],
)
def test_corrections_that_do_not_fit(down, up, message):
    x, weights, mask, _ = case(2, 33, 67, 5, torch.float32)
    tensors = [None if shape is None else torch.ones(shape) for shape in (down, up)]
    with pytest.raises(ValueError, match=message):
        ops.cpu_routed_ffn(
            x, *weights, pack_bits(mask), None, torch.ones(5, 33), None, None, None, "silu",
            correction_down=tensors[0], correction_up=tensors[1],
        )  # fmt: skip


def test_routed_ffn_without_extras(isa):
    x, weights, mask, _ = case(4, 33, 67, 5, torch.bfloat16)
    up = integers(5, 33, dtype=torch.bfloat16)
    y = ops.cpu_routed_ffn(x, *weights, pack_bits(mask), None, up, None, None, None, "relu")
    ids = ops.cpu_route(x, None, up, None)
    assert_close(y, exact(x, weights, mask, ids, "relu"), torch.bfloat16)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 2, 7, 64, 70])
@pytest.mark.parametrize(("length", "rows"), [(16, 40), (33, 67), (8, 1), (1, 9), (576, 1030)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(isa, n, length, rows, dtype, with_bias):
    x, (weight, _, _), _, _ = case(n, length, rows, 1, dtype)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(5)).to(dtype)
    expected = x.double() @ weight.double().t()
    if with_bias:
        expected += bias.double()
    assert_close(ops.cpu_linear(x, weight, bias if with_bias else None), expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
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


def test_read(isa, num_threads):
    data = torch.randint(-(2**62), 2**62, (100_003,), generator=torch.Generator().manual_seed(1))
    assert ops.cpu_read(data).item() == data.sum().item()
    assert ops.cpu_read(data[:0]).item() == 0


def test_isa_names():
    usable = ops.cpu_isas().split(",")
    assert ops.cpu_isa() == usable[0]
    assert usable[-1] == "scalar"
    with pytest.raises(ValueError, match="unknown or not usable"):
        ops.cpu_force_isa("mmx")
    assert ops.cpu_isa() == usable[0]


GOOD_X = torch.ones(3, 24)
GOOD_W = torch.ones(50, 24)


def routed_arguments(**changes):
    good = {
        "x": GOOD_X,
        "w_gate": GOOD_W,
        "w_up": GOOD_W,
        "w_down_t": GOOD_W,
        "sets": torch.zeros(4, 7, dtype=torch.uint8),
        "router_down": torch.ones(6, 24),
        "router_up": torch.ones(4, 6),
        "router_bias": torch.ones(4),
        "cluster_bias": torch.ones(4, 24),
        "cluster_counts": torch.zeros(4, dtype=torch.int64),
        "activation": "silu",
    }
    assert set(changes) <= set(good)
    return good | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"x": torch.ones(24)}, "x has 1 dimensions"),
        ({"x": torch.ones(3, 25)}, "w_gate has size 24 in dimension 1; expected H = 25"),
        ({"x": torch.ones(24, 3).t()}, "x has stride 3 in its last dimension"),
        ({"x": torch.ones(3, 24).double()}, "x has a dtype other than"),
        ({"w_up": torch.ones(50, 24).bfloat16()}, "w_up does not have dtype of x"),
        ({"w_up": torch.ones(51, 24)}, "w_up has size 51 in dimension 0; expected I = 50"),
        ({"w_down_t": torch.ones(24, 50).t()}, "w_down_t has stride 50 in its last dimension"),
        ({"w_gate": torch.ones(24).expand(50, 24)}, "w_gate has stride 0 between rows"),
        ({"sets": torch.zeros(4, 8, dtype=torch.uint8)}, "sets has size 8"),
        ({"sets": torch.zeros(4, 7)}, "sets does not have dtype uint8"),
        ({"sets": torch.zeros(5, 7, dtype=torch.uint8)}, "router_up has size 4.*expected K = 5"),
        ({"router_down": torch.ones(6, 23)}, "router_down has size 23"),
        ({"router_down": torch.ones(0, 24), "router_up": torch.ones(4, 0)}, "has no rows"),
        ({"router_down": None}, "router_up has size 6 in dimension 1; expected H = 24"),
        ({"router_up": torch.ones(4, 6).half()}, "router_up does not have dtype of x"),
        ({"router_bias": torch.ones(5)}, "router_bias has size 5"),
        ({"router_bias": torch.ones(8)[::2]}, "router_bias is not contiguous"),
        ({"cluster_bias": torch.ones(4, 25)}, "cluster_bias has size 25"),
        ({"cluster_counts": torch.zeros(4)}, "cluster_counts does not have dtype int64"),
        ({"cluster_counts": torch.zeros(3, dtype=torch.int64)}, "cluster_counts has size 3"),
        (
            {"sets": torch.zeros(0, 7, dtype=torch.uint8), "router_up": torch.ones(0, 6)},
            "there is no cluster",
        ),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    ops.cpu_routed_ffn(*routed_arguments().values())
    with pytest.raises(ValueError, match=message):
        ops.cpu_routed_ffn(*routed_arguments(**changes).values())


@pytest.mark.parametrize("bad_id", [-1, 4, 2**40, -(2**63)])
def test_ids_out_of_range(bad_id):
    sets = torch.zeros(4, 7, dtype=torch.uint8)
    ids = torch.tensor([0, bad_id, 1])
    with pytest.raises(IndexError, match=f"cluster_ids\\[1\\] is {bad_id}; expected 0 <= id < K"):
        ops.cpu_sparse_ffn(GOOD_X, GOOD_W, GOOD_W, GOOD_W, sets, ids, "silu")


def test_other_ops_reject():
    for bad in (torch.zeros(2, dtype=torch.int64), torch.zeros(3), torch.zeros(3, 1).long()):
        with pytest.raises(ValueError, match="cluster_ids"):
            ops.cpu_sparse_ffn(
                GOOD_X, GOOD_W, GOOD_W, GOOD_W, torch.zeros(4, 7, dtype=torch.uint8), bad, "silu"
            )
    with pytest.raises(ValueError, match="bias has size 3"):
        ops.cpu_linear(GOOD_X, GOOD_W, torch.ones(3))
    with pytest.raises(ValueError, match="weight has size 24"):
        ops.cpu_linear(torch.ones(3, 23), GOOD_W, None)
    with pytest.raises(ValueError, match="data does not have dtype int64"):
        ops.cpu_read(torch.ones(3))
    with pytest.raises(NotImplementedError):
        ops.cpu_linear(GOOD_X.to_sparse(), GOOD_W, None)
    misaligned = torch.frombuffer(bytearray(50 * 24 * 4 + 1), dtype=torch.float32, offset=1)
    with pytest.raises(ValueError, match="weight begins at an address"):
        ops.cpu_linear(GOOD_X, misaligned.view(50, 24), None)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
def test_one_openmp_runtime_and_its_threads():
    """The kernels run on torch's own pool, and on as many threads as torch was told to use."""
    program = textwrap.dedent(
        f"""
        import os, re, torch
        torch.set_num_threads(1)
        torch.ops.load_library({str(LIBRARY)!r})
        w = torch.arange(2000 * 50).remainder_(3).sub_(1).float().view(2000, 50)
        data = torch.ones(100_000, dtype=torch.int64)
        results = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            before = len(os.listdir("/proc/self/task"))
            y = torch.ops.sparse_runtime.cpu_dense_ffn(w[:1], w, w, w, "relu")
            torch.ops.sparse_runtime.cpu_read(data)
            print(len(os.listdir("/proc/self/task")) - before)
            results.add(tuple(y[0].tolist()))
            assert y.count_nonzero()
        print(len(results))
        maps = open("/proc/self/maps").read()
        print(len(set(re.findall(r"\\S*/lib(?:g|i)?omp\\d*[^/\\s]*\\.so\\S*", maps))))
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    *started_threads, different_results, runtimes = map(int, result.stdout.split())
    assert runtimes == 1
    # One thread: none started. Two: one more. Three: again one more than the pool has.
    assert started_threads == [0, 1, 1]
    assert different_results == 1


def test_weights_not_yet_loaded_are_refused():
    """A meta tensor sends the call to the fakes, whose result is uninitialized memory."""
    x, weights, *_ = case(2, 8, 4, 1, torch.float32)
    with pytest.raises(ValueError, match="found cpu and meta"):
        ops.cpu_dense_ffn(x, *weights[:2], weights[2].to("meta"), "silu")
    with pytest.raises(ValueError, match="found cpu and meta"):
        ops.cpu_linear(x, weights[0].to("meta"), None)
    assert ops.cpu_linear(x.to("meta"), weights[0].to("meta"), None).is_meta
