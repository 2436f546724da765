"""Perplexity against transformers' own loss, and its windows."""

import math

import pytest
import torch

from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.eval.perplexity import perplexity, text_windows


def tokens(count):
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_matches_the_models_own_loss(tiny_model, batch):
    ids = tokens(80)
    with torch.inference_mode():
        losses = [
            tiny_model(row.unsqueeze(0), labels=row.unsqueeze(0)).loss for row in ids.view(5, 16)
        ]
    expected = math.exp(sum(losses) / 5)
    actual = perplexity(tiny_model, ids, window=16, batch_windows=batch)
    assert actual == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("count", "window", "stride"), [(10, 4, 4), (10, 4, 2), (11, 4, 3), (4, 4, 1), (9, 4, 4)]
)
def test_each_token_is_scored_once(count, window, stride):
    ids = torch.arange(count)
    scored = []
    for piece, number in text_windows(ids, window, stride):
        assert len(piece) <= window
        scored += piece[-number:].tolist()
    assert len(scored) == len(set(scored))
    if stride < window:
        assert scored == list(range(1, count))
    else:
        assert scored == [i for i in range(count) if i % window]


def test_windows_that_cannot_work():
    with pytest.raises(DataError, match="3 tokens, fewer than one window of 4"):
        text_windows(torch.arange(3), 4, 4)
    for window, stride in ((1, 1), (4, 0), (4, 5)):
        with pytest.raises(ConfigError):
            text_windows(torch.arange(9), window, stride)
