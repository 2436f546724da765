"""Distance from the dense model by position: does it grow with the text before a token?"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.errors import DataError
from sparse_runtime.eval.quality.perplexity import TextScore
from sparse_runtime.eval.quality.standard_errors import mean_error, paired

#: End of the first range of positions; each further one ends at twice the last.
FIRST_RANGE = 256


def position_ranges(window: int) -> list[tuple[int, int]]:
    """Ranges [from, to) of positions in a window: to 256, to 512, to 1024, … to its end."""
    edges = [0]
    edge = FIRST_RANGE
    while edge < window:
        edges.append(edge)
        edge *= 2
    edges.append(window)
    return list(pairwise(edges))


def whole_windows(tokens: Tensor, window: int) -> Tensor:
    """The tokens of a text [n] int64 that fill whole windows, so that all positions have as many.

    Raises:
        DataError: the text is shorter than one window.
    """
    if len(tokens) < window:
        raise DataError(
            f"the text has {len(tokens)} tokens, fewer than one window of {window}; give a longer "
            "text or a smaller --window"
        )
    return tokens[: len(tokens) // window * window]


def by_position(score: TextScore, dense: TextScore, window: int) -> list[dict[str, Any]]:
    """Compare two scores of the same whole windows, range by range.

    Args:
        score: of the sparse model, with ``dense`` as its reference.
        dense: of the dense model.
        window: tokens per window; the last of them are scored, as many in each window.

    Returns:
        Of each range that has a scored token: ``from`` and ``to`` (positions of the predicted
        tokens), ``windows``, ``tokens``, ``dense`` and ``sparse`` (perplexities), ``ratio``, ``kl``
        (nats per token), ``top1``, and ``ratio_error`` and ``kl_error``: standard errors over windows,
        None of one window. That of the ratio is of its logarithm, times the ratio: both models see the
        same windows.
    """
    losses, dense_losses = (torch.stack(s.losses).double() for s in (score, dense))
    divergences = torch.stack(score.divergences).double()
    agreements = torch.stack(score.agreements).double()
    first = window - losses.shape[1]
    rows = []
    for start, end in position_ranges(window):
        part = slice(max(0, start - first), end - first)
        if end <= first:
            continue
        means, dense_means, kl, top1 = (
            values[:, part].mean(1) for values in (losses, dense_losses, divergences, agreements)
        )
        rise = paired(dense_means.tolist(), means.tolist())
        ratio, error = math.exp(rise["difference"]), rise["difference_error"]
        rows.append(
            {
                "from": max(start, first),
                "to": end,
                "windows": len(kl),
                "tokens": losses[:, part].numel(),
                "dense": dense_means.mean().exp().item(),
                "sparse": means.mean().exp().item(),
                "ratio": ratio,
                "ratio_error": None if error is None else ratio * error,
                "kl": kl.mean().item(),
                "kl_error": mean_error(kl.tolist()),
                "top1": top1.mean().item(),
            }
        )
    return rows
