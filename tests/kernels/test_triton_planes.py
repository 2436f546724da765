"""The Triton kernels over planes against the reference, on a GPU or by Triton's interpreter."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from kernels.cases import ACCUMULATION
from kernels.cases import assert_close as assert_within
from kernels.covering import covering, name_of

from sparse_runtime.cost import num_groups
from sparse_runtime.kernels.bitmaps import pack_bits
from sparse_runtime.kernels.operands import Stages
from sparse_runtime.kernels.plane_reference import plane_ffn_reference
from sparse_runtime.kernels.planes import (
    NeuronPlanes,
    PlaneFormat,
    Rounded,
    linear_parts,
    pack_linear,
    pack_neurons,
)
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
plane_ffn = pytest.importorskip("sparse_runtime.kernels.triton.plane_ffn")
triton_ffn = pytest.importorskip("sparse_runtime.kernels.triton.ffn")
if DEVICE == "cpu" and not triton_ffn.INTERPRETED:
    pytest.skip("no GPU, and TRITON_INTERPRET was not set", allow_module_level=True)

FORMATS = [PlaneFormat(*bits) for bits in ((3, 0), (4, 0), (3, 2), (3, 3), (4, 2), (4, 4))]
# Hidden size and neurons: rows whose last unit has 1 to 4 groups, or is the only one.
SHAPES = [(33, 9), (64, 40), (128, 67), (192, 70), (200, 77), (320, 33), (576, 48), (1, 1)]
# The outputs are rounded once; the interpreter cuts bfloat16 off instead.
ROUNDING = {
    torch.float32: 0,
    torch.bfloat16: 2**-7 if DEVICE == "cpu" else 2**-8,
    torch.float16: 2**-11,
}


# Matrix units of a GPU, which several tokens of 16 bits go through, cut activations off to tf32.
TF32 = 0 if DEVICE == "cpu" else 2**-10


def assert_close(actual, expected, dtype):
    """The reference sums in float32, too."""
    assert actual.dtype == dtype
    tolerance = 2 * ACCUMULATION + ROUNDING[dtype] + (0 if dtype == torch.float32 else TF32)
    assert_within(actual, expected, tolerance, expected.abs().max().clamp_min(1e-9))


def moved(*tensors):
    return [tensor.to(DEVICE) if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]


def rounded(rows, size, form, generator):
    """Random codes, those at the ends of the range too, and scales that differ much."""

    def codes(bits):
        half = 2**bits // 2
        return torch.randint(-half, half, (rows, size), generator=generator).to(torch.int8)

    lo = codes(form.residual) if form.residual else torch.zeros(rows, size, dtype=torch.int8)
    spread = 0.25 + torch.rand(rows, num_groups(size), generator=generator)
    scales = (spread * 2 ** (1 - form.base) * size**-0.5).bfloat16()
    return Rounded(codes(form.base), lo, scales, form)


def looks(x, planes):
    """|h̃| of all neurons [n, I] float64."""
    gate, up, _ = (rows.values(base=True).double() for rows in planes.rounded())
    wide = x.double()
    function = ACTIVATION_FUNCTIONS[planes.activation]
    return (function(wide @ gate.t()) * (wide @ up.t())).abs()


def safe_factors(x, planes, tau, generator):
    """Factors that put neurons on both sides of the thresholds, and none within a thousandth."""
    look = looks(x, planes)
    thresholds = torch.tensor([1.0, tau if tau < math.inf else 1.0], dtype=torch.float64)
    tries = torch.empty(200, look.shape[1], dtype=torch.float64)
    tries = tries.uniform_(-1, 2.5, generator=generator).exp() / look.mean(0).clamp_min(1e-6)
    tries = tries.float().double()
    margins = (look * tries[:, None])[..., None] - thresholds
    fits = (margins.abs() > 1e-3).all(-1).all(1)
    assert fits.any(0).all()
    return tries.gather(0, fits.long().argmax(0)[None])[0].float()


@dataclass
class Case:
    """Inputs of one call; masks of candidates are bool [K, I]."""

    x: torch.Tensor
    planes: NeuronPlanes
    candidates: torch.Tensor
    ids: torch.Tensor
    stages: Stages | None

    def expected(self, candidates=None):
        """Outputs in float32, and neurons counted, looked at and refined."""
        counts = torch.zeros(3, dtype=torch.int64)
        y = plane_ffn_reference(self.x.float(), self.planes, candidates, self.stages, counts)
        return y, counts.tolist()

    def run(self, **options):
        """Outputs, counts and how often each cluster came, by the operation on the device."""
        planes, stages = self.planes, self.stages
        given = {
            "sets": pack_bits(self.candidates),
            "cluster_ids": self.ids,
            "router": (None, None, None),
            "bias": None,
            "correction": (None, None),
        } | options
        clusters = torch.zeros(len(self.candidates), dtype=torch.int64)
        counts = torch.zeros(3, dtype=torch.int64)
        counters = torch.zeros(triton_ffn.num_counters(planes.hidden_size), dtype=torch.int32)
        arguments = moved(
            self.x, planes.look, planes.count, planes.refine, planes.format.base,
            planes.format.residual, planes.activation, given["sets"], given["cluster_ids"],
            *given["router"], stages and stages.factors, stages.tau if stages else 1.0,
            stages.width if stages else 0.0, given["bias"], clusters, counts,
            *given["correction"], counters,
        )  # fmt: skip
        y = torch.ops.sparse_runtime.triton_plane_ffn(*arguments)
        assert not arguments[-1].any()  # ready for the next call
        self.arguments = arguments
        return y, arguments[17].tolist(), arguments[16].tolist()


def case(n, shape, form, *, dtype=torch.float32, activation="silu", stages=(2.0, 0.0), density=0.5):
    size, neurons = shape
    generator = torch.Generator().manual_seed(n + size)
    rows = [rounded(neurons, size, form, generator) for _ in range(3)]
    planes = pack_neurons(*rows, activation)
    x = torch.randn(n, size, generator=generator).to(dtype)
    candidates = torch.rand(3, neurons, generator=generator) < density
    ids = torch.randint(3, (n,), generator=generator)
    if stages is not None:
        stages = Stages(safe_factors(x, planes, stages[0], generator), *stages)
    return Case(x, planes, candidates, ids, stages)


@pytest.mark.parametrize(
    "row",
    covering(
        2,
        n=[1, 2, 5, 17],
        shape=SHAPES,
        form=FORMATS,
        dtype=list(ROUNDING),
        activation=list(ACTIVATION_FUNCTIONS),
        stages=[None, (math.inf, 0.0), (1.0, 0.0), (1.0, 0.5), (3.0, 0.0), (3.0, 0.5)],
        density=[0.0, 0.5, 1.0],
    ),
    ids=name_of,
)
def test_given_clusters(row):
    given = case(**row)
    expected, numbers = given.expected(given.candidates[given.ids])
    y, counts, clusters = given.run()
    assert counts == numbers
    assert clusters == torch.bincount(given.ids, minlength=3).tolist()
    assert_close(y, expected, row["dtype"])
    assert y.any() == expected.any()


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("n", [1, 6, 20])
def test_all_neurons(n, form):
    given = case(n, (136, 53), form, stages=None)
    expected, _ = given.expected()
    planes = given.planes
    arguments = moved(
        given.x, planes.look, planes.count, planes.refine, form.base, form.residual, "silu"
    )
    y = torch.ops.sparse_runtime.triton_dense_plane_ffn(*arguments)
    assert_close(y, expected, torch.float32)


def test_some_of_each_kind():
    """The cases do skip, count and refine."""
    for n in (1, 5):
        given = case(n, (200, 77), PlaneFormat(3, 2))
        _, (counted, looked, refined) = given.expected(given.candidates[given.ids])
        assert 0 < refined < counted < looked < 77 * n


@pytest.mark.parametrize("tau", [2.0, math.inf])
@pytest.mark.parametrize("n", [1, 3])
def test_what_is_not_a_number_is_refined(n, tau):
    given = case(n, (70, 45), PlaneFormat(3, 2), stages=(tau, 0.5))
    given.x[0, 3] = math.nan
    given.x[1:2] *= 1e-12  # and what is almost nothing is skipped
    expected, numbers = given.expected(given.candidates[given.ids])
    y, counts, _ = given.run()
    assert counts == numbers
    assert y[0].isnan().all()
    assert expected[0].isnan().all()
    if n > 1:
        assert not y[1].any()
        assert_close(y[1:], expected[1:], torch.float32)


@pytest.mark.parametrize(
    "row",
    covering(2, n=[1, 4], rank=[None, 6], bias=[False, True], correction=[False, True]),
    ids=name_of,
)
def test_routed(row):
    n, rank = row["n"], row["rank"]
    given = case(n, (70, 61), PlaneFormat(4, 2), stages=(2.0, 0.5))
    generator = torch.Generator().manual_seed(7)

    def random(*shape):
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    down = None if rank is None else random(rank, 70)
    router = (down, random(3, rank or 70), random(3))
    bias = random(3, 70) if row["bias"] else None
    correction = (random(4, 70), random(4, 70)) if row["correction"] else (None, None)
    low = given.x.double() if rank is None else given.x.double() @ router[0].double().t()
    given.ids = (low @ router[1].double().t() + router[2].double()).argmax(-1)
    expected, numbers = given.expected(given.candidates[given.ids])
    expected = expected.double()
    if bias is not None:
        expected = expected + bias[given.ids]
    if row["correction"]:
        expected = expected + given.x.double() @ correction[0].double().t() @ correction[1].double()
    extras = {"bias": bias, "correction": correction}
    y, counts, clusters = given.run(cluster_ids=None, router=router, **extras)
    assert_close(y, expected, torch.float32)
    assert counts == numbers
    assert clusters == torch.bincount(given.ids, minlength=3).tolist()
    # The same sums once more, and counts go on.
    assert torch.equal(torch.ops.sparse_runtime.triton_plane_ffn(*given.arguments), y)
    assert given.arguments[17].tolist() == [2 * number for number in numbers]
    # The same clusters, given.
    y, counts, clusters = given.run(**extras)
    assert_close(y, expected, torch.float32)
    assert counts == numbers
    assert sum(clusters) == n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_go_in_parts(dtype):
    given = case(70, (24, 20), PlaneFormat(3, 2), dtype=dtype, stages=(1.5, 0.5))
    expected, numbers = given.expected(given.candidates[given.ids])
    y, counts, clusters = given.run()
    assert_close(y, expected, dtype)
    assert counts == numbers
    assert clusters == torch.bincount(given.ids, minlength=3).tolist()


def test_no_tokens():
    given = case(2, (70, 45), PlaneFormat(4, 2))
    given.x, given.ids = given.x[:0], given.ids[:0]
    y, counts, clusters = given.run()
    assert y.shape == (0, 70)
    assert not any(counts + clusters)


@pytest.mark.parametrize(
    "row",
    covering(
        2,
        n=[1, 2, 17],
        shape=[(33, 9), (64, 40), (130, 67), (200, 5), (320, 33), (576, 48), (1024, 21)],
        form=FORMATS,
        dtype=list(ROUNDING),
        bias=[False, True],
    ),
    ids=name_of,
)
def test_linear(row):
    n, (size, rows), form, dtype = row["n"], row["shape"], row["form"], row["dtype"]
    generator = torch.Generator().manual_seed(n)
    weight = rounded(rows, size, form, generator)
    x = torch.randn(n, size, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if row["bias"] else None
    expected = F.linear(
        x.double(), weight.values().double(), bias if bias is None else bias.double()
    )
    arguments = moved(x, pack_linear(weight), form.base, form.residual, bias)
    y = torch.ops.sparse_runtime.triton_plane_linear(*arguments)
    assert_close(y, expected, dtype)


def test_linear_of_many_tokens():
    weight = rounded(5, 40, PlaneFormat(3, 2), torch.Generator().manual_seed(0))
    x = torch.randn(33, 40, generator=torch.Generator().manual_seed(1))
    operation = torch.ops.sparse_runtime.triton_plane_linear
    y = operation(*moved(x, pack_linear(weight), 3, 2, None))
    assert_close(y, F.linear(x, weight.values()), torch.float32)
    assert operation(*moved(x[:0], pack_linear(weight), 3, 2, None)).shape == (0, 5)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("size", [33, 130, 256, 448, 1100])
def test_values_are_those_of_the_codes(form, size):
    """To the last bit: also of rows that lie apart."""
    rows = rounded(9, size, form, torch.Generator().manual_seed(3))
    parts = linear_parts(pack_linear(rows).to(DEVICE), form, size)
    for dtype in ROUNDING:
        y = torch.ops.sparse_runtime.triton_plane_values(
            *parts, form.base, form.residual, size, torch.empty(0, dtype=dtype, device=DEVICE)
        )
        expected = rows.values().to(dtype)
        if DEVICE == "cpu" and dtype == torch.bfloat16:  # which the interpreter cuts off
            expected = (rows.values().view(torch.int32) & -(2**16)).view(torch.float32).to(dtype)
        assert torch.equal(y.cpu(), expected)


def test_no_rows():
    rows = rounded(4, 70, PlaneFormat(4), torch.Generator().manual_seed(3))
    parts = linear_parts(pack_linear(rows)[:0].to(DEVICE), PlaneFormat(4), 70)
    like = torch.empty(0, device=DEVICE)
    operation = torch.ops.sparse_runtime.triton_plane_values
    assert operation(*parts, 4, 0, 70, like).shape == (0, 70)


def test_streams_need_not_be_contiguous():
    given = case(1, (128, 24), PlaneFormat(4, 2))
    y, counts, _ = given.run()

    def spread(stream):
        return torch.cat([stream, stream.new_zeros(len(stream), 6)], 1)[:, : stream.shape[1]]

    p = given.planes
    streams = (spread(p.look), spread(p.count), spread(p.refine))
    given.planes = NeuronPlanes(*streams, p.format, p.hidden_size, p.activation)
    apart, apart_counts, _ = given.run()
    assert torch.equal(apart, y)
    assert apart_counts == counts


def test_registration():
    """What is changed is declared, and outputs without data have the right shape."""
    given = case(2, (40, 20), PlaneFormat(3, 2))
    given.run()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(plane_ffn.triton_plane_ffn, given.arguments, test_utils=checks)
    weight = rounded(5, 40, PlaneFormat(3, 2), torch.Generator().manual_seed(0))
    records = pack_linear(weight)
    arguments = moved(given.x, records, 3, 2, None)
    torch.library.opcheck(plane_ffn.triton_plane_linear, arguments, test_utils=checks)
    torch.library.opcheck(plane_ffn.triton_dense_plane_ffn, given.arguments[:7], test_utils=checks)
    parts = linear_parts(records, PlaneFormat(3, 2), 40)
    arguments = moved(*parts, 3, 2, 40, torch.empty(0))
    torch.library.opcheck(plane_ffn.triton_plane_values, arguments, test_utils=checks)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("n", [1, 4])
def test_one_graph_serves_every_token(n):
    """A captured call follows what changes after the capture."""
    given = case(n, (200, 131), PlaneFormat(3, 2), dtype=torch.bfloat16)
    given.run()
    call = given.arguments
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.sparse_runtime.triton_plane_ffn(*call)
    numbers = set()
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        call[0].copy_(torch.randn(call[0].shape, generator=generator))
        call[8].copy_(torch.randint(3, (n,), generator=generator))
        before = call[17].clone()
        graph.replay()
        numbers.add(tuple((call[17] - before).tolist()))
        replayed = captured.clone()
        assert torch.equal(replayed, torch.ops.sparse_runtime.triton_plane_ffn(*call))
    assert len(numbers) > 1
