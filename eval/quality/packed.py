"""Quality of a sparse model over weights in planes, beside the same planes without sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sparse_runtime.api import dense, reset_cost, sparse_modules, sparsify
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.config import SparseConfig
from sparse_runtime.cost import PlaneCost
from sparse_runtime.eval.quality.forwards import dense_prompts
from sparse_runtime.eval.quality.perplexity import TextScore, score_text
from sparse_runtime.ffn.counts import count_cost, read_counts
from sparse_runtime.progress import ProgressReporter


def evaluate_packed(
    model: nn.Module,
    clusters: ClusterSet,
    texts: Sequence[Tensor],
    config: SparseConfig,
    *,
    reference: nn.Module | None = None,
    window: int = 512,
    stride: int | None = None,
    prompt_tokens: int = 0,
    progress: ProgressReporter | None = None,
) -> list[dict[str, Any]]:
    """Measure a model packed in planes, sparse and with all its neurons, against the float one.

    Args:
        model: a causal language model, in float or packed; packed and sparse when this returns.
        clusters: the artifact.
        texts: each [n] int64.
        config: with ``weights``, the FFNs' bits, if the model is float; attention and head stay as
            they are.
        reference: what the distance is measured from; the model as it comes if None.
        window: tokens per window.
        stride: distance of window starts; ``window`` if None.
        prompt_tokens: tokens at the start of each window that run dense and are not scored.
        progress: reports one unit per window of each run.

    Returns:
        For each text ``kl`` (to the reference, nats per token), ``top1``, ``ratio`` (perplexity ÷
        float), ``cost_share`` (of bfloat16's bytes), ``bits_per_weight`` (FFN bits read per weight and
        token, router and scales included), ``looked``, ``counted`` and ``refined`` (mean shares of the
        neurons), and ``packed``: the same figures of all neurons and all bits.

    Raises:
        SparseRuntimeError: as ``sparsify``.
    """
    options: dict[str, Any] = {"window": window, "stride": stride, "prompt_tokens": prompt_tokens}
    options["progress"] = progress
    origin = model if reference is None else reference
    references = [
        score_text(origin, tokens, description="reference", keep=True, **options)
        for tokens in texts
    ]
    sparsify(model, clusters, config=config)
    results = []
    for tokens, score in zip(texts, references, strict=True):
        options["reference"] = score
        with dense(model):
            packed = score_text(model, tokens, description="packed", **options)
        reset_cost(model)
        with dense_prompts(model, prompt_tokens):
            sparse = score_text(model, tokens, description="sparse", **options)
        results.append(
            {
                **distance(sparse, score),
                **amounts(model),
                "packed": {**distance(packed, score), "bits_per_weight": _packed_bits(model)},
                "tokens": len(tokens),
            }
        )
    return results


def distance(score: TextScore, reference: TextScore) -> dict[str, float | None]:
    """``kl``, ``top1`` and ``ratio`` of a text's score to that of another model."""
    return {
        "kl": score.mean_divergence,
        "top1": score.agreement,
        "ratio": score.perplexity / reference.perplexity,
    }


def amounts(model: nn.Module) -> dict[str, float]:
    """What a sparse model over planes has read since ``reset_cost``; see :func:`evaluate_packed`."""
    modules = sparse_modules(model)
    report = count_cost(modules, element_size=2)
    shares = {"looked": 0.0, "counted": 0.0, "refined": 0.0}
    for module in modules:
        counts = read_counts(module)
        most = max(1, counts.sparse_tokens) * module.cost.intermediate_size * len(modules)
        shares["looked"] += counts.looked_at / most
        shares["counted"] += counts.computed / most
        shares["refined"] += counts.refined / most
    return {
        "cost_share": report.cost_share,
        "bits_per_weight": 16 * report.cost_share,
        **shares,
    }


def _packed_bits(model: nn.Module) -> float:
    costs = [cost for m in sparse_modules(model) if isinstance(cost := m.cost, PlaneCost)]
    weights = sum(3 * cost.hidden_size * cost.intermediate_size for cost in costs)
    return 8 * sum(cost.whole_bytes for cost in costs) / max(1, weights)
