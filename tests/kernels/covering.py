"""Covering arrays: few combinations of factors, with every pair, or every triple, of values."""

from collections.abc import Sequence
from itertools import combinations, product


def covering(strength: int, **factors: Sequence) -> list[dict]:
    """Rows {factor: value} such that any values of any ``strength`` factors occur together in one.

    Greedy and deterministic. Each row begins with a combination that is still missing and takes, factor
    by factor, the value that brings most of the missing ones with what the row has already.
    """
    # Each value of each factor is a bit; a combination is an integer with ``strength`` bits.
    bits, values = [], []
    for name, choices in factors.items():
        bits.append([1 << (len(values) + i) for i in range(len(choices))])
        values += [(name, choice) for choice in choices]
    order = [sum(chosen) for some in combinations(bits, strength) for chosen in product(*some)]
    missing = set(order)
    rows: list[list[int]] = []
    for start in order:
        if start not in missing:
            continue
        row = [bit for choices in bits for bit in choices if bit & start]
        for choices in bits:
            if any(bit & start for bit in choices):
                continue
            others = [sum(chosen) for chosen in combinations(row, strength - 1)]
            # Ties go to the values in turn, so that none is preferred.
            turned = choices[len(rows) % len(choices) :] + choices[: len(rows) % len(choices)]
            row.append(max(turned, key=lambda bit: sum(other | bit in missing for other in others)))
        missing.difference_update(map(sum, combinations(row, strength)))
        rows.append(sorted(row))
    return [dict(values[bit.bit_length() - 1] for bit in row) for row in rows]


def name_of(row: dict) -> str:
    """A row as the name of a test."""
    return "-".join(f"{name}={_short(value)}" for name, value in row.items())


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(_short, value))
    return str(value).removeprefix("torch.")
