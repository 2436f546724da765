"""Neurons that looks confirm: the records, the reference, the C++ library."""

import math

import pytest
import torch
from kernels.cases import TOLERANCE, assert_close, case, close_calls, flat_sparse_ffn

from sparse_runtime.cost import look_size
from sparse_runtime.kernels import load_cpu_library
from sparse_runtime.kernels.looks import look_records
from sparse_runtime.kernels.planes import LOOK_FORMAT, PlaneFormat, pack_neurons, unpack_look
from sparse_runtime.kernels.rounding import round_rows

HAS_LIBRARY = load_cpu_library()
ops = torch.ops.sparse_runtime
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="libsparse_ffn_cpu.so is not built")
ISAS = ops.cpu_isas().split(",") if HAS_LIBRARY else []


@pytest.fixture
def isa(request):
    ops.cpu_force_isa(request.param)
    yield request.param
    ops.cpu_force_isa("")


@pytest.mark.parametrize("hidden", [1, 63, 64, 65, 200, 576])
def test_records_are_those_of_planes(hidden):
    g = torch.Generator().manual_seed(0)
    gate, up, down = torch.randn(3, 5, hidden, generator=g)
    records = look_records(gate, up)
    assert records.shape == (5, look_size(hidden, 4)) == (5, 68 * math.ceil(hidden / 64))
    rounded = [round_rows(weight, PlaneFormat(4)) for weight in (gate, up, down)]
    assert torch.equal(records, pack_neurons(*rounded, "silu").look)
    for values, part in zip(unpack_look(records, LOOK_FORMAT, hidden), rounded[:2], strict=True):
        assert torch.equal(values, part.values())


def test_records_of_bases_only():
    """Of planes with residuals, too, a look is by base values."""
    weights = torch.randn(3, 5, 70, generator=torch.Generator().manual_seed(0))
    gate, up, down = (round_rows(weight, PlaneFormat(3, 2)) for weight in weights)
    found = unpack_look(pack_neurons(gate, up, down, "silu").look, PlaneFormat(3, 2), 70)
    for values, part in zip(found, (gate, up), strict=True):
        assert torch.equal(values, part.values(base=True))
        assert not torch.equal(values, part.values())


def test_records_are_accurate():
    weight = torch.randn(256, 576, generator=torch.Generator().manual_seed(0))
    records = look_records(weight, weight.bfloat16())
    for values in unpack_look(records, LOOK_FORMAT, 576):
        assert ((values - weight).square().sum() / weight.square().sum()) < 0.009
    assert not unpack_look(look_records(*torch.zeros(2, 3, 70)), LOOK_FORMAT, 70)[0].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_cannot_be_rounded(value):
    """Their groups are NaN in the records, others as if there were no such weight."""
    gate, up = torch.randn(2, 5, 150, generator=torch.Generator().manual_seed(0))
    clean = gate.clone()
    clean[2, 140] = 0
    expected, other = unpack_look(look_records(clean, up), LOOK_FORMAT, 150)
    gate[2, 140] = value
    found, same = unpack_look(look_records(gate, up), LOOK_FORMAT, 150)
    assert found[2, 128:].isnan().all()
    expected[2, 128:] = found[2, 128:] = 0
    assert torch.equal(found, expected)
    assert torch.equal(same, other)


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
    return dict(zip(("maybe_sets", "look", "factors"), given.band, strict=True))


@needs_library
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_bands_at_their_ends(isa):
    given = case(5, (70, 60, 3), torch.float32, looks=True)
    x, gate, up, down, sets, ids, act, _, look, factors = given.arguments
    none, everything = torch.zeros_like(sets), torch.full_like(sets, 255)
    dense = ops.cpu_dense_ffn(x, gate, up, down, act)

    def run(sure, band, factor):
        counts = torch.zeros(2, dtype=torch.int64)
        full = torch.full_like(factors, factor)
        y = ops.cpu_sparse_ffn(x, gate, up, down, sure, ids, act, band, look, full, counts)
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
    x[0, 0] = 127.0  # rounded to 127 · 128 steps of 2⁻⁷
    look = look_records(gate, up)
    base_gate, base_up = (part[:, 0] * 127 for part in unpack_look(look, LOOK_FORMAT, 64))
    h = (base_gate.relu() * base_up).abs()
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
        ops.cpu_sparse_ffn(x, gate, up, gate, none, ids, "relu", band, look, factors, counts)
        assert counts.tolist() == [confirmed, neurons]


@needs_library
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_decisions_do_not_depend_on_other_tokens(isa):
    x, *weights, sets, ids, activation, band, records, factors = close_calls(23, 200, 96)

    def run(tokens):
        call = x[tokens], *weights, sets, ids[tokens], activation, band, records, factors
        return ops.cpu_sparse_ffn(*call)[:, :96] != 0

    together = run(slice(None))
    for size in (1, 5, 8):
        parts = [run(slice(first, first + size)) for first in range(0, 23, size)]
        assert torch.equal(torch.cat(parts), together)
    assert 0.2 < together.float().mean() < 0.8


@needs_library
def test_opcheck():
    arguments = case(3, (70, 40, 3), torch.float32, looks=True).arguments
    counts = torch.zeros(2, dtype=torch.int64)
    torch.library.opcheck(ops.sparse_ffn, (*arguments, counts))


WRONG = {
    "maybe_sets": [None, lambda t: t[:-1], lambda t: t[:, :-1], lambda t: t.short()],
    "look": [None, lambda t: t[:-1], lambda t: t[:, :-1], lambda t: t.char(), lambda t: t[0]],
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
    with pytest.raises(ValueError, match=r"maybe_sets|look|factors|row_counts"):
        flat_sparse_ffn(*arguments[:7], **extra)
    if HAS_LIBRARY:
        with pytest.raises(ValueError, match=r"maybe_sets|look|factors|row_counts"):
            ops.cpu_sparse_ffn(*arguments[:7], *extra.values())


@needs_library
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("look", lambda t: torch.cat([t, t], dim=1)[:, 1 : t.shape[1] + 1]),
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
