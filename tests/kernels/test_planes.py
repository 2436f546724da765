"""Planes: bytes where the layout says, and codes that come back from them as they went in."""

import pytest
import torch

from sparse_runtime.cost import plane_size, scales_size
from sparse_runtime.errors import ConfigError
from sparse_runtime.kernels.planes import (
    PlaneFormat,
    Rounded,
    pack_linear,
    pack_neurons,
    pack_plane,
    unpack_linear,
    unpack_look,
    unpack_plane,
)

FORMATS = [PlaneFormat(base, residual) for base in (3, 4) for residual in (0, 2, 3, 4)]
every_format = pytest.mark.parametrize("form", FORMATS, ids=str)
# One group and less, units of one to four groups, several units, tails of one element and of 63.
SIZES = (1, 16, 63, 64, 65, 128, 190, 255, 256, 257, 319, 511, 512, 576, 600)


def codes_of(rows, size, bits, seed=0):
    """Random codes [rows, size] of which the first ones are the smallest and the largest."""
    most = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-most, most, (rows, size), generator=generator, dtype=torch.int8)
    codes[0, :2] = torch.tensor([-most, most - 1], dtype=torch.int8)[:size]
    return codes


def rounded_rows(rows, size, form, seed=0):
    lo = codes_of(rows, size, form.residual, seed + 1) if form.residual else None
    hi = codes_of(rows, size, form.base, seed)
    scales = torch.randn(rows, -(-size // 64), generator=torch.Generator().manual_seed(seed))
    return Rounded(hi, torch.zeros_like(hi) if lo is None else lo, scales.bfloat16(), form)


def assert_same(found, expected):
    assert found.format == expected.format
    for name in ("hi", "lo", "scales"):
        assert getattr(found, name).dtype == getattr(expected, name).dtype
        assert torch.equal(getattr(found, name), getattr(expected, name))
    for base in (False, True):
        assert torch.equal(found.values(base=base), expected.values(base=base))


def stored_code(data, bits, size, element):
    """The unsigned code of one element of a row's bytes, by the words of the layout."""
    groups = -(-size // 64)
    unit, g = divmod(element // 64, 4)
    u = min(4, groups - 4 * unit)
    c, rest = divmod(element % 64, 16)
    q, b = divmod(rest, 4)
    position = (q * u + g) * 4 + b
    data = data[8 * bits * 4 * unit :]
    if bits == 2:
        return data[position] >> 2 * c & 3
    if bits == 4:
        return data[16 * u * (c // 2) + position] >> 4 * (c % 2) & 15
    second = data[16 * u :]
    n = second[position % (8 * u)] >> 4 * (position // (8 * u)) & 15
    if c < 2:
        return data[position] >> 3 * c & 7
    return n & 7 if c == 2 else data[position] >> 6 | n >> 3 << 2


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_bytes_lie_where_the_layout_says(bits, size):
    codes = codes_of(2, size, bits)
    plane = pack_plane(codes, bits)
    assert plane.dtype == torch.uint8
    assert plane.shape == (2, plane_size(size, bits))
    for row, data in enumerate(plane.tolist()):
        found = [
            stored_code(data, bits, size, element) - 2 ** (bits - 1)
            for element in range(-(-size // 64) * 64)
        ]
        assert found[:size] == codes[row].tolist()
        assert not any(found[size:])  # codes past H are those of zero


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_come_back_for_every_size(bits):
    for size in range(1, 601):
        codes = codes_of(3, size, bits, seed=size)
        found = unpack_plane(pack_plane(codes, bits), bits, size)
        assert found.dtype == torch.int8
        assert torch.equal(found, codes), size


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_code_changes_bytes(bits):
    """No element shares its bits with another: changing one changes that one alone."""
    codes = codes_of(1, 330, bits)
    for element in range(330):
        other = codes.clone()
        other[0, element] = -1 - other[0, element]  # all of its bits
        changed = pack_plane(other, bits) ^ pack_plane(codes, bits)
        assert sum(int(byte).bit_count() for byte in changed[0]) == bits


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [5, 64, 300])
def test_no_rows(bits, size):
    plane = pack_plane(torch.empty(0, size, dtype=torch.int8), bits)
    assert plane.shape == (0, plane_size(size, bits))
    assert unpack_plane(plane, bits, size).shape == (0, size)


@every_format
@pytest.mark.parametrize("size", SIZES)
def test_linear_layers_come_back(form, size):
    rounded = rounded_rows(4, size, form)
    records = pack_linear(rounded)
    assert records.dtype == torch.uint8
    assert records.shape == (4, form.linear_size(size))
    assert_same(unpack_linear(records, form, size), rounded)
    # base | residual | scales
    first, second = plane_size(size, form.base), plane_size(size, form.residual)
    base, residual, scales = records.split([first, second, scales_size(size)], dim=1)
    assert torch.equal(base, pack_plane(rounded.hi, form.base))
    if form.residual:
        assert torch.equal(residual, pack_plane(rounded.lo, form.residual))
    assert torch.equal(scales.contiguous().view(torch.bfloat16), rounded.scales)


@every_format
@pytest.mark.parametrize("size", SIZES)
def test_neurons_come_back(form, size):
    parts = [rounded_rows(5, size, form, seed) for seed in (0, 10, 20)]
    planes = pack_neurons(*parts, "gelu")
    assert (planes.format, planes.hidden_size, planes.activation) == (form, size, "gelu")
    assert planes.look.shape == (5, form.look_size(size))
    assert planes.count.shape == (5, form.count_size(size))
    assert planes.refine.shape == (5, form.refine_size(size))
    for found, expected in zip(planes.rounded(), parts, strict=True):
        assert_same(found, expected)
    for rows in (slice(1, 4), slice(4, 5), slice(2, 2)):
        for found, part in zip(planes.rounded(rows), parts, strict=True):
            some = Rounded(part.hi[rows], part.lo[rows], part.scales[rows], form)
            assert_same(found, some)


@every_format
def test_streams_hold_their_parts_in_order(form):
    gate, up, down = (rounded_rows(3, 130, form, seed) for seed in (0, 10, 20))
    planes = pack_neurons(gate, up, down, "silu")
    raw = [part.scales.view(torch.uint8) for part in (gate, up, down)]
    bases = [pack_plane(part.hi, form.base) for part in (gate, up, down)]
    assert torch.equal(planes.look, torch.cat([bases[0], bases[1], raw[0], raw[1]], dim=1))
    assert torch.equal(planes.count, torch.cat([bases[2], raw[2]], dim=1))
    if form.residual:
        rest = [pack_plane(part.lo, form.residual) for part in (gate, up, down)]
        assert torch.equal(planes.refine, torch.cat(rest, dim=1))


def test_values():
    hi = torch.tensor([[-4, 3, 0, 1] + [0] * 60 + [2]], dtype=torch.int8)
    lo = torch.tensor([[-2, 1, 1, 0] + [0] * 60 + [-1]], dtype=torch.int8)
    rounded = Rounded(hi, lo, torch.tensor([[0.5, -2.0]]).bfloat16(), PlaneFormat(3, 2))
    assert rounded.values()[0, [0, 1, 2, 3, 4, 64]].tolist() == [-2.25, 1.625, 0.125, 0.5, 0, -3.5]
    assert rounded.values(base=True)[0, [0, 1, 2, 3, 4, 64]].tolist() == [-2, 1.5, 0, 0.5, 0, -4]


@pytest.mark.parametrize(("base", "residual"), [(2, 2), (5, 0), (3, 1), (4, 5), (4, -1), (0, 4)])
def test_formats_that_are_none(base, residual):
    with pytest.raises(ConfigError, match=rf"planes of {base} \+ {residual} bits; expected a base"):
        PlaneFormat(base, residual)


def test_formats_by_bits():
    found = {bits: str(PlaneFormat.of_bits(bits)) for bits in range(3, 9)}
    assert found == {3: "3", 4: "4", 5: "3 + 2", 6: "4 + 2", 7: "4 + 3", 8: "4 + 4"}
    for bits in range(3, 9):
        assert PlaneFormat.of_bits(bits).bits == bits
    for bits in (0, 1, 2, 9, 16, -4):
        with pytest.raises(ConfigError, match=f"weights of {bits} bits; expected one of 3, 4, 5"):
            PlaneFormat.of_bits(bits)


def test_sizes():
    # Of method.md's bits: 2 bytes of scale for a group of 64 are 1/4 bit.
    form = PlaneFormat(4, 2)
    assert form.linear_size(640) * 8 / 640 == 6.25
    assert form.look_size(640) * 8 / 640 == 2 * 4.25
    assert form.count_size(640) * 8 / 640 == 4.25
    assert form.refine_size(640) * 8 / 640 == 3 * 2
    assert PlaneFormat(3).linear_size(65) == 2 * (8 * 3 + 2)
    assert PlaneFormat(3).refine_size(65) == 0


def test_no_rows_in_any_layout():
    """Of no neurons, records that lie by columns are looked at like others."""
    form = PlaneFormat(4)
    look = torch.empty(form.look_size(64), 0, dtype=torch.uint8).t()
    gate, up = unpack_look(look, form, 64)
    assert gate.shape == up.shape == (0, 64)
