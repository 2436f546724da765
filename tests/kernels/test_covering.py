"""The covering arrays that choose the kernels' cases."""

from itertools import combinations, product

import pytest
from kernels.covering import covering, name_of

FACTORS = {"a": [1, 2, 3], "b": "xyzw", "c": [None, True], "d": [(1, 2), (3, 4), (5, 6)]}


@pytest.mark.parametrize("strength", [1, 2, 3, 4])
def test_every_combination_occurs(strength):
    rows = covering(strength, **FACTORS)
    for names in combinations(FACTORS, strength):
        found = {tuple(row[name] for name in names) for row in rows}
        assert found == set(product(*(FACTORS[name] for name in names)))


def test_rows_are_few_distinct_and_always_the_same():
    rows = covering(2, **FACTORS)
    assert 4 * 3 <= len(rows) <= 16  # the two longest factors give the least number there can be
    assert rows == covering(2, **FACTORS)
    assert len({name_of(row) for row in rows}) == len(rows)
    assert name_of(rows[0]).startswith("a=1-b=x-c=None-d=")
