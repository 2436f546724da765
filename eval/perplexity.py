"""Perplexity over windows of a text."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.progress import ProgressReporter, SilentProgress


def text_windows(tokens: Tensor, window: int, stride: int) -> list[tuple[Tensor, int]]:
    """Cut a token stream into windows.

    Each window is scored on the tokens that no earlier window scored; its first token is never
    scored, as nothing precedes it. A last, shorter window is kept if it scores a token.

    Args:
        tokens: [n] int64.
        window: tokens per window, at least 2.
        stride: distance of window starts, 1 to ``window``.

    Returns:
        Pairs of window [≤ window] and the number of its last tokens that are scored.

    Raises:
        ConfigError: ``window`` or ``stride`` is out of range.
        DataError: the text is shorter than one window.
    """
    if window < 2:
        raise ConfigError(f"window is {window}; expected 2 tokens or more")
    if not 1 <= stride <= window:
        raise ConfigError(f"stride is {stride}; expected 1 to the window, {window}")
    if len(tokens) < window:
        raise DataError(
            f"the text has {len(tokens)} tokens, fewer than one window of {window}; give a longer "
            "text or a smaller --window"
        )
    windows: list[tuple[Tensor, int]] = []
    scored_to = 0
    for start in range(0, len(tokens), stride):
        end = min(start + window, len(tokens))
        scored = end - max(scored_to, start + 1)
        if scored > 0:
            windows.append((tokens[start:end], scored))
        scored_to = end
        if end == len(tokens):
            break
    return windows


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    window: int,
    stride: int | None = None,
    batch_windows: int = 2,
    progress: ProgressReporter | None = None,
    description: str = "perplexity",
) -> float:
    """exp of the mean negative log-likelihood per scored token.

    Args:
        model: a causal language model; logits are compared in float32.
        tokens: [n] int64.
        window: tokens per window.
        stride: distance of window starts; ``window`` (no overlap) if None.
        batch_windows: windows per forward pass.
        progress: reports one unit per window.
        description: text of the progress bar.

    Raises:
        ConfigError, DataError: see :func:`text_windows`.
    """
    windows = text_windows(tokens, window, window if stride is None else stride)
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with (progress or SilentProgress()).task(description, len(windows)) as advance:
        for batch in _equal_length_batches(windows, batch_windows):
            ids = torch.stack([w for w, _ in batch]).to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            for row, (_, scored) in enumerate(batch):
                total += F.cross_entropy(
                    logits[row, -scored - 1 : -1].float(), ids[row, -scored:], reduction="sum"
                ).item()
                count += scored
            advance(len(batch))
    return math.exp(total / count)


def _equal_length_batches(
    windows: list[tuple[Tensor, int]], size: int
) -> list[list[tuple[Tensor, int]]]:
    batches: list[list[tuple[Tensor, int]]] = []
    for item in windows:
        if batches and len(batches[-1]) < size and len(batches[-1][0][0]) == len(item[0]):
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches
