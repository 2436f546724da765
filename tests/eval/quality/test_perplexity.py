"""Perplexity against transformers' own loss, and its windows."""

import copy
import math

import pytest
import torch

from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.eval.quality import perplexity as perplexity_module
from sparse_runtime.eval.quality.perplexity import perplexity, score_text, text_windows


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


@pytest.mark.parametrize(("prompt_tokens", "kept_bytes"), [(0, 2**30), (5, 2**30), (0, 1000)])
def test_distance_from_a_reference(tiny_model, prompt_tokens, kept_bytes, monkeypatch):
    monkeypatch.setattr(perplexity_module, "_KEPT_BYTES", kept_bytes)
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(0.3)
    ids = tokens(88)
    options = {"window": 16, "stride": 8, "prompt_tokens": prompt_tokens}
    dense = score_text(tiny_model, ids, keep=True, **options)
    vocabulary, hidden_size = tiny_model.lm_head.weight.shape
    assert dense.kept[0].shape[1] == (vocabulary if kept_bytes > 1000 else hidden_size)
    score = score_text(other, ids, reference=dense, **options)
    assert score.nll == pytest.approx(score_text(other, ids, **options).nll)
    windows = text_windows(ids, 16, 8, prompt_tokens)
    for number, (window, scored) in enumerate(windows):
        with torch.inference_mode():
            p, q = (
                model(window[None]).logits[0, -scored - 1 : -1].softmax(-1)
                for model in (tiny_model, other)
            )
        expected = (p * (p / q).log()).sum()
        assert score.divergence[number] == pytest.approx(float(expected), rel=1e-3)
        assert score.agreed[number] == int((p.argmax(-1) == q.argmax(-1)).sum())
    total = sum(scored for _, scored in windows)
    assert score.kl == pytest.approx(sum(score.divergence) / total)
    assert 0 < score.top1 < 1
    itself = score_text(tiny_model, ids, reference=dense, **options)
    assert itself.kl == pytest.approx(0, abs=1e-6)
    assert itself.top1 == 1
    assert dense.kl is dense.top1 is None


@pytest.mark.parametrize("kept_bytes", [2**30, 0])
def test_a_packed_head_is_compared_with_the_references_own(tiny_model, monkeypatch, kept_bytes):
    from sparse_runtime.ffn.plane_packing import pack_model

    monkeypatch.setattr(perplexity_module, "_KEPT_BYTES", kept_bytes)
    ids = tokens(64)
    with torch.inference_mode():
        expected = tiny_model(ids[None]).logits[0, :-1].log_softmax(-1)
    reference = score_text(tiny_model, ids, window=64, keep=True)
    assert (reference.head is None) == (kept_bytes > 0)
    pack_model(tiny_model, None, linears=4, modules_to_not_convert=["layers"])
    with torch.inference_mode():
        found = tiny_model(ids[None]).logits[0, :-1].log_softmax(-1)
    score = score_text(tiny_model, ids, window=64, reference=reference)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean().item()
    assert divergence > 1e-3
    assert score.kl == pytest.approx(divergence, rel=1e-3)
