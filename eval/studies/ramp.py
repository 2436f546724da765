"""What a ramp does: how far answers shake with the batching of tokens, and what it costs in quality.

Hard thresholds amplify rounding noise: a token's neurons flip with the last bits of its hidden state,
which depend on the tokens that are computed beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from sparse_runtime.api import dense, reset_cost, sparsify, unsparsify
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.config import SparseConfig
from sparse_runtime.eval.quality.perplexity import score_text
from sparse_runtime.eval.quality.rows import amounts, distance
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.progress import ProgressReporter


def compare_ramps(
    model: Any,
    clusters: ClusterSet,
    tokens: Tensor,
    *,
    bits: int,
    widths: Sequence[float],
    backends: Sequence[str] = ("auto",),
    window: int = 512,
    noise_tokens: int = 256,
    chunk: int = 5,
    progress: ProgressReporter | None = None,
) -> list[dict[str, Any]]:
    """Measure ramps of several widths over one packed model, all tokens sparse.

    Args:
        model: a float causal language model; packed when this returns.
        clusters: the artifact.
        tokens: held-out text [n] int64.
        bits: of the FFNs' weights.
        widths: of the ramp; 0 is a step.
        backends: that compute; quality is measured with the first one.
        window: tokens per window.
        noise_tokens: first tokens of the text that are computed in one call and in chunks.
        chunk: tokens of such a chunk.
        progress: reports one unit per window of each run.

    Returns:
        One row per backend and width: ``noise`` (KL from the logits of one call to those of chunks,
        nats per token) and, of the first backend, its ``distance`` from the float model and ``amounts``
        (``sparse_runtime.eval.quality.rows``). The first row, without a width, is of all neurons.

    Raises:
        SparseRuntimeError: as ``sparsify``.
    """
    options: dict[str, Any] = {"window": window, "progress": progress}
    reference = score_text(model, tokens, description="float", keep=True, **options)
    options["reference"] = reference
    clusters.check_model(model)
    pack_model(model, bits)
    config = SparseConfig(prefill="sparse", check_fingerprint=False)
    rows: list[dict[str, Any]] = []
    for backend in backends:
        for width in widths:
            sparsify(model, clusters, config=config, backend=backend, ramp=width)
            try:
                if not rows:
                    with dense(model):
                        score = score_text(model, tokens, description="all neurons", **options)
                        rows.append(
                            {"backend": backend, "ramp": None, **distance(score, reference)}
                        )
                        rows[0]["noise"] = batching_noise(model, tokens[:noise_tokens], chunk)
                row: dict[str, Any] = {"backend": backend, "ramp": width}
                if backend == backends[0]:
                    reset_cost(model)
                    score = score_text(model, tokens, description=f"ramp {width}", **options)
                    row |= distance(score, reference) | amounts(model)
                row["noise"] = batching_noise(model, tokens[:noise_tokens], chunk)
                rows.append(row)
            finally:
                unsparsify(model)
    return rows


@torch.inference_mode()
def batching_noise(model: Any, tokens: Tensor, chunk: int) -> float:
    """KL per token, in nats, from the logits of one call to those of calls with a few tokens each.

    Args:
        model: a causal language model.
        tokens: [n] int64.
        chunk: tokens per call.
    """
    ids = tokens[None].to(model.device)
    whole = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    cache = DynamicCache(config=model.config)
    parts = [
        model(input_ids=part, past_key_values=cache, use_cache=True).logits[0]
        for part in ids.split(chunk, dim=1)
    ]
    chunked = torch.cat(parts).float().log_softmax(-1)
    return F.kl_div(chunked, whole, reduction="sum", log_target=True).item() / len(tokens)
