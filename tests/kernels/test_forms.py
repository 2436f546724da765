"""FFNs with biases, or without a gate, on every backend and instruction set."""

import pytest
import torch
from kernels.cases import ACCUMULATION, TOLERANCE, assert_close
from kernels.library import EVERY_BACKEND, every_backend, ops, placed

from sparse_runtime.kernels.bitmaps import pack_bits
from sparse_runtime.kernels.looks import look_records
from sparse_runtime.kernels.op import dense_ffn, routed_ffn, sparse_ffn
from sparse_runtime.kernels.operands import (
    ClusterTables,
    Compensation,
    Counters,
    FFNWeights,
    RouterWeights,
)
from sparse_runtime.kernels.planes import LOOK_FORMAT, unpack_look
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS

CLUSTERS = 3
#: Gated or not, biased before the activation or not.
FORMS = [(True, True), (False, True), (False, False)]
FORM_NAMES = ["gated-biased", "plain-biased", "plain"]


@pytest.fixture(params=EVERY_BACKEND)
def backend(request):
    with every_backend(request.param) as name:
        yield name


class FFN:
    """Random weights, and what they compute in float64."""

    def __init__(self, form, activation, dtype, *, hidden=70, neurons=131, seed=0):
        g = torch.Generator().manual_seed(seed)
        gated, biased = form

        def random(*shape, scale=1.0):
            return torch.randn(shape, generator=g) * scale

        gate, up, down = (random(neurons, hidden, scale=hidden**-0.5).to(dtype) for _ in range(3))
        gate_bias, up_bias = random(neurons), random(neurons)
        up = up if gated else None
        self.weights = FFNWeights(
            gate, up, down, activation, look_records(gate, up),
            gate_bias if biased else None, up_bias if biased and gated else None,
        )  # fmt: skip
        self.generator, self.random = g, random

    def h(self, x, gate, up):
        w = self.weights
        gates = x.double() @ gate.double().t()
        if w.gate_bias is not None:
            gates += w.gate_bias.double()
        h = ACTIVATION_FUNCTIONS[w.activation](gates)
        if up is not None:
            ups = x.double() @ up.double().t()
            h = h * (ups if w.up_bias is None else ups + w.up_bias.double())
        return h

    def exact(self, x, chosen):
        return (
            self.h(x, self.weights.gate, self.weights.up) * chosen
        ) @ self.weights.down_t.double()

    def looked(self, x):
        return self.h(x, *unpack_look(self.weights.look, LOOK_FORMAT, x.shape[1])).abs()


def factors_apart(values, generator):
    """Factors [I] by which no |h̃| [n, I] comes near its threshold."""
    most = values.max(0).values + 1e-6
    shares = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.5])
    distances = (values[:, None] - most * shares[:, None]).abs().amin(0) / most
    distances += 0.5 * torch.rand(distances.shape, generator=generator) * (distances > 0.03)
    return (1 / (most * shares[distances.argmax(0)])).float()


def run(backend, x, weights, tables, ids, counts):
    """By given clusters."""
    w = weights
    if backend == "cpu":
        maybe = tables.maybe_sets is not None
        return ops.cpu_sparse_ffn(
            x, w.gate, w.up, w.down_t, tables.active_sets, ids, w.activation, tables.maybe_sets,
            w.look if maybe else None, tables.factors, counts, None, w.gate_bias, w.up_bias,
        )  # fmt: skip
    gate, up, down, look, gate_bias, up_bias = placed(
        backend, w.gate, w.up, w.down_t, w.look, w.gate_bias, w.up_bias
    )
    weights = FFNWeights(gate, up, down, w.activation, look, gate_bias, up_bias)
    tables = ClusterTables(
        *placed(backend, tables.active_sets, tables.maybe_sets, tables.factors, None)
    )
    x, ids, there = placed(backend, x, ids, counts)
    output = sparse_ffn(x, weights, tables, ids, row_counts=there, backend=backend)
    counts.copy_(there)
    return output


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize(
    ("n", "dtype", "activation"),
    [(1, torch.bfloat16, "gelu"), (5, torch.float32, "relu2"), (3, torch.float32, "silu"),
     (1, torch.float32, "relu"), (9, torch.float16, "gelu_tanh")],
)  # fmt: skip
@pytest.mark.parametrize("looks", [False, True], ids=["", "looks"])
def test_biases_and_no_gate(backend, form, n, dtype, activation, looks):
    ffn = FFN(form, activation, dtype)
    x = ffn.random(n, 70).to(dtype)
    ids = torch.arange(n) % CLUSTERS
    sure, maybe = (torch.rand(CLUSTERS, 131, generator=ffn.generator) < p for p in (0.4, 0.6))
    tables, chosen = ClusterTables(pack_bits(sure)), sure[ids]
    if looks:
        values = ffn.looked(x)
        factors = factors_apart(values, ffn.generator)
        tables = ClusterTables(pack_bits(sure), pack_bits(maybe), factors)
        chosen = chosen | (maybe[ids] & ~sure[ids] & (values * factors > 1))
    counts = torch.zeros(2, dtype=torch.int64)
    output = run(backend, x, ffn.weights, tables, ids, counts)
    exact = ffn.exact(x, chosen)
    # Triton's interpreter cuts bfloat16 off; the reference and batches round activations, too.
    rounding = TOLERANCE[dtype] * (1 if backend == "cpu" else 2)
    assert_close(output, exact, rounding + ACCUMULATION)
    assert int(counts[0]) == int(chosen.sum())
    whole = ffn.exact(x, torch.ones(n, 131))
    assert (whole - exact).abs().max() > 10 * rounding * exact.abs().max()


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
def test_all_rows_and_routing(backend, form):
    """The dense call of the CPU kernels, and the fused one."""
    ffn = FFN(form, "gelu", torch.float32, hidden=33, neurons=50)
    x = ffn.random(2, 33)
    if backend == "cpu":
        assert_close(dense_ffn(x, ffn.weights), ffn.exact(x, torch.ones(2, 50)), 2 * ACCUMULATION)
    up, bias = ffn.random(CLUSTERS, 33), ffn.random(CLUSTERS)
    cluster_bias = ffn.random(CLUSTERS, 33)
    sure = torch.rand(CLUSTERS, 50, generator=ffn.generator) < 0.5
    ids = (x @ up.t() + bias).argmax(-1)
    w = ffn.weights
    gate, w_up, down, gate_bias, up_bias = placed(
        backend, w.gate, w.up, w.down_t, w.gate_bias, w.up_bias
    )
    weights = FFNWeights(gate, w_up, down, w.activation, None, gate_bias, up_bias)
    programs = None
    if backend == "triton":
        from sparse_runtime.kernels.triton.ffn import num_counters

        programs = torch.zeros(num_counters(33), dtype=torch.int32)
    x_there, sets, up, bias, added, counts, rows, programs = placed(
        backend, x, pack_bits(sure), up, bias, cluster_bias,
        torch.zeros(CLUSTERS, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), programs,
    )  # fmt: skip
    output = routed_ffn(
        x_there, weights, ClusterTables(sets), RouterWeights(up, bias), Compensation(added),
        Counters(counts, rows, programs), backend=backend,
    )  # fmt: skip
    assert_close(output, ffn.exact(x, sure[ids]) + cluster_bias[ids].double(), 4 * ACCUMULATION)
