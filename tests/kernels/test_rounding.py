"""Rounding: chosen codes and scales against a search through all of them, and what is refused."""

import warnings

import pytest
import torch

from sparse_runtime.errors import ConfigError
from sparse_runtime.kernels import rounding
from sparse_runtime.kernels.planes import PlaneFormat
from sparse_runtime.kernels.rounding import InputStatistics, round_down, round_rows

FORMATS = [
    PlaneFormat(*bits) for bits in ((3, 0), (4, 0), (3, 2), (3, 3), (3, 4), (4, 2), (4, 3), (4, 4))
]
every_format = pytest.mark.parametrize("form", FORMATS, ids=str)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def by(moments):
    """Statistics of moments, which are kept."""
    return InputStatistics.of(moments.clone())


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base_share(form, whole=False):
    """What the base's squared error counts: 4^(1−r), nothing where it is not read alone."""
    return 4.0 ** (1 - form.residual) if form.residual and not whole else 0.0


def every_code(form):
    """All (hi, lo) of a format as two vectors float64."""
    most, half = 2 ** (form.base - 1), 2**form.residual // 2
    hi = torch.arange(-most, most, dtype=torch.float64)
    lo = torch.arange(-half, max(half, 1), dtype=torch.float64)
    return hi.repeat_interleave(len(lo)), lo.repeat(len(hi))


def errors_by_code(weight, scales, form, whole=False):
    """What each code would cost every weight [rows, H, codes] float64."""
    hi, lo = every_code(form)
    wide = scales.double().repeat_interleave(64, dim=1)[:, : weight.shape[1], None]
    full = (weight.double()[..., None] - wide * (hi + lo / 2**form.residual)).square()
    base = (weight.double()[..., None] - wide * hi).square()
    return full + base_share(form, whole) * base


def error(rounded, weight, base=False):
    return (rounded.values(base=base).double() - weight.double()).square().sum().item()


def by_group(errors):
    return torch.stack([part.sum(1) for part in errors.split(64, dim=1)], dim=1)


@every_format
@pytest.mark.parametrize("sign", [1, -1])
def test_weights_on_the_grid_get_their_own_codes(form, sign):
    hi, lo = every_code(form)
    values = hi + lo / 2**form.residual
    values = sign * 0.25 * values[values >= hi.min()]  # the first one is the code without opposite
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    groups = [torch.cat([values[:1], part]) for part in values[order].split(63)]
    for group in groups:
        rounded = round_rows(group[None].float(), form, whole=True)
        assert rounded.scales.tolist() == [[sign * 0.25]]
        assert torch.equal(rounded.values()[0], group.float())
        assert rounded.hi[0, 0] == -(2 ** (form.base - 1))


def test_codes_of_a_small_case(monkeypatch):
    monkeypatch.setattr(rounding, "_STEPS", (1.0,))
    weight = torch.tensor([[-8.0, 7.0, 0.0, 0.37, 0.43, 0.45, 0.5, -0.4, -0.6, 3.2]])
    rounded = round_rows(weight, PlaneFormat(4, 2))
    assert rounded.scales.item() == 1
    # From 0.4375 on the next base code is taken.
    assert rounded.hi.tolist() == [[-8, 7, 0, 0, 0, 1, 1, 0, -1, 3]]
    assert rounded.lo.tolist() == [[0, 0, 0, 1, 1, -2, -2, -2, 1, 1]]
    whole = round_rows(weight, PlaneFormat(4, 2), whole=True)  # from 0.375 on
    assert whole.hi.tolist() == [[-8, 7, 0, 0, 1, 1, 1, 0, 0, 3]]
    assert whole.lo.tolist() == [[0, 0, 0, 1, -2, -2, -2, -2, -2, 1]]
    plain = round_rows(weight, PlaneFormat(4))
    assert plain.hi.tolist() == [[-8, 7, 0, 0, 0, 0, 0, 0, -1, 3]]
    assert not plain.lo.any()


@every_format
@pytest.mark.parametrize("whole", [False, True])
def test_every_weight_has_its_best_code(form, whole):
    weight = randn(5, 200)
    weight[:, ::70] *= 4
    rounded = round_rows(weight, form, whole=whole)
    errors = errors_by_code(weight, rounded.scales, form, whole)
    hi, lo = every_code(form)
    own = (rounded.hi[..., None] == hi) & (rounded.lo[..., None] == lo)
    assert (own.sum(-1) == 1).all()
    least = errors.amin(-1)
    assert (errors[own].view_as(least) <= least * (1 + 1e-4) + 1e-9).all()


@every_format
def test_no_single_step_would_be_better(form):
    weight = randn(20, 130)
    rounded = round_rows(weight, form)
    found = by_group(errors_by_code(weight, rounded.scales, form).amin(-1))
    extremes = torch.stack(
        [
            part.gather(1, part.abs().argmax(1, keepdim=True))[:, 0]
            for part in weight.split(64, dim=1)
        ],
        dim=1,
    )
    chosen = set()
    for step in rounding._STEPS:
        scales = (-step * extremes / 2 ** (form.base - 1)).bfloat16()
        tried = by_group(errors_by_code(weight, scales, form).amin(-1))
        assert (found <= tried * (1 + 1e-5)).all()
        chosen |= {step} if (scales == rounded.scales).any() else set()
    assert len(chosen) > 2  # it is a choice
    assert error(rounded, weight) < {3: 0.04, 4: 0.01}.get(form.bits, 0.004) * weight.square().sum()


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_importance_moves_errors_to_unimportant_columns(bits):
    weight = randn(100, 150)
    importance = torch.full((150,), 1e-4)
    importance[::9] = 1.0
    form = PlaneFormat.of_bits(bits)
    plain = round_rows(weight, form, whole=True)
    weighted = round_rows(weight, form, by(importance), whole=True)

    def costs(rounded):
        squares = (rounded.values() - weight).square()
        return (squares * importance.sqrt()).sum(), squares.sum()

    assert costs(weighted)[0] < 0.9 * costs(plain)[0]
    assert costs(weighted)[1] > costs(plain)[1]
    # Its unit does not matter, and columns that count alike, or not at all, count as without it.
    for factor in (1e-30, 1e30):
        assert torch.equal(
            round_rows(weight, form, by(importance * factor), whole=True).hi, weighted.hi
        )
    for alike in (torch.zeros(150), torch.full((150,), 1e-20)):
        assert torch.equal(round_rows(weight, form, by(alike), whole=True).hi, plain.hi)


@every_format
def test_both_grids_hold_zero(form):
    weight = torch.zeros(3, 128)
    weight[:, 0], weight[:, 1] = 5.0, -3.0
    weight[1] *= -1
    weight[2, 2:] = 5e-3
    rounded = round_rows(weight, form)
    for base in (False, True):
        values = rounded.values(base=base)
        assert not values[:2, 2:].any()
        assert values[2, 64:].any()
        assert not values[2, 2:64].any()
        assert values[:2, :2].all()


@pytest.mark.parametrize("whole", [False, True])
def test_without_residual_no_base_stands_apart(whole):
    weight = randn(4, 100)
    rounded = round_rows(weight, PlaneFormat(4), whole=whole)
    assert torch.equal(rounded.values(), rounded.values(base=True))
    assert torch.equal(rounded.hi, round_rows(weight, PlaneFormat(4)).hi)


@pytest.mark.parametrize("form", FORMATS[2:], ids=str)
def test_a_base_that_is_not_read_alone_has_no_share(form):
    weight = randn(200, 128)
    nested, whole = round_rows(weight, form), round_rows(weight, form, whole=True)
    assert error(whole, weight) < error(nested, weight)
    assert error(whole, weight, base=True) > error(nested, weight, base=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(dtype, bad, monkeypatch):
    monkeypatch.setattr(rounding, "_BLOCK_VALUES", 150)  # two rows a block
    weight = randn(7, 70).to(dtype)
    weight[4, 69] = weight[6, 3] = bad
    for call in (
        lambda: round_rows(weight, PlaneFormat(4, 2)),
        lambda: round_rows(weight, PlaneFormat(4, 2), by(torch.eye(70))),
        lambda: round_down(weight, PlaneFormat(4, 2), by(torch.eye(7))),
    ):
        with pytest.raises(
            ConfigError, match=r"^2 of 490 values of a weight \[7, 70\] are NaN or "
        ):
            call()


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_extreme_weights_stay_finite(form, dtype):
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    weight = torch.zeros(9, 96, dtype=dtype)
    signs = randn(96).sign()
    weight[1], weight[2] = (signs * largest).to(dtype), largest
    weight[3], weight[4] = -largest, tiny / 64  # denormal
    weight[5] = (randn(96).clamp(-1, 1) * largest).to(dtype)
    weight[6], weight[7, 90], weight[8, 10] = tiny * 100, largest, tiny * 2
    importance = torch.rand(96)
    for rounded in (round_rows(weight, form), round_rows(weight, form, by(importance))):
        assert rounded.scales.isfinite().all()
        used = rounded.scales[rounded.scales != 0].abs()  # no denormals, which some CPUs take for 0
        assert (used >= torch.finfo(torch.bfloat16).smallest_normal).all()
        assert not rounded.hi[0].any()
        assert not rounded.scales[0].any()
        for base in (False, True):
            values = rounded.values(base=base)
            assert values.isfinite().all()
            close = (values.double() - weight.double()).abs() <= 0.3 * weight.double().abs()
            assert close[torch.tensor([0, 2, 3, 6, 7])].all()


def test_rows_by_rows_and_dtype_by_dtype(monkeypatch):
    weight = randn(9, 300).bfloat16()
    rounded = round_rows(weight, PlaneFormat(3, 2))
    monkeypatch.setattr(rounding, "_BLOCK_VALUES", 700)
    for other in (weight, weight.float(), weight.float().T.contiguous().T):
        again = round_rows(other, PlaneFormat(3, 2))
        for name in ("hi", "lo", "scales"):
            assert torch.equal(getattr(again, name), getattr(rounded, name))
    half = randn(9, 300).half()
    assert torch.equal(
        round_rows(half, PlaneFormat(4)).hi, round_rows(half.float(), PlaneFormat(4)).hi
    )


@every_format
def test_shapes(form):
    for rows, size in ((0, 65), (1, 1), (2, 63), (3, 64), (1, 65), (2, 257)):
        rounded = round_rows(randn(rows, size), form, by(torch.ones(size)))
        assert rounded.hi.shape == rounded.lo.shape == (rows, size)
        assert rounded.hi.dtype == rounded.lo.dtype == torch.int8
        assert rounded.scales.shape == (rows, -(-size // 64))
        assert rounded.scales.dtype == torch.bfloat16
        assert rounded.values().any() or not rows


def test_mean_squares_change_nothing_where_a_row_has_one_input():
    down_t = randn(6, 100)
    for statistics in (None, by(torch.rand(6))):
        found = round_down(down_t, PlaneFormat(4, 2), statistics)
        assert torch.equal(found.values(), round_rows(down_t, PlaneFormat(4, 2)).values())


def correlated(size, seed=0):
    """Second moments of inputs that share directions."""
    inputs = randn(4 * size, size, seed=seed) @ randn(size, size, seed=seed + 1)
    return inputs.T @ inputs / len(inputs)


@every_format
@pytest.mark.parametrize("size", [64, 130])
def test_compensation_lowers_the_error_of_the_outputs(form, size):
    moments, weight = correlated(size), randn(50, size)

    def output_error(rounded):
        rest = rounded.values() - weight
        return ((rest @ moments) * rest).sum()

    plain = round_rows(weight, form, by(moments.diagonal()))
    found = round_rows(weight, form, by(moments))
    assert torch.equal(found.scales, plain.scales)
    assert output_error(found) < 0.8 * output_error(plain)

    rows = randn(size, 70)

    def row_error(rounded):
        rest = rounded.values() - rows
        return ((moments @ rest) * rest).sum()

    plain, before = round_rows(rows, form), rows.clone()
    found = round_down(rows, form, by(moments))
    assert torch.equal(found.scales, plain.scales)
    assert row_error(found) < 0.8 * row_error(plain)
    assert torch.equal(rows, before)  # the weights are not the scratch


@pytest.mark.parametrize("form", [PlaneFormat(4), PlaneFormat(3, 2)], ids=str)
def test_compensation_is_the_best_answer_to_what_was_rounded(form):
    """Before an input is rounded, it and the later ones minimize the error with the earlier fixed."""
    size = 70  # more than one block of the sweep
    moments, weight = correlated(size), randn(8, size)
    found = round_rows(weight, form, by(moments))
    damped = moments.double()
    damped = damped + 0.1 * damped.diagonal().mean() * torch.eye(size)
    scales = found.scales.double().repeat_interleave(64, dim=1)[:, :size]
    hi, lo = every_code(form)
    rest = torch.zeros(8, size, dtype=torch.float64)  # weights less their rounded values
    same = 0
    for k in range(size):
        answer = torch.linalg.solve(damped[k:, k:], damped[k:, :k] @ rest[:, :k].T)[0]
        target = weight[:, k].double() + answer
        costs = errors_by_code(target[:, None], scales[:, k : k + 1], form)[:, 0]
        best = costs.argmin(1)
        same += ((hi[best] == found.hi[:, k]) & (lo[best] == found.lo[:, k])).sum().item()
        values = scales[:, k] * (found.hi[:, k] + found.lo[:, k].double() / 2**form.residual)
        rest[:, k] = weight[:, k].double() - values
    assert same >= 0.99 * 8 * size


@every_format
def test_inputs_that_share_nothing_have_nothing_to_compensate(form):
    weight = randn(40, 100)
    for moments in (torch.eye(100), torch.zeros(100, 100)):
        found = round_rows(weight, form, by(moments))
        assert torch.equal(found.values(), round_rows(weight, form).values())
    found = round_down(weight, form, by(torch.eye(40)))
    assert torch.equal(found.values(), round_rows(weight, form).values())


def test_an_error_is_made_up_for_by_the_next_input():
    """Two inputs that are always alike: the second is rounded so that the sum comes right."""
    weight = torch.tensor([[0.4, 0.4, -8.0]])
    moments = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert round_rows(weight, PlaneFormat(4)).hi.tolist() == [[0, 0, -8]]
    assert round_rows(weight, PlaneFormat(4), by(moments)).hi.tolist() == [[0, 1, -8]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_moments_that_cannot_be_are_refused(bad):
    moments = torch.eye(70)
    moments[3, 3] = bad
    for wrong, shape in ((moments, "70, 70"), (moments.diagonal(), "70")):
        with pytest.raises(ConfigError, match=rf"^moments \[{shape}\] .*NaN, infinite or negative"):
            by(wrong)
    moments[3, 3], moments[3, 5] = 1, float("nan")
    with pytest.raises(ConfigError, match=r"moments \[70, 70\]"):
        by(moments)


def test_statistics_hold_what_the_moments_say():
    moments = correlated(50)
    statistics = by(moments)
    assert statistics.size == 50
    assert torch.equal(statistics.mean_squares, moments.diagonal())
    spread = statistics.spread.double()
    assert torch.equal(spread, spread.triu())
    damped = moments.double() + 0.1 * moments.diagonal().double().mean() * torch.eye(50)
    torch.testing.assert_close(
        spread.T @ spread @ damped, torch.eye(50).double(), rtol=1e-3, atol=1e-3
    )
    assert by(moments.diagonal()).spread is None
