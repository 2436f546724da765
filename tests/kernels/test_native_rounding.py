"""The C++ loops that round rows to planes, against their definition in kernels/rounding.py."""

import pytest
import torch
from kernels.library import ISAS, forced, ops

from sparse_runtime.kernels import planes, rounding
from sparse_runtime.kernels.planes import PLANE_BITS, PlaneFormat, pack_plane
from sparse_runtime.kernels.rounding import InputStatistics, round_rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GOOD = (torch.ones(3, 70), 4, 2, torch.tensor([-0.125]), 1e38, 0.6, 0.25, torch.ones(128))


def weights(rows, size, dtype=torch.float32):
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(rows, size, generator=generator)
    return (values * torch.rand(rows, 1, generator=generator)).to(dtype)


def both(weight, form, counts=None, whole=False):
    share = rounding._share(form, whole)
    return (
        rounding._round_block(weight, form, counts, share),
        rounding._round_natively(weight, form, counts, share),
    )


def assert_alike(expected, found):
    """The same codes, but of scales that are as good."""
    (hi, lo, scales), (own_hi, own_lo, own_scales) = expected, found
    assert (own_hi.dtype, own_lo.dtype, own_scales.dtype) == (torch.int8, torch.int8, scales.dtype)
    assert own_hi.shape == own_lo.shape == hi.shape
    assert own_scales.shape == scales.shape
    same = torch.isclose(scales, own_scales, rtol=0, atol=0, equal_nan=True)
    assert same.float().mean() >= 0.99
    columns = (same & scales.isfinite()).repeat_interleave(64, dim=1)[:, : hi.shape[1]]
    assert torch.equal(own_hi[columns], hi[columns])
    assert torch.equal(own_lo[columns], lo[columns])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 63, 64, 100, 576])
def test_codes_are_those_of_the_definition(isa, size):
    with forced(isa, threads=2):
        for dtype in DTYPES:
            weight = weights(70, size, dtype)
            by_column = rounding._counts(weights(1, size)[0].square())
            for bits in PLANE_BITS:
                form = PlaneFormat.of_bits(bits)
                for counts in (None, by_column):
                    for whole in (False, True):
                        assert_alike(*both(weight, form, counts, whole))


@pytest.mark.parametrize("isa", ISAS)
def test_numbers_at_the_ends_of_the_range(isa):
    weight = weights(8, 192)
    weight[0] = 0
    weight[1] *= 1e-38
    weight[2] *= 1e38
    weight[3, :64] = torch.finfo(torch.float32).max
    weight[4, 70] = float("inf")
    weight[5, 130] = float("nan")
    weight[6] = -0.0
    weight[7, ::2] = 1e-45
    with forced(isa):
        for bits in PLANE_BITS:
            expected, found = both(weight, PlaneFormat.of_bits(bits))
            assert_alike(expected, found)
            scales = found[2]
            assert scales[4].isnan().tolist() == [False, True, False]
            assert scales[5].isnan().tolist() == [False, False, True]
            for hi, lo, _ in (expected, found):
                assert not hi[4, 64:128].any()
                assert not lo[5, 128:].any()
            assert not scales[0].count_nonzero()
            assert not found[0][0].count_nonzero()


def test_one_thread_and_several_give_the_same():
    weight = weights(2000, 256, torch.bfloat16)
    with forced(threads=1):
        one = round_rows(weight, PlaneFormat(3, 2))
    with forced(threads=2):
        two = round_rows(weight, PlaneFormat(3, 2))
    for name in ("hi", "lo", "scales"):
        assert torch.equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("shape", [(0, 64), (3, 64), (5, 130)])
def test_any_strides_and_no_rows(shape):
    rows, size = shape
    form = PlaneFormat(4, 2)
    for weight in (weights(size, rows).t(), weights(rows, 2 * size)[:, ::2]):
        found = round_rows(weight, form)
        expected = round_rows(weight.contiguous(), form)
        assert torch.equal(found.hi, expected.hi)
        assert torch.equal(found.scales, expected.scales)


def test_a_parameter_and_its_statistics():
    weight = torch.nn.Parameter(weights(9, 128))
    statistics = InputStatistics.of(weights(1, 128)[0].square())
    found = round_rows(weight, PlaneFormat(3), statistics)
    expected = rounding._round_block(
        weight.detach(), PlaneFormat(3), rounding._counts(statistics.mean_squares), 0.0
    )
    assert_alike(expected, (found.hi, found.lo, found.scales))
    assert not found.scales.requires_grad


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.ones(70), "weight has 1 dimensions"),
        (0, torch.ones(70, 3).t(), "weight has stride 3 in its last dimension"),
        (0, torch.ones(3, 70).double(), "weight has a dtype other than"),
        (1, 5, r"planes of 5 \+ 2 bits"),
        (2, 1, r"planes of 4 \+ 1 bits"),
        (3, torch.ones(2).double(), "steps does not have dtype float32"),
        (7, torch.ones(127), "counts has size 127 in dimension 0; expected 64 G = 128"),
    ],
)
def test_what_is_refused(place, value, message):
    arguments = list(GOOD)
    ops.cpu_round_rows(*arguments)
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        ops.cpu_round_rows(*arguments)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 64, 130, 192, 256, 576])
def test_planes_are_those_of_the_definition(bits, size):
    generator = torch.Generator().manual_seed(size)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (37, size), generator=generator, dtype=torch.int8)
    expected = planes._packed(codes, bits)
    assert torch.equal(pack_plane(codes, bits), expected)
    assert torch.equal(pack_plane(codes.t().contiguous().t(), bits), expected)
    assert pack_plane(codes[:0], bits).shape == (0, expected.shape[1])


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.ones(4, 64, dtype=torch.int8), 5, "a plane of 5 bits"),
        (torch.ones(4, 64), 4, "codes does not have dtype int8"),
        (torch.ones(64, dtype=torch.int8), 4, "codes has 1 dimensions"),
        (torch.ones(64, 4, dtype=torch.int8).t(), 4, "codes has stride 4 in its last dimension"),
        (torch.ones(4, 128, dtype=torch.int8)[:, :64], 4, "codes are not contiguous"),
    ],
)
def test_codes_that_are_refused(codes, bits, message):
    with pytest.raises(ValueError, match=message):
        ops.cpu_pack_plane(codes, bits)


def test_opcheck():
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.cpu_round_rows, GOOD, test_utils=checks)
    codes = torch.ones(3, 70, dtype=torch.int8)
    torch.library.opcheck(ops.cpu_pack_plane, (codes, 3), test_utils=checks)
