"""Perplexity over windows of a text, and how far a model's predictions are from another's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.cost import element_size
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.models.ffn_layers import decoder_of
from sparse_runtime.models.output_head import output_head
from sparse_runtime.progress import ProgressReporter, SilentProgress

# Of a reference's logits; above it its states are kept, and go through the output head in every run.
_KEPT_BYTES = 2**30


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text.

    Attributes:
        nll: negative log-likelihood of each window, summed over its scored tokens, in nats.
        scored: scored tokens of each window.
        kept: with ``keep``, of each window's scored tokens, the logits [scored, V], or the last hidden
            states [scored, H] where the logits of all windows would take more than 1 GiB.
        head: what makes logits of such states; None where logits are kept.
        divergence: with a reference, KL(reference ‖ model) of each window, summed over its scored
            tokens, in nats.
        agreed: with a reference, scored tokens of each window whose likeliest next token is the
            reference's.
    """

    nll: list[float]
    scored: list[int]
    kept: list[Tensor] = field(default_factory=list)
    head: Any = None
    divergence: list[float] = field(default_factory=list)
    agreed: list[int] = field(default_factory=list)

    @property
    def kl(self) -> float | None:
        """KL divergence per scored token in nats; None without a reference."""
        return sum(self.divergence) / sum(self.scored) if self.divergence else None

    @property
    def top1(self) -> float | None:
        """Share of the tokens with the reference's likeliest next token; None without a reference."""
        return sum(self.agreed) / sum(self.scored) if self.agreed else None

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per scored token."""
        return math.exp(sum(self.nll) / sum(self.scored))


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
    scored_tokens = [scored for _, scored in windows]
    vocabulary = model.get_output_embeddings().out_features
    logits_bytes = sum(scored_tokens) * vocabulary * element_size(model.dtype)
    keep_logits = logits_bytes <= _KEPT_BYTES
    score = TextScore([], scored_tokens, head=head if keep and not keep_logits else None)
    with (progress or SilentProgress()).task(description, len(windows)) as advance:
        for batch in _equal_length_batches(windows, batch_windows):
            ids = torch.stack([w for w, _ in batch]).to(device)
            states = decoder(input_ids=ids, use_cache=False).last_hidden_state
            for row, (_, scored) in enumerate(batch):
                own = states[row, -scored - 1 : -1]
                logits = head(own)
                if keep:
                    score.kept.append((logits if keep_logits else own).cpu())
                log_q = logits.float().log_softmax(-1)
                if reference is not None:
                    theirs = reference.kept[len(score.nll)].to(logits.device)
                    theirs = theirs if reference.head is None else reference.head(theirs)
                    score.agreed.append(int((theirs.argmax(-1) == logits.argmax(-1)).sum()))
                    log_p = theirs.float().log_softmax(-1)
                    score.divergence.append(_divergence(log_p, log_q))
                loss = F.nll_loss(log_q, ids[row, -scored:].to(log_q.device), reduction="sum")
                score.nll.append(loss.item())
            advance(len(batch))
    return score


def _divergence(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p ‖ q) summed over tokens, of log-probabilities [n, V] float32; ``log_p`` is overwritten."""
    # F.kl_div takes half as long again.
    difference = log_p - log_q
    return log_p.exp_().mul_(difference).sum().item()


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
