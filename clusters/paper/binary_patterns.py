"""Binary activation patterns: thresholds, packed storage, distance and quality figures.

A pattern says which values of a projection's output are large: bit i of token t is
``|value(t, i)| > threshold``. Everything here works block by block, so that N·I bits are the only
thing that has to fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.clusters.importance import chunk_slices
from sparse_runtime.cost import packed_size
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.kernels.bitmaps import pack_bits

#: Float32 elements of the largest temporary: 64 MiB, big enough for full matmul speed.
_BLOCK_ELEMENTS = 1 << 24

# Buckets of a magnitude: 6 bits of exponent (2**-40 to 2**24) and 12 of mantissa. 2 MiB each, so
# that three projections of 32 layers fit in 200 MiB; bfloat16 and float16 values fall on edges.
_MANTISSA_BITS = 12
_LOWEST_BUCKET = (127 - 40) << _MANTISSA_BITS
_NUM_BUCKETS = 64 << _MANTISSA_BITS


@dataclass(frozen=True, eq=False)
class PackedPatterns:
    """Binary patterns of N tokens over I neurons.

    Attributes:
        bits: uint8 [N, ⌈I/8⌉] in the layout of ``sparse_runtime.kernels.bitmaps``, padding bits zero.
        num_neurons: I.

    Raises:
        DataError: the shape or dtype of ``bits`` does not fit ``num_neurons``.
    """

    bits: Tensor
    num_neurons: int

    def __post_init__(self) -> None:
        width = packed_size(self.num_neurons)
        if self.bits.dtype != torch.uint8 or self.bits.dim() != 2 or self.bits.shape[1] != width:
            raise DataError(
                f"packed patterns are {self.bits.dtype} {tuple(self.bits.shape)}; expected "
                f"torch.uint8 [N, {width}] for {self.num_neurons} neurons"
            )

    def __len__(self) -> int:
        return self.bits.shape[0]

    @classmethod
    def from_dense(cls, mask: Tensor) -> PackedPatterns:
        """Pack a mask [N, I]; nonzero means active."""
        return cls(pack_bits(mask != 0), mask.shape[1])

    @classmethod
    def concat(cls, parts: Sequence[PackedPatterns]) -> PackedPatterns:
        """Patterns of all parts, one after the other.

        Raises:
            DataError: there is no part, or the parts differ in I.
        """
        widths = {part.num_neurons for part in parts}
        if len(widths) != 1:
            raise DataError(
                f"patterns to pool must share one number of neurons, found {sorted(widths)}"
            )
        return cls(torch.cat([part.bits for part in parts]), widths.pop())

    def select(self, index: Tensor) -> PackedPatterns:
        """Patterns of the tokens ``index``, int64 [n] or bool [N]."""
        return PackedPatterns(self.bits[index], self.num_neurons)

    def to(self, device: torch.device | str) -> PackedPatterns:
        """Copy the patterns to a device."""
        return PackedPatterns(self.bits.to(device), self.num_neurons)

    def dense(
        self, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Unpack tokens [start, stop): zeros and ones [n, I] in ``dtype``."""
        # One gather from a table of the 256 bytes is 4.5 times as fast as masking bit by bit.
        table = (torch.arange(256).unsqueeze(-1) >> torch.arange(8)) & 1
        table = table.to(device=self.bits.device, dtype=dtype)
        unpacked = table[self.bits[start:stop].to(torch.int32)]
        return unpacked.flatten(-2)[:, : self.num_neurons]

    def counts(self) -> Tensor:
        """Active neurons of each token, int64 [N]."""
        table = ((torch.arange(256).unsqueeze(-1) >> torch.arange(8)) & 1).sum(-1)
        table = table.to(self.bits.device, torch.int16)
        counts = torch.empty(len(self), dtype=torch.int64, device=self.bits.device)
        for rows in chunk_slices(len(self), _block_rows(self.bits.shape[1])):
            counts[rows] = table[self.bits[rows].to(torch.int32)].sum(-1)
        return counts

    def frequency(self) -> Tensor:
        """Share of the tokens for which each neuron is active, float64 [I]."""
        totals = torch.zeros(self.num_neurons, dtype=torch.float64, device=self.bits.device)
        for rows in self.blocks():
            totals += self.dense(rows.start, rows.stop).sum(0)
        return totals / max(len(self), 1)

    def blocks(self, columns: int = 0) -> Iterable[slice]:
        """Cut the tokens into slices whose [n, I] and [n, columns] float32 temporaries fit."""
        return chunk_slices(len(self), _block_rows(max(self.num_neurons, columns)))


def _block_rows(columns: int) -> int:
    return max(1, _BLOCK_ELEMENTS // max(columns, 1))


class MagnitudeHistogram:
    """Streaming histogram of |value|, for percentiles over more values than fit in memory.

    Buckets are float32 magnitudes cut to 12 bits of mantissa, so a percentile is exact for bfloat16
    and float16 values, and at most a factor 1 + 2⁻¹² (0.024 %) below the exact one for float32.
    Magnitudes below 2⁻⁴⁰ count as 0, those of 2²⁴ and more as just below 2²⁴. Counts are integers:
    neither the order nor the grouping of the chunks changes the answer.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(_NUM_BUCKETS, dtype=torch.int64)

    def add(self, chunk: Tensor) -> None:
        """Count the values of a chunk of any shape and float dtype.

        Raises:
            DataError: a value is not finite.
        """
        for part in chunk.detach().reshape(-1).split(_BLOCK_ELEMENTS // 4):
            values = part.float()
            if not bool(torch.isfinite(values).all()):
                raise DataError(
                    "activations hold NaN or infinite values, so no threshold can be set; run the "
                    "model in bfloat16 or float32"
                )
            # The bits of a non-negative float32 rise with its value.
            buckets = (values.abs().view(torch.int32) >> (23 - _MANTISSA_BITS)) - _LOWEST_BUCKET
            buckets = buckets.clamp_(0, _NUM_BUCKETS - 1)
            self._counts += torch.bincount(buckets, minlength=_NUM_BUCKETS).cpu()

    def percentile(self, percentile: float) -> float:
        """Smallest magnitude v such that at least ``percentile`` % of the magnitudes are ≤ v.

        Raises:
            ConfigError: ``percentile`` is not in [0, 100).
            DataError: nothing was counted.
        """
        if not 0 <= percentile < 100:
            raise ConfigError(f"percentile is {percentile}; expected 0 <= percentile < 100")
        cumulative = self._counts.cumsum(0)
        total = int(cumulative[-1])
        if total == 0:
            raise DataError("no activations to take a percentile of; pass at least one token")
        rank = max(1, -int(-(percentile / 100 * total) // 1))
        bucket = int(torch.searchsorted(cumulative, rank))
        if bucket == 0:
            return 0.0
        edge = torch.tensor((bucket + _LOWEST_BUCKET) << (23 - _MANTISSA_BITS), dtype=torch.int32)
        return edge.view(torch.float32).item()


def percentile_threshold(chunks: Iterable[Tensor], percentile: float) -> float:
    """Percentile of |value| over all chunks, in one pass and 2 MiB.

    Args:
        chunks: tensors of any shape and float dtype.
        percentile: in [0, 100); 50 leaves about half of the values above the threshold.

    Returns:
        The threshold; :class:`MagnitudeHistogram` states its accuracy.

    Raises:
        ConfigError: ``percentile`` is out of range.
        DataError: there are no values, or some are not finite.
    """
    histogram = MagnitudeHistogram()
    for chunk in chunks:
        histogram.add(chunk)
    return histogram.percentile(percentile)


def binarize(chunk: Tensor, threshold: float) -> Tensor:
    """Bitmap uint8 [n, ⌈I/8⌉] of the values [n, I] with ``|value| > threshold``."""
    # In float32: a comparison in bfloat16 would round the threshold first.
    return pack_bits(chunk.float().abs() > threshold)


def distances(patterns: PackedPatterns, centroids: Tensor, rows: slice | None = None) -> Tensor:
    """Active-position distance d(x, c) = Σ x ∧ ¬c = |x| − x·c (arXiv 2507.14179).

    Ones of the centroid that the point lacks cost nothing, so d is not symmetric.

    Args:
        patterns: N points.
        centroids: bool or 0/1 [K, I].
        rows: points to compute; all if None. The caller bounds n·K.

    Returns:
        float32 [n, K], whole numbers (exact: sums of ones stay below 2²⁴).
    """
    rows = rows or slice(0, len(patterns))
    points = patterns.dense(rows.start, rows.stop)
    missing = 1 - centroids.to(device=points.device, dtype=torch.float32)
    return F.linear(points, missing)


def nearest(patterns: PackedPatterns, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each point and its distance: int64 [N], float32 [N].

    Ties go to the lowest cluster. Never holds the whole [N, K] matrix.
    """
    device = patterns.bits.device
    missing = 1 - centroids.to(device=device, dtype=torch.float32)
    ids = torch.empty(len(patterns), dtype=torch.int64, device=device)
    distance = torch.empty(len(patterns), device=device)
    for rows in patterns.blocks(len(missing)):
        table = F.linear(patterns.dense(rows.start, rows.stop), missing)
        # argmin, not min: only argmin promises the first of equal values.
        ids[rows] = table.argmin(-1)
        distance[rows] = table.gather(-1, ids[rows].unsqueeze(-1)).squeeze(-1)
    return ids, distance


def assign(patterns: PackedPatterns, centroids: Tensor) -> Tensor:
    """Nearest centroid of each point without any limit on cluster sizes.

    Args:
        patterns: N points.
        centroids: bool or 0/1 [K, I].

    Returns:
        int64 [N]; ties go to the lowest cluster.
    """
    return nearest(patterns, centroids)[0]


def coverage(patterns: PackedPatterns, centroids: Tensor, ids: Tensor) -> float:
    """Share of the active neurons that the centroids hold: Σ|x ∧ c| ÷ Σ|x|.

    This is recall; the AWC paper calls it "clustering precision". Quote it beside :func:`chance`.

    Args:
        patterns: N points.
        centroids: bool or 0/1 [K, I].
        ids: cluster of each point, int64 [N]; points with -1 are left out.

    Returns:
        In [0, 1]; 0 when nothing is active.
    """
    shared, active, _ = _overlap(patterns, centroids, ids)
    return shared / active if active else 0.0


def precision(patterns: PackedPatterns, centroids: Tensor, ids: Tensor) -> float:
    """Share of the centroids' neurons that are active: Σ|x ∧ c| ÷ Σ|c|; see :func:`coverage`."""
    shared, _, chosen = _overlap(patterns, centroids, ids)
    return shared / chosen if chosen else 0.0


def chance(patterns: PackedPatterns, centroids: Tensor, ids: Tensor) -> float:
    """Mean density of the chosen centroids: the coverage that random neurons would reach."""
    used = ids.to(centroids.device)
    used = used[used >= 0]
    density = centroids.to(torch.float64).mean(-1)
    return density[used].mean().item() if len(used) else 0.0


def static_coverage(
    fit_patterns_frequency: Tensor, patterns: PackedPatterns, density: float
) -> float:
    """Coverage by one mask for all tokens: the neurons most frequent in the fit patterns.

    Args:
        fit_patterns_frequency: how often each neuron is active, [I]; ties go to the lowest index.
        patterns: N points to score.
        density: share of neurons in the mask; take :func:`chance` of the clusters compared with.
    """
    size = round(density * patterns.num_neurons)
    order = fit_patterns_frequency.argsort(descending=True, stable=True)
    frequency = patterns.frequency()
    total = frequency.sum().item()
    return frequency[order[:size].to(frequency.device)].sum().item() / total if total else 0.0


def _overlap(patterns: PackedPatterns, centroids: Tensor, ids: Tensor) -> tuple[int, int, int]:
    """Σ|x ∧ c|, Σ|x| and Σ|c| over the points that have a cluster."""
    device = patterns.bits.device
    packed = PackedPatterns.from_dense(centroids.to(device))
    ids = ids.to(device)
    assigned = (ids >= 0).nonzero().squeeze(-1)
    shared = torch.zeros((), dtype=torch.int64, device=device)
    active, chosen = shared.clone(), shared.clone()
    for rows in chunk_slices(len(assigned), _block_rows(patterns.num_neurons)):
        points, sets = patterns.select(assigned[rows]), packed.select(ids[assigned[rows]])
        both = PackedPatterns(points.bits & sets.bits, patterns.num_neurons)
        shared += both.counts().sum()
        active += points.counts().sum()
        chosen += sets.counts().sum()
    return int(shared), int(active), int(chosen)
