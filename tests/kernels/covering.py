"""Covering arrays: few combinations of factors, with every pair, or every triple, of values."""

from collections.abc import Sequence
from itertools import combinations, product


def covering(strength: int, **factors: Sequence) -> list[dict]:
    """Rows {factor: value} such that any values of any ``strength`` factors occur together in one.

    Greedy and deterministic. Each row begins with a combination that is still missing and takes, factor
    by factor, the value that brings most of the missing ones with what the row has already.
    """
    names = list(factors)
    # A combination is a tuple of (position of a factor, position of its value), in order.
    missing = {
        tuple(zip(chosen, values, strict=True))
        for chosen in combinations(range(len(names)), strength)
        for values in product(*(range(len(factors[names[i]])) for i in chosen))
    }
    order = sorted(missing)
    rows = []
    for start in order:
        if start not in missing:
            continue
        row = dict(start)
        for i in range(len(names)):
            if i not in row:
                row[i] = max(
                    range(len(factors[names[i]])),
                    # Ties go to values in turn, so that no value is preferred.
                    key=lambda v, i=i: (
                        len(_gained(row, i, v, strength, missing)),
                        -((v + len(rows)) % len(factors[names[i]])),
                    ),
                )
        missing -= set(combinations(sorted(row.items()), strength))
        rows.append({name: factors[name][row[i]] for i, name in enumerate(names)})
    return rows


def _gained(row: dict, factor: int, value: int, strength: int, missing: set) -> list[tuple]:
    others = combinations(sorted(row.items()), strength - 1)
    found = (tuple(sorted((*other, (factor, value)))) for other in others)
    return [combination for combination in found if combination in missing]


def name_of(row: dict) -> str:
    """A row as the name of a test."""
    return "-".join(f"{name}={_short(value)}" for name, value in row.items())


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(_short, value))
    return str(value).removeprefix("torch.")
