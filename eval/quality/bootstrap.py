"""Confidence intervals by resampling a text's windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mean_interval(
    totals: Sequence[float],
    scored: Sequence[int],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap (Efron 1979) of a mean per token over windows.

    Args:
        totals: a figure of each window, summed over its scored tokens.
        scored: scored tokens of each window.
        level: of the interval.
        resamples: draws.
        seed: of the draws.

    Returns:
        Lower and upper bound; both are the mean itself where there is one window.
    """
    means = _drawn_means(np.asarray(totals, dtype=float), scored, resamples, seed)
    return _bounds(means, level)


def ratio_interval(
    nll: Sequence[float],
    dense_nll: Sequence[float],
    scored: Sequence[int],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap (Efron 1979) of a perplexity ratio over windows.

    Windows are drawn with both models' losses together, so what makes a window hard for both cancels.
    The interval says how much another text of the same kind could differ, not another build.

    Args:
        nll: negative log-likelihood of each window, in nats.
        dense_nll: the dense model's.
        scored: scored tokens of each window.
        level: of the interval.
        resamples: draws.
        seed: of the draws.

    Returns:
        Lower and upper bound; both are the ratio itself where there is one window.
    """
    rise = np.asarray(nll, dtype=float) - np.asarray(dense_nll, dtype=float)
    return _bounds(np.exp(_drawn_means(rise, scored, resamples, seed)), level)


def _drawn_means(
    totals: np.ndarray, scored: Sequence[int], resamples: int, seed: int
) -> np.ndarray:
    """Mean per token of each draw of windows [resamples]."""
    tokens = np.asarray(scored, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(totals), size=(resamples, len(totals)))
    means: np.ndarray = totals[drawn].sum(1) / tokens[drawn].sum(1)
    return means


def _bounds(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
