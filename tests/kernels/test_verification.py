"""Neurons that low-bit copies confirm: the copies themselves, the reference, the C++ library."""

import math
import struct

import pytest
import torch
from kernels.cases import TOLERANCE, assert_close, case, flat_sparse_ffn

from sparse_runtime.cost import record_size
from sparse_runtime.kernels import load_cpu_library
from sparse_runtime.kernels.low_bit import dequantize_rows, quantize_rows, rounded_tokens

HAS_LIBRARY = load_cpu_library()
ops = torch.ops.sparse_runtime
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="libsparse_ffn_cpu.so is not built")
ISAS = ops.cpu_isas().split(",") if HAS_LIBRARY else []


@pytest.fixture
def isa(request):
    ops.cpu_force_isa(request.param)
    yield request.param
    ops.cpu_force_isa("")


@pytest.mark.parametrize("hidden", [1, 63, 64, 65, 200])
def test_records_hold_what_the_layout_says(hidden):
    g = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 5, hidden, generator=g)
    records = quantize_rows(gate, up)
    groups = math.ceil(hidden / 64)
    assert records.shape == (5, record_size(hidden)) == (5, 68 * groups)
    for row, weights in enumerate(zip(gate, up, strict=True)):
        record = bytes(records[row].tolist())
        for part, original in enumerate(weights):
            found = []
            for group in range(groups):
                (bits,) = struct.unpack_from(
                    "<H", record, 64 * groups + 2 * (part * groups + group)
                )
                (scale,) = struct.unpack("<f", struct.pack("<I", bits << 16))
                codes = record[32 * (part * groups + group) :][:32]
                found += [(code & 15, scale) for code in codes]
                found += [(code >> 4, scale) for code in codes]
            values = torch.tensor([(code - 8) * scale for code, scale in found])
            assert torch.equal(values[:hidden], dequantize_rows(records, hidden)[part][row])
            assert not values[hidden:].any()
            # Half a step, or the part of the side with seven codes that is cut off.
            steps = torch.tensor([abs(scale) for _, scale in found])[:hidden]
            assert ((values[:hidden] - original).abs() <= 1.3 * steps).all()


def test_the_copies_are_accurate():
    weight = torch.randn(256, 576, generator=torch.Generator().manual_seed(0))
    for copy in dequantize_rows(quantize_rows(weight, weight.bfloat16().float()), 576):
        assert ((copy - weight).square().sum() / weight.square().sum()) < 0.01
    assert not dequantize_rows(quantize_rows(*torch.zeros(2, 3, 70)), 70)[0].any()


def test_rounded_tokens():
    x = torch.randn(4, 150, generator=torch.Generator().manual_seed(0))
    x[1, 64:128] = 0
    x[2, 5] = float("nan")
    x[3, 130] = float("inf")
    rounded = rounded_tokens(x)
    steps = x[0].split(64)[0].abs().max() / 127
    assert (rounded[0] - x[0]).abs()[:64].max() <= steps / 2 + 1e-6
    assert not rounded[1, 64:128].any()
    assert rounded[2, :64].isnan().all()
    assert rounded[3, 128:].isnan().all()
    assert rounded[3, :128].isfinite().all()


@pytest.mark.parametrize("n", [1, 3, 20])
@pytest.mark.parametrize("shape", [(64, 40, 3), (70, 131, 4), (1, 9, 2), (200, 301, 5)])
def test_reference(n, shape):
    given = case(n, shape, torch.float32, density=0.3, looks=True)
    counts = torch.tensor([5, 7])
    y = flat_sparse_ffn(*given.arguments[:7], **band_of(given), row_counts=counts)
    assert_close(y, given.exact(), TOLERANCE[torch.float32])
    assert counts.tolist() == [5 + given.counts[0], 7 + given.counts[1]]
    assert 0 < given.counts[1] < given.computed.numel()


def band_of(given):
    return dict(zip(("maybe_sets", "low_bit", "factors"), given.band, strict=True))


@needs_library
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_bands_at_their_ends(isa):
    given = case(5, (70, 60, 3), torch.float32, looks=True)
    x, gate, up, down, sets, ids, act, _, low_bit, factors = given.arguments
    none, everything = torch.zeros_like(sets), torch.full_like(sets, 255)
    dense = ops.cpu_dense_ffn(x, gate, up, down, act)

    def run(sure, band, factor):
        counts = torch.zeros(2, dtype=torch.int64)
        full = torch.full_like(factors, factor)
        y = ops.cpu_sparse_ffn(x, gate, up, down, sure, ids, act, band, low_bit, full, counts)
        return y, counts.tolist()

    y, counts = run(none, everything, math.inf)  # everything is confirmed
    torch.testing.assert_close(y, dense, atol=1e-5, rtol=1e-5)
    assert counts == [300, 300]
    y, counts = run(none, everything, 0.0)  # nothing is
    assert not y.any()
    assert counts == [0, 300]
    y, counts = run(everything, everything, 0.0)
    torch.testing.assert_close(y, dense, atol=1e-5, rtol=1e-5)
    assert counts == [300, 0]
    y, counts = run(none, none, math.inf)
    assert not y.any()
    assert counts == [0, 0]


@needs_library
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-35])
def test_what_cannot_be_judged_is_computed(isa, value, n):
    """All neurons that a token with NaN or infinity looks at, and none if it is almost zero."""
    given = case(n, (70, 60, 3), torch.float32, density=0.3, looks=True)
    if value == 1e-35:
        given.x[0] = value
    else:
        given.x[0, 3] = value
    counts, expected = torch.zeros(2, 2, dtype=torch.int64)
    y = ops.cpu_sparse_ffn(*given.arguments, counts)
    flat_sparse_ffn(*given.arguments[:7], **band_of(given), row_counts=expected)
    assert torch.equal(counts, expected)
    assert y[0].isnan().any() == (value != 1e-35)
    assert y[1:].isfinite().all()
    looked, sure = given.looked[0], given.sure[given.ids[0]]
    given.above[0] = value != 1e-35
    assert counts.tolist() == given.counts
    assert looked.any()
    assert sure.any()


@needs_library
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_a_neuron_at_its_bound_is_left_out(isa):
    """|h̃|·factor = 1 exactly, by products without rounding, and the next larger factor."""
    neurons = 24
    gate, up = torch.randn(2, neurons, 64, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(1, 64)
    x[0, 0] = 127.0  # rounded to 127 steps of 1
    low_bit = quantize_rows(gate, up)
    low_gate, low_up = (part[:, 0] * 127 for part in dequantize_rows(low_bit, 64))
    h = (low_gate.relu() * low_up).abs()
    at = 1 / h
    usable = (h * at == 1) & at.isfinite()
    beyond = torch.nextafter(at, at.new_tensor(math.inf))
    usable &= h * beyond > 1
    assert usable.sum() > 3
    band = torch.full((1, neurons // 8), 255, dtype=torch.uint8)
    for factors, confirmed in ((at, 0), (beyond, int(usable.sum()))):
        factors = torch.where(usable, factors, 0)
        counts = torch.zeros(2, dtype=torch.int64)
        ids = torch.zeros(1, dtype=torch.int64)
        none = torch.zeros_like(band)
        ops.cpu_sparse_ffn(x, gate, up, gate, none, ids, "relu", band, low_bit, factors, counts)
        assert counts.tolist() == [confirmed, neurons]


@needs_library
def test_opcheck():
    arguments = case(3, (70, 40, 3), torch.float32, looks=True).arguments
    counts = torch.zeros(2, dtype=torch.int64)
    torch.library.opcheck(ops.sparse_ffn, (*arguments, counts))


WRONG = {
    "maybe_sets": [None, lambda t: t[:-1], lambda t: t[:, :-1], lambda t: t.short()],
    "low_bit": [None, lambda t: t[:-1], lambda t: t[:, :-1], lambda t: t.char(), lambda t: t[0]],
    "factors": [None, lambda t: t[:-1], lambda t: t.double(), lambda t: t.unsqueeze(0)],
    "row_counts": [lambda t: t[:1], lambda t: t.int(), lambda t: t.unsqueeze(0)],
}


@pytest.mark.parametrize(
    ("name", "change"), [(name, change) for name, changes in WRONG.items() for change in changes]
)
def test_arguments_that_do_not_fit(name, change):
    given = case(3, (70, 40, 3), torch.float32, looks=True)
    arguments, extra = given.arguments, band_of(given)
    extra["row_counts"] = torch.zeros(2, dtype=torch.int64)
    extra[name] = None if change is None else change(extra[name])
    with pytest.raises(ValueError, match=r"maybe_sets|low_bit|factors|row_counts"):
        flat_sparse_ffn(*arguments[:7], **extra)
    if HAS_LIBRARY:
        with pytest.raises(ValueError, match=r"maybe_sets|low_bit|factors|row_counts"):
            ops.cpu_sparse_ffn(*arguments[:7], *extra.values())


@needs_library
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("low_bit", lambda t: torch.cat([t, t], dim=1)[:, 1 : t.shape[1] + 1]),
        ("factors", lambda t: torch.stack([t, t], dim=1)[:, 0]),
        ("row_counts", lambda t: torch.stack([t, t], dim=1)[:, 0]),
        ("maybe_sets", lambda t: t.t().contiguous().t()),
    ],
)
def test_layouts_that_the_library_refuses(name, change):
    given = case(3, (70, 40, 3), torch.float32, looks=True)
    arguments, extra = given.arguments, band_of(given)
    extra["row_counts"] = torch.zeros(2, dtype=torch.int64)
    extra[name] = change(extra[name])
    with pytest.raises(ValueError, match=name):
        ops.cpu_sparse_ffn(*arguments[:7], *extra.values())
