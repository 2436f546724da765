"""Intervals over windows: against normal theory, and what must not matter."""

import math

import numpy as np
import pytest

from sparse_runtime.eval.quality.bootstrap import mean_interval, ratio_interval


def test_agrees_with_normal_theory():
    generator = np.random.default_rng(1)
    dense = generator.normal(1500, 300, size=400)
    rise = generator.normal(50, 20, size=400)
    low, high = ratio_interval(dense + rise, dense, [511] * 400)
    mean, error = rise.mean() / 511, rise.std() / math.sqrt(400) / 511
    assert low == pytest.approx(math.exp(mean - 1.96 * error), abs=4e-4)
    assert high == pytest.approx(math.exp(mean + 1.96 * error), abs=4e-4)
    # However much the windows differ in difficulty.
    harder = dense * 10
    assert ratio_interval(harder + rise, harder, [511] * 400) == pytest.approx((low, high))


def test_one_window_and_unequal_windows():
    assert ratio_interval([7.0], [5.0], [4]) == pytest.approx((math.exp(0.5),) * 2)
    # The same rise per token in windows of any length leaves nothing to vary.
    bounds = ratio_interval([2.0, 8.0, 3.0], [1.0, 4.0, 1.0], [10, 40, 20])
    assert bounds == pytest.approx((math.exp(0.1),) * 2)
    low, high = ratio_interval([2.0, 9.0], [1.0, 4.0], [10, 10])
    assert low == pytest.approx(math.exp(0.1))
    assert high == pytest.approx(math.exp(0.5))


def test_means_of_windows():
    generator = np.random.default_rng(2)
    totals = generator.gamma(4.0, 10.0, size=300)
    low, high = mean_interval(totals, [511] * 300)
    mean, error = totals.mean() / 511, totals.std() / math.sqrt(300) / 511
    assert low == pytest.approx(mean - 1.96 * error, rel=0.02)
    assert high == pytest.approx(mean + 1.96 * error, rel=0.02)
    assert mean_interval([3.0], [6]) == (0.5, 0.5)
    # Long windows count for as much as they hold.
    assert mean_interval([1.0, 4.0], [10, 40]) == pytest.approx((0.1, 0.1))
