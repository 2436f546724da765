"""Perplexity over windows of a text, and how far a model's predictions are from another's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.cost import element_size
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.models.ffn_layers import decoder_of
from sparse_runtime.models.output_head import OutputHead, output_head
from sparse_runtime.progress import ProgressReporter, SilentProgress

# Of a reference's logits; above it its states are kept, and go through the output head in every run.
_KEPT_BYTES = 2**30
# Tokens whose logits are made at a time: those of a long window would take gigabytes.
_HEAD_TOKENS = 512


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text, token by token.

    Attributes:
        losses: negative log-likelihoods of each window's scored tokens [scored] float32, in nats, on
            the CPU as all that follows.
        kept: with ``keep``, of each window's scored tokens, the logits [scored, V], or the last hidden
            states [scored, H] where the logits of all windows would take more than 1 GiB.
        head: what makes logits of such states; None where logits are kept.
        divergences: with a reference, KL(reference ‖ model) at each window's scored tokens [scored]
            float32, in nats.
        agreements: with a reference, at which of each window's scored tokens the likeliest next token
            is the reference's [scored] bool.
    """

    losses: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    head: Any = None
    divergences: list[Tensor] = field(default_factory=list)
    agreements: list[Tensor] = field(default_factory=list)

    @property
    def scored(self) -> list[int]:
        """Scored tokens of each window."""
        return [len(losses) for losses in self.losses]

    @property
    def nll(self) -> list[float]:
        """Negative log-likelihood of each window, summed over its scored tokens, in nats."""
        return _sums(self.losses)

    @property
    def divergence(self) -> list[float]:
        """With a reference, KL(reference ‖ model) of each window, summed over its scored tokens."""
        return _sums(self.divergences)

    @property
    def agreed(self) -> list[int]:
        """With a reference, tokens of each window whose likeliest next token is the reference's."""
        return [int(window.sum()) for window in self.agreements]

    @property
    def kl(self) -> float | None:
        """KL divergence per scored token in nats; None without a reference."""
        return sum(self.divergence) / sum(self.scored) if self.divergences else None

    @property
    def top1(self) -> float | None:
        """Share of the tokens with the reference's likeliest next token; None without a reference."""
        return sum(self.agreed) / sum(self.scored) if self.agreements else None

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per scored token."""
        return math.exp(sum(self.nll) / sum(self.scored))


def _sums(windows: Sequence[Tensor]) -> list[float]:
    return [window.sum(dtype=torch.float64).item() for window in windows]


def text_windows(
    tokens: Tensor, window: int, stride: int, prompt_tokens: int = 0
) -> list[tuple[Tensor, int]]:
    """Cut a token stream into windows.

    Each window is scored on the tokens that no earlier window scored; its first token is never
    scored, as nothing precedes it, nor are the tokens of its prompt. A last, shorter window is kept
    if it scores a token.

    Args:
        tokens: [n] int64.
        window: tokens per window, at least 2.
        stride: distance of window starts, 1 to ``window``.
        prompt_tokens: tokens at the start of each window that are its prompt, 0 to ``window`` − 2:
            the first token after a prompt is predicted from the prompt alone.

    Returns:
        Pairs of window [≤ window] and the number of its last tokens that are scored.

    Raises:
        ConfigError: ``window``, ``stride`` or ``prompt_tokens`` is out of range.
        DataError: the text is shorter than one window.
    """
    check_windows(window, stride, prompt_tokens)
    if len(tokens) < window:
        raise DataError(
            f"the text has {len(tokens)} tokens, fewer than one window of {window}; give a longer "
            "text or a smaller --window"
        )
    windows: list[tuple[Tensor, int]] = []
    scored_to = 0
    for start in range(0, len(tokens), stride):
        end = min(start + window, len(tokens))
        scored = end - max(scored_to, start + max(prompt_tokens, 1))
        if scored > 0:
            windows.append((tokens[start:end], scored))
        scored_to = end
        if end == len(tokens):
            break
    return windows


def check_windows(window: int, stride: int, prompt_tokens: int = 0) -> None:
    """Refuse arguments of :func:`text_windows` that fit no text. Raises ConfigError."""
    if window < 2:
        raise ConfigError(f"window is {window}; expected 2 tokens or more")
    if not 1 <= stride <= window:
        raise ConfigError(f"stride is {stride}; expected 1 to the window, {window}")
    if not 0 <= prompt_tokens <= window - 2:
        raise ConfigError(
            f"prompt_tokens is {prompt_tokens}; expected 0 to {window - 2}, so that a window of "
            f"{window} holds two tokens more"
        )


@torch.inference_mode()
def score_text(
    model: Any,
    tokens: Tensor,
    *,
    window: int,
    stride: int | None = None,
    prompt_tokens: int = 0,
    batch_windows: int = 2,
    reference: TextScore | None = None,
    keep: bool = False,
    progress: ProgressReporter | None = None,
    description: str = "perplexity",
) -> TextScore:
    """Score a text window by window.

    Args:
        model: a causal language model; its logits are compared in float32.
        tokens: [n] int64.
        window: tokens per window.
        stride: distance of window starts; ``window`` (no overlap) if None.
        prompt_tokens: tokens at the start of each window that are not scored. How they run is up to
            the model: see ``sparse_runtime.eval.quality.forwards``.
        batch_windows: windows per forward pass.
        reference: another score of the same windows, with ``keep``, to measure the distance from.
        keep: keep what a ``reference`` needs.
        progress: reports one unit per window.
        description: text of the progress bar.

    Raises:
        ConfigError, DataError: see :func:`text_windows`.
        UnsupportedArchitectureError: see :func:`sparse_runtime.models.output_head.output_head`.
    """
    windows = text_windows(tokens, window, window if stride is None else stride, prompt_tokens)
    device = next(model.parameters()).device
    decoder, head = decoder_of(model), output_head(model)
    total = sum(scored for _, scored in windows)
    vocabulary = model.get_output_embeddings().out_features
    fits = total * vocabulary * element_size(model.dtype) <= _KEPT_BYTES
    score = TextScore(head=head if keep and not fits else None)
    with (progress or SilentProgress()).task(description, len(windows)) as advance:
        for batch in _equal_length_batches(windows, batch_windows):
            ids = torch.stack([w for w, _ in batch]).to(device)
            states = decoder(input_ids=ids, use_cache=False).last_hidden_state
            for row, (_, scored) in enumerate(batch):
                own = states[row, -scored - 1 : -1]
                _score_window(score, head, own, ids[row, -scored:], reference, keep and fits)
                if keep and not fits:
                    score.kept.append(own.cpu())
            advance(len(batch))
    return score


def _score_window(
    score: TextScore,
    head: OutputHead,
    states: Tensor,
    targets: Tensor,
    reference: TextScore | None,
    keep_logits: bool,
) -> None:
    """Add a window to a score, given the states [scored, H] that predict its tokens [scored]."""
    theirs = None if reference is None else reference.kept[len(score.losses)]
    losses, divergences, agreements, kept = [], [], [], []
    for start in range(0, len(targets), _HEAD_TOKENS):
        part = slice(start, start + _HEAD_TOKENS)
        logits = head(states[part])
        log_q = logits.float().log_softmax(-1)
        losses.append(F.nll_loss(log_q, targets[part].to(log_q.device), reduction="none").cpu())
        if keep_logits:
            kept.append(logits.cpu())
        if reference is not None and theirs is not None:
            expected = theirs[part].to(logits.device)
            expected = expected if reference.head is None else reference.head(expected)
            agreements.append((expected.argmax(-1) == logits.argmax(-1)).cpu())
            divergences.append(_divergence(expected.float().log_softmax(-1), log_q).cpu())
    score.losses.append(torch.cat(losses))
    if keep_logits:
        score.kept.append(torch.cat(kept))
    if reference is not None:
        score.agreements.append(torch.cat(agreements))
        score.divergences.append(torch.cat(divergences))


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities [n, V] float32 at each token [n]; ``log_p`` is overwritten."""
    # F.kl_div takes half as long again.
    difference = log_p - log_q
    return log_p.exp_().mul_(difference).sum(-1)


def perplexity(model: Any, tokens: Tensor, **options: Any) -> float:
    """exp of the mean negative log-likelihood per scored token; arguments of :func:`score_text`."""
    return score_text(model, tokens, **options).perplexity


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
