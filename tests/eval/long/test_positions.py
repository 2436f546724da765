"""Figures by position against the same windows scored by hand."""

import pytest
import torch
from helpers import logits, random_cluster_set

from sparse_runtime import sparsify
from sparse_runtime.errors import DataError
from sparse_runtime.eval.long.positions import by_position, position_ranges, whole_windows
from sparse_runtime.eval.quality import perplexity as perplexity_module
from sparse_runtime.eval.quality.artifact_quality import EVALUATION
from sparse_runtime.eval.quality.perplexity import score_text

WINDOW = 300
IDS = torch.randint(0, 250, (3 * WINDOW + 7,), generator=torch.Generator().manual_seed(0))


def test_ranges_cover_the_window_once():
    assert position_ranges(8192) == [
        (0, 256), (256, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8192),
    ]  # fmt: skip
    assert position_ranges(100) == [(0, 100)]
    assert position_ranges(256) == [(0, 256)]
    assert position_ranges(300) == [(0, 256), (256, 300)]


def test_whole_windows():
    assert len(whole_windows(IDS, WINDOW)) == 3 * WINDOW
    with pytest.raises(DataError, match="907 tokens, fewer than one window of 908"):
        whole_windows(IDS, 908)


@pytest.mark.parametrize("prompt_tokens", [0, 20, 280])
def test_each_range_by_hand(tiny_model, prompt_tokens, monkeypatch):
    monkeypatch.setattr(perplexity_module, "_HEAD_TOKENS", 64)
    text = whole_windows(IDS, WINDOW)
    windows = text.view(3, WINDOW)
    options = {"window": WINDOW, "prompt_tokens": prompt_tokens, "batch_windows": 1}
    dense = score_text(tiny_model, text, keep=True, **options)
    p = torch.stack([logits(tiny_model, w[None])[0] for w in windows]).log_softmax(-1)
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), config=EVALUATION)
    q = torch.stack([logits(tiny_model, w[None])[0] for w in windows]).log_softmax(-1)
    rows = by_position(score_text(tiny_model, text, reference=dense, **options), dense, WINDOW)
    first = max(1, prompt_tokens)
    assert [(row["from"], row["to"]) for row in rows] == (
        [(first, 256), (256, 300)] if first < 256 else [(first, 300)]
    )
    for row in rows:
        at = slice(row["from"] - 1, row["to"] - 1)
        target = windows[:, row["from"] : row["to"], None]
        dense_loss, loss = (-x[:, at].gather(2, target)[..., 0] for x in (p, q))
        kl = (p.exp() * (p - q)).sum(-1)[:, at]
        assert row["windows"] == 3
        assert row["tokens"] == loss.numel()
        assert row["dense"] == pytest.approx(dense_loss.mean().exp().item(), rel=1e-4)
        assert row["sparse"] == pytest.approx(loss.mean().exp().item(), rel=1e-4)
        assert row["ratio"] == pytest.approx(row["sparse"] / row["dense"], rel=1e-6)
        assert row["kl"] == pytest.approx(kl.mean().item(), rel=1e-3)
        assert row["kl_error"] == pytest.approx(kl.mean(1).std().item() / 3**0.5, rel=1e-3)
        rise = (loss - dense_loss).mean(1)
        error = row["ratio"] * rise.std().item() / 3**0.5
        assert row["ratio_error"] == pytest.approx(error, rel=1e-3)
        assert row["top1"] == pytest.approx(
            (p.argmax(-1) == q.argmax(-1))[:, at].float().mean().item()
        )
    assert rows[0]["kl"] > 0.01


def test_one_window_has_no_errors(tiny_model):
    text = IDS[:WINDOW]
    dense = score_text(tiny_model, text, window=WINDOW, keep=True)
    (row, _) = by_position(
        score_text(tiny_model, text, window=WINDOW, reference=dense), dense, WINDOW
    )
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert row["kl_error"] is row["ratio_error"] is None
