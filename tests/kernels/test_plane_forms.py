"""FFNs in planes with biases, or without a gate, on every backend and instruction set."""

import math

import pytest
import torch
from kernels.library import EVERY_BACKEND, every_backend, ops, placed
from kernels.test_forms import FORM_NAMES, FORMS
from kernels.test_plane_kernels import TOLERANCE, distance, rounded

from sparse_runtime.kernels.bitmaps import pack_bits
from sparse_runtime.kernels.operands import (
    ClusterTables,
    Compensation,
    Counters,
    RouterWeights,
    Stages,
)
from sparse_runtime.kernels.plane_op import dense_plane_ffn, routed_plane_ffn
from sparse_runtime.kernels.planes import NeuronPlanes, PlaneFormat, pack_neurons
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS

HIDDEN, NEURONS, CLUSTERS = 200, 77, 3


@pytest.fixture(params=EVERY_BACKEND)
def backend(request):
    with every_backend(request.param) as name:
        yield name


class FFN:
    """Random codes, and what they compute in float64."""

    def __init__(self, form, bits, activation):
        self.generator = torch.Generator().manual_seed(sum(bits))
        gated, biased = form
        planes = PlaneFormat(*bits)
        scale = 2.0 ** (2 - planes.base) / math.sqrt(HIDDEN)
        parts = [rounded(planes, NEURONS, HIDDEN, scale, self.generator) for _ in range(3)]
        self.gate, self.up, self.down = parts if gated else (parts[0], None, parts[2])
        packed = pack_neurons(self.gate, self.up, self.down, activation)
        biases = [self.random(NEURONS) if given else None for given in (biased, biased and gated)]
        streams = (packed.look, packed.count, packed.refine)
        self.planes = NeuronPlanes(*streams, planes, HIDDEN, activation, *biases)

    def random(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def h(self, x, base):
        gate_bias, up_bias = (
            0 if bias is None else bias.double()
            for bias in (self.planes.gate_bias, self.planes.up_bias)
        )
        gates = x.double() @ self.gate.values(base=base).double().t() + gate_bias
        h = ACTIVATION_FUNCTIONS[self.planes.activation](gates)
        if self.up is None:
            return h
        return h * (x.double() @ self.up.values(base=base).double().t() + up_bias)

    def staged(self, x, candidates, stages):
        """Outputs, and neurons counted, looked at and refined, with a ramp of no width."""
        look, full = self.h(x, base=True), self.h(x, base=False)
        evidence = look.abs() * stages.factors.double()
        counted = candidates & (evidence > 1)
        refined = counted & (evidence > stages.tau)
        base, down = (self.down.values(base=which).double() for which in (True, False))
        output = (look * (counted & ~refined)) @ base + (full * refined) @ down
        return output, [int(mask.sum()) for mask in (counted, candidates, refined)]

    def factors_apart(self, x, tau):
        """Factors [I] by which no neuron comes near a threshold; zero where there are none."""
        look = self.h(x, base=True).abs()
        shares = torch.tensor([0.15, 0.3, 0.55, 1.3])
        tries = 1 / (shares[:, None] * look.max(0).values.clamp_min(1e-6))
        evidence = look * tries[:, None]
        far = ((evidence - 1).abs() > 0.02) & ((evidence / tau - 1).abs() > 0.02)
        wishes = torch.rand(tries.shape, generator=self.generator) * far.all(1)
        best = wishes.max(0)
        return torch.where(best.values > 0, tries.gather(0, best.indices[None])[0], 0).float()

    def on(self, backend):
        p = self.planes
        tensors = placed(backend, p.look, p.count, p.refine, p.gate_bias, p.up_bias)
        return NeuronPlanes(*tensors[:3], p.format, HIDDEN, p.activation, *tensors[3:])


CASES = [
    (1, torch.bfloat16, (4, 2), "gelu_tanh"), (5, torch.float32, (3, 2), "relu2"),
    (3, torch.float16, (4, 0), "silu"), (2, torch.float32, (4, 4), "gelu"),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize(("n", "dtype", "bits", "activation"), CASES)
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_reads_as_far_as_it_matters(backend, form, n, dtype, bits, activation, tau):
    ffn = FFN(form, bits, activation)
    x = ffn.random(n, HIDDEN).to(dtype)
    candidates = torch.rand(CLUSTERS, NEURONS, generator=ffn.generator) < 0.8
    stages = Stages(ffn.factors_apart(x, tau), tau)
    ids = torch.arange(n) % CLUSTERS
    expected, counts = ffn.staged(x, candidates[ids], stages)
    bias = ffn.random(CLUSTERS, HIDDEN).to(dtype)
    programs = None
    if backend == "triton":
        from sparse_runtime.kernels.triton.ffn import num_counters

        programs = torch.zeros(num_counters(HIDDEN), dtype=torch.int32)
    there, sets, factors, bias_there, clusters, rows, programs, ids_there, up, zero = placed(
        backend, x, pack_bits(candidates), stages.factors, bias,
        torch.zeros(CLUSTERS, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), programs, ids,
        torch.zeros(CLUSTERS, HIDDEN, dtype=dtype), torch.zeros(CLUSTERS, dtype=dtype),
    )  # fmt: skip
    found = routed_plane_ffn(
        there, ffn.on(backend), ClusterTables(sets), Stages(factors, tau), RouterWeights(up, zero),
        Compensation(bias_there), Counters(clusters, rows, programs), backend=backend,
        cluster_ids=ids_there,
    )  # fmt: skip
    assert rows.tolist() == counts
    assert counts[0] > counts[2] > 0 or tau == 1.0
    assert distance(found.cpu(), expected + bias[ids].double()) < TOLERANCE[dtype]
    # What is tested is far beyond that.
    assert expected.abs().max() > 0.1 * bias.abs().max()


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("bits", [(4, 2), (3, 0)])
@pytest.mark.parametrize("n", [1, 6, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_rows(backend, form, bits, n, dtype, monkeypatch):
    """By the kernels, and, of many tokens, by values unpacked a block of rows at a time."""
    monkeypatch.setattr(
        "sparse_runtime.kernels.plane_op._BLOCK_ROWS",
        dict.fromkeys(("cpu", "triton", "reference"), 32),
    )
    ffn = FFN(form, bits, "gelu")
    x = ffn.random(n, HIDDEN).to(dtype)
    expected = ffn.h(x, base=False) @ ffn.down.values().double()
    found = dense_plane_ffn(placed(backend, x)[0], ffn.on(backend), backend=backend)
    assert found.dtype == dtype
    assert distance(found.cpu(), expected) < TOLERANCE[dtype]
    if ffn.planes.gate_bias is not None:
        ffn.planes.gate_bias.zero_()
        without = ffn.h(x, base=False) @ ffn.down.values().double()
        assert distance(without, expected) > 5 * TOLERANCE[dtype]


@pytest.mark.parametrize("gated", [True, False])
def test_records_of_a_neuron(gated):
    """Sizes, parts and values come back, whole and by rows; up is None without a gate."""
    ffn = FFN((gated, False), (3, 2), "silu")
    planes, form = ffn.planes, PlaneFormat(3, 2)
    matrices = 2 if gated else 1
    assert planes.matrices == matrices
    # 4 groups of 3 bits and a scale; of 2 bits.
    assert planes.look.shape[1] == form.look_size(HIDDEN, matrices) == matrices * 104
    assert planes.count.shape[1] == form.count_size(HIDDEN) == 104
    assert planes.refine.shape[1] == form.refine_size(HIDDEN, matrices) == (matrices + 1) * 64
    for rows in (slice(None), slice(5, 20)):
        for found, part in zip(planes.rounded(rows), (ffn.gate, ffn.up, ffn.down), strict=True):
            if part is None:
                assert found is None
                continue
            assert torch.equal(found.hi, part.hi[rows])
            assert torch.equal(found.lo, part.lo[rows])
            assert torch.equal(found.scales, part.scales[rows])


def test_says_which_bias_is_wrong():
    planes = FFN((False, True), (4, 2), "silu").planes
    x = torch.randn(1, HIDDEN)

    def call(**biases):
        given = {"gate_bias": planes.gate_bias, "up_bias": None} | biases
        streams = (planes.look, planes.count, planes.refine)
        return ops.cpu_plane_ffn(
            x, *streams, 4, 2, "silu", None, None, None, None, None, None, 1.0, 0.0, None, None, None,
            None, None, None, *given.values(),
        )  # fmt: skip

    assert call().shape == (1, HIDDEN)
    with pytest.raises(ValueError, match=r"gate_bias.*76"):
        call(gate_bias=torch.zeros(76))
    with pytest.raises(ValueError, match=r"gate_bias.*float32"):
        call(gate_bias=torch.zeros(NEURONS, dtype=torch.float64))
    with pytest.raises(ValueError, match="up_bias"):
        call(up_bias=torch.zeros(NEURONS))
