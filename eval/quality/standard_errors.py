"""Standard errors of means over documents, prompts or windows, and of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def mean_error(values: Sequence[float]) -> float | None:
    """Standard error of a mean: the sample's deviation ÷ √n; None of fewer than two values."""
    if len(values) < 2:
        return None
    return float(np.std(np.asarray(values, dtype=float), ddof=1) / math.sqrt(len(values)))


def paired(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """The mean of ``after`` − ``before`` over the same documents, and its standard error.

    What makes a document hard for both cancels, so that the error is smaller than the means' own.

    Args:
        before: a figure of each document [n].
        after: the same of another model, in the same order [n].

    Returns:
        ``difference`` and ``difference_error`` (None of fewer than two documents).
    """
    differences = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    return {
        "difference": float(differences.mean()),
        "difference_error": mean_error(differences.tolist()),
    }


def beside(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """The means of a dense and a sparse model over the same documents, with standard errors.

    Args:
        before: a figure of each document [n], of the dense model.
        after: the same of the sparse one, in the same order [n].

    Returns:
        ``dense``, ``dense_error``, ``sparse``, ``sparse_error``, ``difference``, ``difference_error``
        (paired); errors are None of fewer than two documents.
    """
    return {
        "dense": float(np.mean(before)),
        "dense_error": mean_error(before),
        "sparse": float(np.mean(after)),
        "sparse_error": mean_error(after),
        **paired(before, after),
    }
