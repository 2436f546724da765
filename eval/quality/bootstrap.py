"""Confidence intervals by resampling a text's windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
    tokens = np.asarray(scored, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(rise), size=(resamples, len(rise)))
    ratios = np.exp(rise[drawn].sum(1) / tokens[drawn].sum(1))
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
