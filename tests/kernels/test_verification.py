"""Neurons that low-bit copies confirm: the copies themselves, the reference, the C++ library."""

import math
import struct

import pytest
import torch
from kernels.cases import verified_case as case
from kernels.cases import verified_exact as exact

from sparse_runtime.kernels import load_cpu_library, sparse_ffn
from sparse_runtime.kernels.low_bit import (
    dequantize_rows,
    quantize_rows,
    record_size,
    rounded_tokens,
)
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS, sparse_ffn_reference

HAS_LIBRARY = load_cpu_library()
ops = torch.ops.sparse_runtime
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="libsparse_ffn_cpu.so is not built")
ISAS = ops.cpu_isas().split(",") if HAS_LIBRARY else []
# As in test_cpu_kernel.py: sums in fp32, one rounding to the output's dtype.
TOLERANCE = {torch.float32: 2**-19, torch.bfloat16: 2**-8 + 2**-19, torch.float16: 2**-11 + 2**-19}
SHAPES = [(64, 40, 3), (70, 131, 4), (1, 9, 2), (200, 301, 5), (4200, 24, 2)]


@pytest.fixture
def isa(request):
    ops.cpu_force_isa(request.param)
    yield request.param
    ops.cpu_force_isa("")


def assert_close(actual, expected, dtype):
    scale = expected.abs().max()
    assert actual.dtype == dtype
    assert (actual.double() - expected).abs().max() <= TOLERANCE[dtype] * scale


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
@pytest.mark.parametrize(("hidden", "neurons", "clusters"), SHAPES)
def test_reference(n, hidden, neurons, clusters):
    arguments, computed, looked = case(n, hidden, neurons, clusters, torch.float32)
    counts = torch.tensor([5, 7])
    names = ("maybe_sets", "low_bit", "factors")
    y = sparse_ffn(
        *arguments[:7], **dict(zip(names, arguments[7:], strict=True)), row_counts=counts
    )
    assert_close(y, exact(arguments, computed), torch.float32)
    assert counts.tolist() == [5 + int(computed.sum()), 7 + int(looked.sum())]


@needs_library
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 2, 7, 64, 70])
@pytest.mark.parametrize(("hidden", "neurons", "clusters"), SHAPES)
def test_library(isa, n, hidden, neurons, clusters, dtype):
    arguments, computed, looked = case(n, hidden, neurons, clusters, dtype)
    counts = torch.tensor([5, 7])
    y = ops.cpu_sparse_ffn(*arguments, counts)
    assert_close(y, exact(arguments, computed), dtype)
    assert counts.tolist() == [5 + int(computed.sum()), 7 + int(looked.sum())]


@needs_library
@pytest.mark.parametrize("activation", ACTIVATION_FUNCTIONS)
def test_routed_with_every_activation(activation):
    (x, gate, up, down, sets, _, _, maybe, low_bit, factors), *_ = case(6, 70, 50, 3, torch.float32)
    router = torch.randn(3, 70, generator=torch.Generator().manual_seed(1))
    counts, expected_counts = torch.zeros(2, 2, dtype=torch.int64).unbind()
    y = ops.cpu_routed_ffn(
        x, gate, up, down, sets, None, router, None, None, None, activation,
        maybe, low_bit, factors, counts,
    )  # fmt: skip
    expected = sparse_ffn_reference(
        x, gate, up, down, sets, (x @ router.t()).argmax(-1), activation,
        maybe, low_bit, factors, expected_counts,
    )  # fmt: skip
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(counts, expected_counts)


@needs_library
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_bands_at_their_ends(isa):
    (x, gate, up, down, sets, ids, act, _, low_bit, factors), *_ = case(5, 70, 60, 3, torch.float32)
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
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_cannot_be_judged_is_computed(isa, bad):
    arguments, *_ = case(2, 70, 60, 3, torch.float32)
    x = arguments[0]
    x[0, 3] = bad
    y = ops.cpu_sparse_ffn(*arguments)
    assert y[0].isnan().any()
    assert y[1].isfinite().all()


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads):
    before = torch.get_num_threads()
    arguments, computed, _ = case(3, 600, 700, 2, torch.float32)
    torch.set_num_threads(threads)
    try:
        results = [ops.cpu_sparse_ffn(*arguments) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    assert_close(results[0], exact(arguments, computed), torch.float32)


@needs_library
def test_opcheck():
    arguments, *_ = case(3, 70, 40, 3, torch.float32)
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
    arguments, *_ = case(3, 70, 40, 3, torch.float32)
    extra = dict(zip(("maybe_sets", "low_bit", "factors"), arguments[7:], strict=True))
    extra["row_counts"] = torch.zeros(2, dtype=torch.int64)
    extra[name] = None if change is None else change(extra[name])
    with pytest.raises(ValueError, match=r"maybe_sets|low_bit|factors|row_counts"):
        sparse_ffn(*arguments[:7], **extra)
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
    arguments, *_ = case(3, 70, 40, 3, torch.float32)
    extra = dict(zip(("maybe_sets", "low_bit", "factors"), arguments[7:], strict=True))
    extra["row_counts"] = torch.zeros(2, dtype=torch.int64)
    extra[name] = change(extra[name])
    with pytest.raises(ValueError, match=name):
        ops.cpu_sparse_ffn(*arguments[:7], *extra.values())
