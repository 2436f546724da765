"""Rounding float rows to planes (``kernels/planes.py``).

A weight w of scale S gets the codes that make

    (w − full value)² + share · (w − base value)²

smallest, and a group the step, out of a few, for which the sum of that is smallest. The base has a
share where it is read without the residual, too.

What is known of a layer's inputs (:class:`InputStatistics`) helps. By E[x²], errors count by the
square root of it. By E[x xᵀ], rounding is compensated as well (GPTQ, arXiv 2210.17323): one input's
weights are rounded after the other, and those still to come make up for the error of the full value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.cost import GROUP, num_groups
from sparse_runtime.errors import ConfigError
from sparse_runtime.kernels.backends import KERNEL_DTYPES
from sparse_runtime.kernels.cpu.library import runs_natively
from sparse_runtime.kernels.planes import PlaneFormat, Rounded

# Steps that are tried, in parts of the one that maps a group's largest element to the code that has no
# opposite. Found by exchange among 0.50 to 1.16, both signs, on rows of both measured models: what they
# leave is within 1.5 to 4 % of the best of all 68 in every format (0.76 to 1, four steps: 2 to 34 %);
# steps of the other sign are worth less than 1 %.
_STEPS = (0.82, 0.88, 0.94, 1.0, 1.1)
# Of the base's error, times 4^−r: with 1, both errors count about alike.
_BASE_SHARE = 4.0
# Elements per block of the search: float32 temporaries of 1 MB. Half of that takes 10 % longer.
_BLOCK_VALUES = 1 << 18
# The same for the C++ loops, which have none, but want rows that lie in memory one after the other.
_NATIVE_VALUES = 1 << 24
# Largest value that codes are to stand for: below float32's by more than the rounding of a scale.
_LARGEST = 3.38e38
_SMALLEST_SCALE = torch.finfo(torch.bfloat16).smallest_normal

# What is added to the moments' diagonal, in parts of its mean.
_DAMPING = 0.1
# Inputs whose errors are spread over later ones in one product.
_SWEEP = 64


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What the inputs of a layer are like over text.

    Attributes:
        mean_squares: E[x²] [K] float32.
        spread: with compensation, the upper triangular U [K, K] float32 with UᵀU the inverse of the
            damped E[x xᵀ]: an input's error, divided by U[k, k], is made up for by U[k, l] from l.
    """

    mean_squares: Tensor
    spread: Tensor | None = None

    @classmethod
    def of(cls, moments: Tensor) -> InputStatistics:
        """Statistics of measured moments; takes three times the memory of E[x xᵀ].

        Args:
            moments: E[x²] [K], or, for compensated rounding, E[x xᵀ] [K, K], which is overwritten.

        Raises:
            ConfigError: they are NaN, infinite or negative.
        """
        squares = moments if moments.ndim == 1 else moments.diagonal()
        if not moments.isfinite().all() or (squares < 0).any():
            raise ConfigError(
                f"moments {list(moments.shape)} of a layer's inputs are NaN, infinite or negative in "
                "part; expected finite means of squares over text"
            )
        mean_squares = squares.float().clone()
        return cls(mean_squares, None if moments.ndim == 1 else _spread(moments.float()))

    @property
    def size(self) -> int:
        """K, the number of inputs."""
        return len(self.mean_squares)


def round_rows(
    weight: Tensor,
    form: PlaneFormat,
    statistics: InputStatistics | None = None,
    *,
    whole: bool = False,
) -> Rounded:
    """Round rows whose inputs are the columns, as of a linear layer, gate or up.

    Codes are the nearest ones, or compensated ones where the statistics hold a spread, which takes
    about 2·H operations a weight; scales are those of the least squared error among a few.

    Args:
        weight: [rows, H], bfloat16, float16 or float32; rows may be none. Groups of nothing but
            numbers below 1e-37 become zeros.
        form: planes to round to.
        statistics: of the inputs, K = H, on the weight's device; all count alike if None.
        whole: bases are never read without residuals, and have no share.

    Returns:
        codes and scales, on the weight's device.

    Raises:
        ConfigError: weights are NaN or infinite; the message counts them, the caller names the tensor.
            Statistics are of another number of inputs.
    """
    _check_size(statistics, weight.shape[1])
    nearest = nearest_codes(weight, form, statistics, whole=whole)
    scales = nearest.scales
    if not scales.isfinite().all():
        bad = int((~weight.isfinite()).sum())
        raise ConfigError(
            f"{bad} of {weight.numel()} values of a weight [{weight.shape[0]}, {weight.shape[1]}] are "
            "NaN or infinite; expected finite weights"
        )
    if statistics is None or statistics.spread is None:
        return nearest
    columns = scales.T.contiguous()
    # A copy in any case: one row of float32 is its own transpose, and the caller's.
    values = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    share, spread = _share(form, whole), statistics.spread
    hi, lo = _compensated(values, form, share, spread, lambda k: columns[k // GROUP])
    return Rounded(hi.T.contiguous(), lo.T.contiguous(), scales, form)


def nearest_codes(
    weight: Tensor,
    form: PlaneFormat,
    statistics: InputStatistics | None = None,
    *,
    whole: bool = False,
) -> Rounded:
    """Round rows to the nearest codes; arguments as of :func:`round_rows`.

    Of a group of weights that holds NaN or infinity the scale is NaN, and codes are zero.
    """
    counts = None if statistics is None else _counts(statistics.mean_squares)
    share = _share(form, whole)
    values, round_block = _BLOCK_VALUES, _round_block
    if weight.dtype in KERNEL_DTYPES and runs_natively(weight):
        values, round_block = _NATIVE_VALUES, _round_natively
        if weight.is_contiguous():
            values = weight.numel()
    parts = [
        round_block(block, form, counts, share)
        for block in weight.detach().split(max(1, values // weight.shape[1]))
    ]
    found = parts[0]
    if len(parts) > 1:
        hi, lo, scales = zip(*parts, strict=True)
        found = torch.cat(hi), torch.cat(lo), torch.cat(scales)
    return Rounded(*found, form)


def round_down(
    down_t: Tensor, form: PlaneFormat, statistics: InputStatistics | None = None
) -> Rounded:
    """Round rows that are weighed by one input each, as of transposed down.

    A row's inputs count alike, so that E[h²] alone changes nothing; compensation takes about 2·I
    operations a weight.

    Args:
        down_t: [I, H], bfloat16, float16 or float32.
        form: planes to round to.
        statistics: of the activations, K = I, or None.

    Raises:
        ConfigError: as :func:`round_rows`.
    """
    _check_size(statistics, down_t.shape[0])
    nearest = round_rows(down_t, form)
    if statistics is None or statistics.spread is None:
        return nearest
    scales, size = nearest.scales, down_t.shape[1]
    hi, lo = _compensated(
        down_t.to(torch.float32, copy=True),
        form,
        _share(form),
        statistics.spread,
        lambda k: scales[k].repeat_interleave(GROUP)[:size],
    )
    return Rounded(hi, lo, scales, form)


def _check_size(statistics: InputStatistics | None, size: int) -> None:
    if statistics is not None and statistics.size != size:
        raise ConfigError(f"statistics are of {statistics.size} inputs; expected {size}")


def _compensated(
    values: Tensor,
    form: PlaneFormat,
    share: float,
    spread: Tensor,
    scales_of: Callable[[int], Tensor],
) -> tuple[Tensor, Tensor]:
    """Codes [inputs, outputs] int8 of values float32, which are overwritten, by an input's scales."""
    hi, lo = (torch.empty(values.shape, dtype=torch.int8, device=values.device) for _ in range(2))
    for first in range(0, values.shape[0], _SWEEP):
        block = values[first : first + _SWEEP]
        for j, value in enumerate(block):
            k = first + j
            scales = scales_of(k).float()
            inverse = torch.where(scales != 0, 1 / scales, 0)
            hi[k], lo[k], _ = (codes := _codes(value * inverse, form, share))
            # The block keeps the errors in place of the values.
            value -= scales * (codes[0] + codes[1] * 0.5**form.residual)
            value /= spread[k, k]
            block[j + 1 :].addr_(spread[k, k + 1 : first + len(block)], value, alpha=-1)
        last = first + len(block)
        values[last:].addmm_(spread[first:last, last:].T, block, alpha=-1)
    return hi, lo


def _spread(moments: Tensor) -> Tensor:
    """See :class:`InputStatistics`; the moments are overwritten."""
    mean = moments.diagonal().mean()
    moments.diagonal().add_(mean * _DAMPING if mean > 0 else 1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    return torch.linalg.cholesky(inverse, upper=True)


def _counts(importance: Tensor) -> Tensor:
    """What errors count by column [G, 64] float32, with a mean of about one."""
    padded = F.pad(importance.float(), (0, -importance.shape[0] % GROUP)).view(-1, GROUP)
    largest = padded.max()
    if not largest > 0:
        return torch.ones_like(padded)
    roots = (padded / largest).sqrt_()
    return roots / roots.mean()


def _share(form: PlaneFormat, whole: bool = False) -> float:
    """What a base's squared error counts beside that of the full value."""
    return 0.0 if whole or not form.residual else _BASE_SHARE / 4.0**form.residual


def _round_natively(
    weight: Tensor, form: PlaneFormat, counts: Tensor | None, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_round_block` by the C++ loops, but for sums of errors, whose last digits differ."""
    most = 2 ** (form.base - 1)
    hi, lo, scales = torch.ops.sparse_runtime.cpu_round_rows(
        weight.contiguous(),
        form.base,
        form.residual,
        torch.tensor([-step / most for step in _STEPS]),
        _LARGEST / (most + 0.5),
        1 - _upward(form, share),
        share,
        None if counts is None else counts.flatten(),
    )
    return hi, lo, scales


def _round_block(
    weight: Tensor, form: PlaneFormat, counts: Tensor | None, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [rows, H] int8 and scales [rows, G], as of :func:`nearest_codes`."""
    rows, size = weight.shape
    padded = F.pad(weight.float(), (0, -size % GROUP)).view(rows, num_groups(size), GROUP)
    low, high = padded.amin(-1), padded.amax(-1)
    extreme = torch.where(high > -low, high, low)
    most = 2 ** (form.base - 1)
    limit = _LARGEST / (most + 0.5)
    # Stays for groups of zeros, and NaN for those that cannot be rounded.
    scales = torch.where(extreme.isfinite(), 0.0, float("nan")).to(torch.bfloat16)
    least = torch.full_like(extreme, float("inf"))
    for step in _STEPS:
        tried = (extreme * (-step / most)).clamp_(-limit, limit).to(torch.bfloat16)
        # In parts of the largest element: squares of very large or small weights would not be finite.
        error = _errors(_scaled(padded, tried), form, counts, share)
        error *= (tried / extreme).square_()
        better = (error < least) & (tried.abs() >= _SMALLEST_SCALE)
        scales, least = torch.where(better, tried, scales), torch.where(better, error, least)
    hi, lo = (
        codes.flatten(1)[:, :size].to(torch.int8)
        for codes in _codes(_scaled(padded, scales).nan_to_num_(0), form, share)[:2]
    )
    return hi, lo, scales


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    """Values [rows, G, 64] in parts of their scale [rows, G]; zeros where that is zero."""
    wide = scales.float()
    return values * torch.where(wide != 0, 1 / wide, 0).unsqueeze(-1)


def _codes(scaled: Tensor, form: PlaneFormat, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Base and residual codes, float32, of values in parts of their scale.

    The third result is what base codes leave of the values, which are overwritten by it.
    """
    most, r = 2 ** (form.base - 1), form.residual
    if not r:
        hi = scaled.round().clamp_(-most, most - 1)
        return hi, torch.zeros_like(hi), scaled.sub_(hi)
    hi = (scaled + (1 - _upward(form, share))).floor_().clamp_(-most, most - 1)
    rest = scaled.sub_(hi)
    half = 2 ** (r - 1)
    return hi, (rest * 2**r).round_().clamp_(-half, half - 1), rest


def _upward(form: PlaneFormat, share: float) -> float:
    """The fraction from which on a value gets the next base code: 3/8 to 1/2.

    Residuals reach up to 1/2 − q above a base code, q = 2^−r. Of what lies between that and 1/2, the
    next code is too high by nearly 1. At this fraction both choices have the same error.
    """
    q = 0.5**form.residual
    return (q - q * q + share) / (2 * q + 2 * share) if form.residual else 0.5


def _errors(scaled: Tensor, form: PlaneFormat, counts: Tensor | None, share: float) -> Tensor:
    """Squared errors [rows, G] of values in parts of their scale, which are overwritten."""
    _, lo, rest = _codes(scaled, form, share)
    if form.residual:
        error = lo.mul_(-(0.5**form.residual)).add_(rest).square_()
        error.addcmul_(rest, rest, value=share)
    else:
        error = rest.square_()
    return (error if counts is None else error.mul_(counts)).sum(-1)
