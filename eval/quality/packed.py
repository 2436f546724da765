"""Quality of a sparse model over weights in planes, beside the same planes without sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sparse_runtime.api import dense, reset_cost, sparse_modules, sparsify
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.config import SparseConfig
from sparse_runtime.cost import PlaneCost
from sparse_runtime.eval.baselines.dense_formats import plane_bits
from sparse_runtime.eval.quality.forwards import dense_prompts
from sparse_runtime.eval.quality.perplexity import score_text
from sparse_runtime.eval.quality.rows import amounts, distance, reading_of_bits
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
        For each text the figures of :func:`sparse_runtime.eval.quality.rows.distance` from the
        reference and of :func:`sparse_runtime.eval.quality.rows.amounts`, ``tokens``, and ``packed``:
        distance, ``cost_share`` and ``bits_per_weight`` of all neurons and all bits.

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
                "packed": {**distance(packed, score), **reading_of_bits(_packed_bits(model))},
                "tokens": len(tokens),
            }
        )
    return results


def _packed_bits(model: nn.Module) -> float:
    return plane_bits(
        [cost for m in sparse_modules(model) if isinstance(cost := m.cost, PlaneCost)]
    )
