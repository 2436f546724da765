"""The C++ kernels over weights in planes against the reference, in every instruction set there is."""

import math

import pytest
import torch
from kernels.covering import covering, name_of
from kernels.library import ISAS, forced, ops

from sparse_runtime.kernels.bitmaps import pack_bits
from sparse_runtime.kernels.operands import (
    ClusterTables,
    Compensation,
    Counters,
    RouterWeights,
    Stages,
)
from sparse_runtime.kernels.plane_op import (
    MAX_KERNEL_TOKENS,
    dense_plane_ffn,
    plane_linear,
    routed_plane_ffn,
)
from sparse_runtime.kernels.plane_reference import plane_ffn_reference, ramp
from sparse_runtime.kernels.planes import (
    NeuronPlanes,
    PlaneFormat,
    Rounded,
    pack_linear,
    pack_neurons,
)

FORMATS = [(3, 0), (4, 0), (3, 2), (3, 3), (4, 2), (4, 3), (4, 4), (3, 4)]
#: H and I: last units of 1 to 4 groups, groups that are not full, more than 16 groups, one neuron.
SHAPES = [(64, 40), (200, 33), (320, 50), (448, 64), (576, 77), (1, 5), (1088, 20), (256, 1)]
TOKENS = [1, 2, 3, 5, 64, 66]
#: Tokens are rounded to 2^-14 of the largest of 64, h·S to as much of the largest of 32 rows.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def rounded(form, rows, size, scale, generator):
    def codes(bits):
        if bits == 0:
            return torch.zeros(rows, size, dtype=torch.int8)
        most = 2 ** (bits - 1)
        return torch.randint(-most, most, (rows, size), generator=generator, dtype=torch.int8)

    scales = (torch.rand(rows, -(-size // 64), generator=generator) + 0.5) * scale
    scales *= torch.where(torch.rand(scales.shape, generator=generator) < 0.5, -1, 1)
    return Rounded(codes(form.base), codes(form.residual), scales.to(torch.bfloat16), form)


def neurons(base, residual, shape, generator, activation="silu"):
    form = PlaneFormat(base, residual)
    size, count = shape
    scale = 2.0 ** (1 - form.base) / math.sqrt(size)
    return pack_neurons(
        *(rounded(form, count, size, scale * 2, generator) for _ in range(3)), activation
    )


def tokens(n, size, dtype, generator):
    x = torch.randn(n, size, generator=generator)
    x[:, 0] *= 8  # a massive feature
    return x.to(dtype)


def distance(found, expected):
    scale = expected.float().abs().max().clamp_min(1e-20)
    return float((found.float() - expected.float()).abs().max() / scale)


def apart(planes, x, tau, generator):
    """Factors by which no neuron is within a thousandth of a threshold."""
    gate, up, _ = planes.rounded()
    wide = x.float()
    looks = torch.nn.functional.silu(wide @ gate.values(base=True).T)
    looks = (looks * (wide @ up.values(base=True).T)).abs()
    for _ in range(300):
        factors = (
            8 * torch.rand(looks.shape[1], generator=generator) / looks.mean(0).clamp_min(1e-9)
        )
        evidence = looks * factors
        close = ((evidence - 1).abs() < 1e-3) | ((evidence / tau - 1).abs() < 1e-3)
        if not close.any():
            return factors
        # Only the neurons that are close draw again.
        keep = ~close.any(0)
        kept = factors if keep.all() else torch.where(keep, factors, 0.0)
        if x.shape[0] > 5:  # many tokens: neurons without a safe factor are skipped by all
            return kept
    raise AssertionError("no factors found")


@pytest.mark.parametrize(
    "row",
    covering(
        2,
        isa=ISAS,
        form=FORMATS,
        shape=SHAPES,
        n=TOKENS,
        dtype=list(TOLERANCE),
        tau=[1.0, 3.0, math.inf],
        width=[0.0, 0.5],
    ),
    ids=name_of,
)
def test_reads_as_far_as_the_reference(row):
    g = torch.Generator().manual_seed(0)
    planes = neurons(*row["form"], row["shape"], g)
    size, count = row["shape"]
    x = tokens(row["n"], size, row["dtype"], g)
    candidates = torch.rand(3, count, generator=g) < 0.7
    ids = torch.randint(3, (row["n"],), generator=g)
    stages = Stages(apart(planes, x, row["tau"], g), row["tau"], row["width"])
    expected_counts = torch.zeros(3, dtype=torch.int64)
    expected = plane_ffn_reference(x, planes, candidates[ids], stages, expected_counts)
    counters = Counters(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    with forced(row["isa"]):
        found = routed_plane_ffn(
            x,
            planes,
            ClusterTables(pack_bits(candidates)),
            stages,
            RouterWeights(torch.zeros(3, size, dtype=x.dtype), torch.zeros(3, dtype=x.dtype)),
            Compensation(),
            counters,
            backend="cpu",
            cluster_ids=ids,
        )
    assert counters.rows.tolist() == expected_counts.tolist()
    assert counters.clusters.tolist() == ids.bincount(minlength=3).tolist()
    assert distance(found, expected) < TOLERANCE[row["dtype"]]


@pytest.mark.parametrize(
    "row",
    covering(
        2,
        isa=ISAS,
        form=FORMATS,
        shape=SHAPES,
        n=[1, 2, 5, 8, 20],
        dtype=list(TOLERANCE),
        activation=["silu", "gelu", "gelu_tanh", "relu"],
    ),
    ids=name_of,
)
def test_all_rows(row):
    g = torch.Generator().manual_seed(1)
    planes = neurons(*row["form"], row["shape"], g, row["activation"])
    x = tokens(row["n"], row["shape"][0], row["dtype"], g)
    with forced(row["isa"]):
        found = dense_plane_ffn(x, planes)
    assert found.dtype == x.dtype
    assert distance(found, plane_ffn_reference(x, planes)) < TOLERANCE[row["dtype"]]


@pytest.mark.parametrize(
    "row",
    covering(
        2,
        isa=ISAS,
        form=FORMATS,
        shape=[*SHAPES, (130, 300)],
        n=[1, 4, 7, 20],
        dtype=list(TOLERANCE),
        bias=[False, True],
    ),
    ids=name_of,
)
def test_linear(row):
    g = torch.Generator().manual_seed(2)
    form = PlaneFormat(*row["form"])
    size, count = row["shape"]
    weight = rounded(form, count, size, 0.1, g)
    x = tokens(row["n"], size, row["dtype"], g)
    bias = torch.randn(count, generator=g).to(x.dtype) if row["bias"] else None
    with forced(row["isa"]):
        found = plane_linear(x, pack_linear(weight), form, bias)
    expected = x.float() @ weight.values().T + (0 if bias is None else bias.float())
    assert distance(found, expected) < TOLERANCE[row["dtype"]]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", [1, 64, 130, 256, 448, 1100])
def test_values_are_those_of_the_codes(isa, form, size):
    g = torch.Generator().manual_seed(3)
    form = PlaneFormat(*form)
    rows = rounded(form, 9, size, 0.1, g)
    records = pack_linear(rows)
    with forced(isa):
        for dtype in TOLERANCE:
            # More tokens than the kernels take have the rows unpacked; a unit matrix shows them.
            values = plane_linear(
                torch.eye(max(size, MAX_KERNEL_TOKENS["cpu"] + 1), size, dtype=dtype), records, form
            )
            assert torch.equal(values[:size], rows.values().to(dtype).T)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("full", [False, True])
def test_no_candidates_and_all_of_them(isa, full):
    g = torch.Generator().manual_seed(4)
    planes = neurons(4, 2, (192, 50), g)
    x = tokens(3, 192, torch.float32, g)
    mask = torch.full((1, 50), full)
    bias = torch.randn(1, 192, generator=g)
    with forced(isa):
        found = routed_plane_ffn(
            x,
            planes,
            ClusterTables(pack_bits(mask)),
            None,
            RouterWeights(torch.zeros(1, 192), torch.zeros(1)),
            Compensation(bias),
            Counters(torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)),
            backend="cpu",
        )
    expected = plane_ffn_reference(x, planes) if full else torch.zeros_like(x)
    assert distance(found, expected + bias) < 1e-3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(isa, value):
    g = torch.Generator().manual_seed(5)
    planes = neurons(4, 2, (192, 50), g)
    x = tokens(2, 192, torch.float32, g)
    x[0, 100] = value
    with forced(isa):
        found = dense_plane_ffn(x, planes)
    assert not found[0].isfinite().any()
    assert distance(found[1:], plane_ffn_reference(x[1:], planes)) < 1e-3


@pytest.mark.parametrize("isa", ISAS)
def test_correction_is_added(isa):
    g = torch.Generator().manual_seed(6)
    planes = neurons(3, 2, (200, 30), g)
    x = tokens(2, 200, torch.float32, g)
    down, up = torch.randn(2, 3, 200, generator=g)
    with forced(isa):
        found = routed_plane_ffn(
            x,
            planes,
            ClusterTables(pack_bits(torch.ones(1, 30, dtype=torch.bool))),
            None,
            RouterWeights(torch.zeros(1, 200), torch.zeros(1)),
            Compensation(None, down, up),
            Counters(torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)),
            backend="cpu",
        )
    assert distance(found, plane_ffn_reference(x, planes) + x @ down.T @ up) < 1e-3


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_divide_the_neurons(threads):
    g = torch.Generator().manual_seed(7)
    planes = neurons(4, 2, (512, 1000), g)
    x = tokens(1, 512, torch.float32, g)
    with forced(threads=threads):
        assert distance(dense_plane_ffn(x, planes), plane_ffn_reference(x, planes)) < 1e-3


def test_ramp():
    e = torch.tensor([1.1, 1.25, 1.5, 3.0, math.nan])
    assert ramp(e, 0.0).tolist() == [1, 1, 1, 1, 1]
    torch.testing.assert_close(ramp(e, 0.5), torch.tensor([0.2, 0.5, 1.0, 1.0, 1.0]))


class TestRefusals:
    def call(self, **changes):
        g = torch.Generator().manual_seed(8)
        planes = neurons(4, 2, (64, 8), g)
        given = {
            "x": torch.randn(1, 64),
            "look": planes.look,
            "count": planes.count,
            "refine": planes.refine,
            "base": 4,
            "residual": 2,
            "activation": "silu",
            "sets": None,
            "cluster_ids": None,
            "router_down": None,
            "router_up": None,
            "router_bias": None,
            "factors": None,
            "tau": 1.0,
            "width": 0.0,
            "cluster_bias": None,
            "cluster_counts": None,
            "row_counts": None,
            "correction_down": None,
            "correction_up": None,
        }
        return ops.cpu_plane_ffn(*(given | changes).values())

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"base": 5}, "planes of 5 . 2 bits"),
            ({"residual": 1}, "planes of 4 . 1 bits"),
            ({"residual": 3}, "refine has size"),
            ({"look": torch.zeros(8, 10, dtype=torch.uint8)}, "look has size 10"),
            ({"count": torch.zeros(7, 34, dtype=torch.uint8)}, "count has size 7"),
            ({"look": torch.zeros(8, 68)}, "look does not have dtype uint8"),
            ({"tau": 0.5}, "tau is below 1"),
            ({"tau": math.nan}, "tau is below 1"),
            ({"width": -1.0}, "width is negative"),
            ({"factors": torch.ones(7)}, "factors has size 7"),
            ({"sets": torch.zeros(2, 1, dtype=torch.uint8)}, "neither cluster_ids nor a router"),
            ({"cluster_ids": torch.zeros(1, dtype=torch.int64)}, "no sets"),
            ({"row_counts": torch.zeros(2, dtype=torch.int64)}, "row_counts has size 2"),
        ],
    )
    def test_says_what_is_wrong(self, changes, words):
        with pytest.raises(ValueError, match=words):
            self.call(**changes)

    def test_refuses_an_id_that_is_no_cluster(self):
        sets = torch.zeros(2, 1, dtype=torch.uint8)
        with pytest.raises((IndexError, RuntimeError), match="expected 0 <= id < K = 2"):
            self.call(sets=sets, cluster_ids=torch.tensor([2]))


def test_streams_need_not_be_contiguous():
    g = torch.Generator().manual_seed(9)
    planes = neurons(4, 2, (128, 24), g)

    def spread(stream):
        return torch.cat([stream, stream.new_zeros(len(stream), 6)], 1)[:, : stream.shape[1]]

    apart = NeuronPlanes(
        spread(planes.look), spread(planes.count), spread(planes.refine), planes.format, 128, "silu"
    )
    x = tokens(1, 128, torch.float32, g)
    assert torch.equal(dense_plane_ffn(x, planes), dense_plane_ffn(x, apart))
