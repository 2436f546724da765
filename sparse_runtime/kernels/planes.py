"""Weights in planes: a base of 3 or 4 bits that stands alone, and a residual that makes it finer.

A row of H weights has one scale S (bfloat16) for every group of 64, and for every weight a signed base
code and a signed residual code:

    base value  S·hi                 hi ∈ [−2^(B−1), 2^(B−1) − 1]
    full value  S·(hi + lo / 2^r)    lo ∈ [−2^(r−1), 2^(r−1) − 1]

so that both grids hold zero, and what is read as the base is not read again for the full value. A plane
stores codes as unsigned numbers, code + 2^(bits−1).

A plane takes 8·bits bytes for each group. Groups are taken four at a time, a *unit*; the last unit of a
row has u = 1 to 4. In a unit, element 16·c + 4·q + b of group g (c, q, b ∈ 0…3) stands at position
(q·u + g)·4 + b of vector c, which has 16·u codes. The four vectors are packed as

    2 bits   one chunk of 16u bytes:   v0 | v1 << 2 | v2 << 4 | v3 << 6
    3 bits   one chunk of 16u bytes:   v0 | v1 << 3 | (v3 & 3) << 6
             one of 8u bytes, byte k:  n[k] | n[k + 8u] << 4,  n = v2 | (v3 >> 2) << 3
    4 bits   two chunks of 16u bytes:  v0 | v1 << 4  and  v2 | v3 << 4

An instruction that multiplies bytes and adds up four neighbors in a 32-bit lane thus works on all four
groups at a time, and ends with the groups' sums in lanes of their own. Codes past H are those of zero.

Rows are kept in records of bytes. Those of a neuron are three streams, read one after the other, as
far as the neuron matters:

    look    gate base | up base | gate scales [G] | up scales [G]
    count   down base | down scales [G]
    refine  gate residual | up residual | down residual

An FFN without a gate has its one matrix before the activation in gate's place, and nothing in up's.
Biases are no part of records.

A linear layer's row is one record:  base | residual | scales [G].

Float weights are looked at by the same records: :data:`LOOK_FORMAT`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime import cost
from sparse_runtime.cost import GROUP, LOOK_BITS, num_groups, plane_size, scales_size
from sparse_runtime.errors import ConfigError
from sparse_runtime.kernels.cpu.library import runs_natively

_UNIT = 4


@dataclass(frozen=True)
class PlaneFormat:
    """How many bits a weight has, and how many of them are in its base plane.

    Attributes:
        base: bits of the base plane, 3 or 4.
        residual: bits of the residual plane, 0 (there is none), 2, 3 or 4.

    Raises:
        ConfigError: for other bits.
    """

    base: int
    residual: int = 0

    def __post_init__(self) -> None:
        if self.base not in (3, 4) or self.residual not in (0, 2, 3, 4):
            raise ConfigError(
                f"planes of {self.base} + {self.residual} bits; expected a base of 3 or 4 and a "
                "residual of 0, 2, 3 or 4"
            )

    @classmethod
    def of_bits(cls, bits: int) -> PlaneFormat:
        """The format that goes by its number of bits: 3, 4, 5 (3 + 2), 6 (4 + 2), 7 or 8 (4 + 4).

        Raises:
            ConfigError: for another number.
        """
        if bits not in _BY_BITS:
            raise ConfigError(
                f"weights of {bits} bits; expected one of {', '.join(map(str, _BY_BITS))}"
            )
        return _BY_BITS[bits]

    @property
    def bits(self) -> int:
        """Bits of a weight, scales left out."""
        return self.base + self.residual

    def look_size(self, hidden_size: int, matrices: int = 2) -> int:
        """Bytes of a neuron's look record: of gate and up, or of one matrix without a gate."""
        return cost.look_size(hidden_size, self.base, matrices)

    def count_size(self, hidden_size: int) -> int:
        """Bytes of a neuron's count record."""
        return cost.count_size(hidden_size, self.base)

    def refine_size(self, hidden_size: int, matrices: int = 2) -> int:
        """Bytes of a neuron's refine record, with so many matrices before the activation."""
        return cost.refine_size(hidden_size, self.residual, matrices)

    def record_sizes(self, hidden_size: int, matrices: int = 2) -> dict[str, int]:
        """Bytes of a neuron's records by stream: ``look``, ``count`` and ``refine``."""
        return {
            "look": self.look_size(hidden_size, matrices),
            "count": self.count_size(hidden_size),
            "refine": self.refine_size(hidden_size, matrices),
        }

    def linear_size(self, in_features: int) -> int:
        """Bytes of a linear layer's row."""
        return plane_size(in_features, self.bits) + scales_size(in_features)

    def __str__(self) -> str:
        return f"{self.base} + {self.residual}" if self.residual else str(self.base)


_BY_BITS = {
    3: PlaneFormat(3),
    4: PlaneFormat(4),
    5: PlaneFormat(3, 2),
    6: PlaneFormat(4, 2),
    7: PlaneFormat(4, 3),
    8: PlaneFormat(4, 4),
}


#: What formats go by.
PLANE_BITS = tuple(_BY_BITS)
#: Of the look records that float weights have beside them.
LOOK_FORMAT = PlaneFormat(LOOK_BITS)


@dataclass(frozen=True, eq=False)
class Rounded:
    """Rows in codes.

    Attributes:
        hi: base codes [rows, H] int8.
        lo: residual codes [rows, H] int8; zeros without a residual.
        scales: S [rows, G] bfloat16.
        format: of the codes.
    """

    hi: Tensor
    lo: Tensor
    scales: Tensor
    format: PlaneFormat

    @classmethod
    def unpack(
        cls, base: Tensor, residual: Tensor, scales: Tensor, form: PlaneFormat, size: int
    ) -> Rounded:
        """Rows of so many weights, of their planes' bytes and those of their scales."""
        hi = unpack_plane(base, form.base, size)
        lo = unpack_plane(residual, form.residual, size) if form.residual else torch.zeros_like(hi)
        # contiguous() leaves the strides of an empty tensor, which may not be viewed then.
        scales = scales.clone(memory_format=torch.contiguous_format)
        return cls(hi, lo, scales.view(torch.bfloat16), form)

    def __getitem__(self, rows: slice) -> Rounded:
        """Some of the rows."""
        return Rounded(self.hi[rows], self.lo[rows], self.scales[rows], self.format)

    def values(self, *, base: bool = False) -> Tensor:
        """What the rows stand for, by base and residual or by the base alone: [rows, H] float32."""
        codes = self.hi.float()
        if self.format.residual and not base:
            codes += self.lo.float() / 2**self.format.residual
        wide = self.scales.float().repeat_interleave(GROUP, dim=1)[:, : codes.shape[1]]
        return codes * wide


def pack_plane(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes.

    Args:
        codes: [rows, H], integers in [−2^(bits−1), 2^(bits−1) − 1].
        bits: 2, 3 or 4.

    Returns:
        bytes [rows, 8·bits·G] uint8.
    """
    if runs_natively(codes):
        plane: Tensor = torch.ops.sparse_runtime.cpu_pack_plane(
            codes.to(torch.int8).contiguous(), bits
        )
        return plane
    return _packed(codes, bits)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """What defines :func:`pack_plane`."""
    rows, size = codes.shape
    padded = F.pad(codes.to(torch.int8), (0, -size % GROUP))
    groups = (padded + 2 ** (bits - 1)).view(torch.uint8).view(rows, num_groups(size), GROUP)
    whole = groups.shape[1] // _UNIT * _UNIT
    units = groups[:, :whole].reshape(rows, whole // _UNIT, _UNIT, GROUP)
    packed = [_pack_units(units, bits).flatten(1)]
    if whole < groups.shape[1]:
        packed.append(_pack_units(groups[:, None, whole:], bits).flatten(1))
    return torch.cat(packed, dim=1)


def unpack_plane(plane: Tensor, bits: int, size: int) -> Tensor:
    """Signed codes [rows, size] int8 of the bytes that :func:`pack_plane` makes."""
    rows, groups = plane.shape[0], num_groups(size)
    whole = groups // _UNIT * _UNIT
    parts = plane.split([8 * bits * whole, 8 * bits * (groups - whole)], dim=1)
    codes = [
        _unpack_units(
            parts[0].reshape(rows, whole // _UNIT, 8 * bits * _UNIT), bits, _UNIT
        ).flatten(1)
    ]
    if whole < groups:
        tail = _unpack_units(parts[1].unsqueeze(1), bits, groups - whole)
        codes.append(tail.flatten(1))
    return torch.cat(codes, dim=1)[:, :size].to(torch.int8) - 2 ** (bits - 1)


def _pack_units(groups: Tensor, bits: int) -> Tensor:
    """Bytes [rows, units, 8·bits·u] of stored codes [rows, units, u, 64]."""
    rows, units, u, _ = groups.shape
    vectors = groups.view(rows, units, u, 4, 4, 4).permute(3, 0, 1, 4, 2, 5)
    v0, v1, v2, v3 = vectors.reshape(4, rows, units, 16 * u)
    if bits == 2:
        return v0 | v1 << 2 | v2 << 4 | v3 << 6
    if bits == 4:
        return torch.cat([v0 | v1 << 4, v2 | v3 << 4], dim=-1)
    n = v2 | (v3 >> 2) << 3
    return torch.cat([v0 | v1 << 3 | (v3 & 3) << 6, n[..., : 8 * u] | n[..., 8 * u :] << 4], dim=-1)


def _unpack_units(data: Tensor, bits: int, u: int) -> Tensor:
    """Stored codes [rows, units, u, 64] of bytes [rows, units, 8·bits·u]."""
    rows, units, _ = data.shape
    first, rest = data[..., : 16 * u], data[..., 16 * u :]
    if bits == 2:
        vectors = [first >> shift & 3 for shift in (0, 2, 4, 6)]
    elif bits == 4:
        vectors = [first & 15, first >> 4, rest & 15, rest >> 4]
    else:
        n = torch.cat([rest & 15, rest >> 4], dim=-1)
        vectors = [first & 7, first >> 3 & 7, n & 7, first >> 6 | n >> 3 << 2]
    stacked = torch.stack(vectors).view(4, rows, units, 4, u, 4)
    return stacked.permute(1, 2, 4, 0, 3, 5).reshape(rows, units, u, GROUP)


def pack_linear(rounded: Rounded) -> Tensor:
    """Records [N, R] uint8 of a linear layer's rows; R as of :meth:`PlaneFormat.linear_size`."""
    base = pack_plane(rounded.hi, rounded.format.base)
    return torch.cat([base, _residual_plane(rounded), _bytes(rounded.scales)], dim=1)


def linear_parts(
    records: Tensor, form: PlaneFormat, in_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Base planes, residual planes and scales of a linear layer's records, as views."""
    sizes = [plane_size(in_features, bits) for bits in (form.base, form.residual)]
    base, residual, scales = records.split([*sizes, scales_size(in_features)], dim=1)
    return base, residual, scales


def unpack_linear(records: Tensor, form: PlaneFormat, in_features: int) -> Rounded:
    """The rows [N, in_features] of a linear layer's records."""
    return Rounded.unpack(*linear_parts(records, form, in_features), form, in_features)


# Base planes, residual planes and scales of rows.
_Part = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class NeuronPlanes:
    """An FFN's weights in planes, a neuron being one record in each stream.

    Attributes:
        look: base planes of gate and up, or of the one matrix of an FFN without a gate
            [I, :meth:`PlaneFormat.look_size`] uint8.
        count: down's base plane [I, :meth:`PlaneFormat.count_size`] uint8.
        refine: residual planes [I, :meth:`PlaneFormat.refine_size`] uint8, of no width without.
        format: of the weights.
        hidden_size: H.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu`` or ``relu2`` (relu squared).
        gate_bias: added to gate·x [I] float32, or None.
        up_bias: added to up·x [I] float32, or None.
    """

    look: Tensor
    count: Tensor
    refine: Tensor
    format: PlaneFormat
    hidden_size: int
    activation: str = "silu"
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None

    @property
    def matrices(self) -> int:
        """Matrices before the activation: 2, or 1 without a gate."""
        return _look_matrices(self.look, self.format, self.hidden_size)

    def parts(self, rows: slice | None = None) -> tuple[_Part, _Part | None, _Part]:
        """Base planes, residual planes and scales of gate, up and transposed down, as views.

        Up is None without a gate.
        """
        rows = slice(None) if rows is None else rows  # torch 2.11 cannot compile it as a default
        size, form = self.hidden_size, self.format
        bases = _look_parts(self.look[rows], form, size)
        down, scales = self.count[rows].split(
            [plane_size(size, form.base), scales_size(size)], dim=1
        )
        bases.append((down, scales))
        residuals = self.refine[rows].split([plane_size(size, form.residual)] * len(bases), dim=1)
        first, *rest = [
            (base, residual, scales)
            for (base, scales), residual in zip(bases, residuals, strict=True)
        ]
        return first, rest[0] if len(rest) > 1 else None, rest[-1]

    def some(self, rows: slice) -> NeuronPlanes:
        """Some of the neurons, as views."""
        look, count, refine = (stream[rows] for stream in (self.look, self.count, self.refine))
        biases = (None if b is None else b[rows] for b in (self.gate_bias, self.up_bias))
        return NeuronPlanes(
            look, count, refine, self.format, self.hidden_size, self.activation, *biases
        )

    def rounded(self, rows: slice | None = None) -> tuple[Rounded, Rounded | None, Rounded]:
        """Gate, up (None without a gate) and transposed down [I, H] in codes, or some of their rows."""
        gate, up, down = self.parts(rows)
        return self._rounded(gate), None if up is None else self._rounded(up), self._rounded(down)

    def _rounded(self, part: _Part) -> Rounded:
        return Rounded.unpack(*part, self.format, self.hidden_size)


def pack_look(gate: Rounded, up: Rounded | None) -> Tensor:
    """Look records [I, :meth:`PlaneFormat.look_size`] uint8 of rows [I, H] of one format."""
    parts = [gate] if up is None else [gate, up]
    bases = [pack_plane(part.hi, part.format.base) for part in parts]
    return torch.cat([*bases, *(_bytes(part.scales) for part in parts)], dim=1)


def unpack_look(look: Tensor, form: PlaneFormat, hidden_size: int) -> tuple[Tensor, Tensor | None]:
    """Base values of gate and up [I, H] float32, of look records [I, bytes]; of up None without it."""
    base = PlaneFormat(form.base)
    gate, *up = (
        Rounded.unpack(plane, plane[:, :0], scales, base, hidden_size).values()
        for plane, scales in _look_parts(look, form, hidden_size)
    )
    return gate, up[0] if up else None


def _look_parts(look: Tensor, form: PlaneFormat, size: int) -> list[tuple[Tensor, Tensor]]:
    """Base planes and scales of gate, and of up if there is one, as views."""
    base, scales = plane_size(size, form.base), scales_size(size)
    matrices = _look_matrices(look, form, size)
    parts = look.split([base] * matrices + [scales] * matrices, dim=1)
    return list(zip(parts[:matrices], parts[matrices:], strict=True))


def _look_matrices(look: Tensor, form: PlaneFormat, size: int) -> int:
    return 1 if look.shape[1] == form.look_size(size, 1) else 2


def pack_neurons(
    gate: Rounded, up: Rounded | None, down_t: Rounded, activation: str
) -> NeuronPlanes:
    """An FFN's neurons, of rows [I, H] of one format; up is None without a gate."""
    parts = [part for part in (gate, up, down_t) if part is not None]
    return NeuronPlanes(
        pack_look(gate, up),
        torch.cat([pack_plane(down_t.hi, down_t.format.base), _bytes(down_t.scales)], dim=1),
        torch.cat([_residual_plane(part) for part in parts], dim=1),
        gate.format,
        gate.hi.shape[1],
        activation,
    )


def _residual_plane(rounded: Rounded) -> Tensor:
    """Of no width without a residual."""
    if not rounded.format.residual:
        return rounded.lo[:, :0].view(torch.uint8)
    return pack_plane(rounded.lo, rounded.format.residual)


def _bytes(scales: Tensor) -> Tensor:
    return scales.contiguous().view(torch.uint8)
