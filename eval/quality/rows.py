"""What every comparison with a dense model is told in: distances, and what was read for them.

``kl`` is KL(dense ‖ model) in nats per scored token, ``top1`` the share of the scored tokens with the
dense model's likeliest next token, ``ratio`` perplexity ÷ dense. ``bits_per_weight`` are all bits that
a token reads of an FFN, scales, router and bitmaps included, per weight of the FFN: 16 times the
``cost_share``, which is of bfloat16's bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sparse_runtime.api import sparse_modules
from sparse_runtime.eval.quality.bootstrap import mean_interval, ratio_interval
from sparse_runtime.eval.quality.perplexity import TextScore, score_text
from sparse_runtime.ffn.counts import count_cost, read_counts
from sparse_runtime.progress import ProgressReporter

_FLOAT_BITS = 16


def distance(score: TextScore, dense: TextScore) -> dict[str, Any]:
    """How far a score, with ``dense`` as its reference, is from that.

    Returns:
        ``kl``, ``top1`` and ``ratio``; ``kl_interval`` and ``interval``, of the ratio: 95 % bootstrap
        intervals over the windows, [low, high].
    """
    return {
        "kl": score.kl,
        "kl_interval": mean_interval(score.divergence, score.scored),
        "top1": score.top1,
        "ratio": score.perplexity / dense.perplexity,
        "interval": ratio_interval(score.nll, dense.nll, score.scored),
    }


def reading(cost_share: float) -> dict[str, float]:
    """``cost_share`` and ``bits_per_weight``."""
    return {"cost_share": cost_share, "bits_per_weight": _FLOAT_BITS * cost_share}


def reading_of_bits(bits_per_weight: float) -> dict[str, float]:
    """The same of bits."""
    return {"cost_share": bits_per_weight / _FLOAT_BITS, "bits_per_weight": bits_per_weight}


def amounts(model: nn.Module) -> dict[str, float]:
    """What a sparse model has read since ``reset_cost``, for bfloat16 weights where they are floats.

    Returns:
        ``cost_share`` and ``bits_per_weight``; ``looked``, ``counted`` and ``refined``: mean shares of
        the neurons that were looked at, computed, and read to the last bit (0 of float weights).
    """
    modules = sparse_modules(model)
    shares = {"looked": 0.0, "counted": 0.0, "refined": 0.0}
    for module in modules:
        counts = read_counts(module)
        most = max(1, counts.sparse_tokens) * module.cost.intermediate_size * len(modules)
        shares["looked"] += counts.looked_at / most
        shares["counted"] += counts.computed / most
        shares["refined"] += counts.refined / most
    return {**reading(count_cost(modules, element_size=2).cost_share), **shares}


@dataclass(frozen=True)
class Protocol:
    """How texts are run.

    Args:
        window: tokens per window.
        stride: distance of window starts; ``window`` if None.
        prompt_tokens: tokens at the start of each window that run dense and are not scored.
        progress: reports one unit per window of each run, and per layer of a fit.
    """

    window: int = 512
    stride: int | None = None
    prompt_tokens: int = 0
    progress: ProgressReporter | None = None

    def score(
        self,
        model: nn.Module,
        tokens: Tensor,
        description: str,
        *,
        reference: TextScore | None = None,
    ) -> TextScore:
        """Score a text beside a reference, or as one; see :func:`score_text`."""
        return score_text(
            model,
            tokens,
            window=self.window,
            stride=self.stride,
            prompt_tokens=self.prompt_tokens,
            reference=reference,
            keep=reference is None,
            progress=self.progress,
            description=description,
        )


@dataclass
class Curve:
    """The rows of one text.

    Attributes:
        name: of the text.
        tokens: [n] int64.
        dense: score of the dense model, kept as a reference.
        rows: see :func:`sparse_runtime.eval.quality.curves.evaluate_curves`.
    """

    name: str
    tokens: Tensor
    dense: TextScore
    rows: list[dict[str, Any]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The text with its rows, as JSON."""
        return {
            "data": self.name,
            "tokens": len(self.tokens),
            "scored": self.dense.scored,
            "dense": {"perplexity": self.dense.perplexity, "nll": self.dense.nll},
            "rows": self.rows,
        }

    def add(
        self,
        score: TextScore,
        method: str,
        read: dict[str, float],
        *,
        budget: float | None = None,
        verify: bool | None = None,
        weights: int | None = None,
        rounding: str | None = None,
        counted: float | None = None,
    ) -> None:
        """Add a run.

        Args:
            score: beside the dense model.
            method: its name.
            read: of :func:`amounts`, :func:`reading` or :func:`reading_of_bits`.
            budget: cost share that it was fitted for, if one was.
            verify: with or without looks, of clusters.
            weights: bits of the planes, if the FFNs were in such.
            rounding: how they were rounded.
            counted: share of the neurons computed, where ``read`` does not say it.
        """
        self.rows.append(
            {
                "method": method,
                "budget": budget,
                "verify": verify,
                "weights": weights,
                "rounding": rounding,
                "looked": None,
                "counted": counted,
                "refined": None,
                **read,
                **distance(score, self.dense),
                "perplexity": score.perplexity,
                "nll": score.nll,
            }
        )
