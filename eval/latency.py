"""End-to-end latency of generation, dense and sparse interleaved in one run.

What a user feels: ``model.generate`` with one sequence, greedy, timed token by token. The first token
closes the prefill, the others are decode. Dense and sparse alternate A B A B, so that drift of the
machine hits both; figures are medians.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from sparse_runtime.api import cost_report, dense, reset_cost
from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.host import host_record, read_bandwidth_gbps
from sparse_runtime.progress import ProgressReporter, SilentProgress


class TokenClock(BaseStreamer):
    """A streamer that notes when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called by ``generate`` with the prompt, then with each new token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called when generation ends."""


def time_generation(model: Any, input_ids: Tensor, new_tokens: int) -> tuple[float, list[float]]:
    """Generate greedily; return the prefill's seconds and each later token's.

    Args:
        model: a causal language model.
        input_ids: prompt [1, n].
        new_tokens: exactly this many are generated, end-of-sequence or not.
    """
    clock = TokenClock()
    with torch.inference_mode():
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
            pad_token_id=model.generation_config.pad_token_id or 0,
        )
    prompt, first, *rest = clock.times
    steps = [b - a for a, b in zip([first, *rest], rest, strict=False)]
    return first - prompt, steps


def bench(
    model: Any,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    progress: ProgressReporter | None = None,
) -> dict[str, Any]:
    """Time a sparse model against itself run dense.

    Args:
        model: a model that ``sparsify`` patched.
        prompt_tokens: length of a random prompt.
        new_tokens: tokens generated per run, at least 2.
        repeats: runs of each variant, after one warm-up each.
        progress: reports one unit per run.

    Returns:
        ``read_gbps``; ``prefill`` and ``decode`` with median and p90 milliseconds of both variants,
        tokens/s, speed-up and achieved GB/s; ``cost_share``, ``ceiling``, ``host``.

    Raises:
        NotSparseError: the model holds no sparse FFN.
        SparseRuntimeError: the sparse runs did not take the sparse path.
    """
    device = next(model.parameters()).device
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, vocabulary, (1, prompt_tokens), generator=generator).to(device)
    prefill: dict[str, list[float]] = {"dense": [], "sparse": []}
    decode: dict[str, list[float]] = {"dense": [], "sparse": []}
    reset_cost(model)
    read_gbps = [read_bandwidth_gbps(device)]
    with (progress or SilentProgress()).task("bench", 2 * (repeats + 1)) as advance:
        for repeat in range(repeats + 1):
            for variant in ("dense", "sparse"):
                if variant == "dense":
                    with dense(model):
                        first, steps = time_generation(model, prompt, new_tokens)
                else:
                    first, steps = time_generation(model, prompt, new_tokens)
                if repeat:
                    prefill[variant].append(first)
                    decode[variant] += steps
                advance(1)
    read_gbps.append(read_bandwidth_gbps(device))
    report = cost_report(model)
    if report.sparse_tokens == 0:
        raise SparseRuntimeError(
            "no token took the sparse path, so there is nothing to compare; check max_sparse_tokens"
        )
    total, ffn = decode_bytes(model)
    sparse_total = total - ffn * (1 - report.cost_share)
    medians = {name: statistics.median(values) for name, values in decode.items()}
    return {
        "read_gbps": statistics.mean(read_gbps),
        "cost_share": report.cost_share,
        "prefill": {
            **_milliseconds(prefill),
            "tokens": prompt_tokens,
            "speedup": statistics.median(prefill["dense"]) / statistics.median(prefill["sparse"]),
        },
        "decode": {
            **_milliseconds(decode),
            "dense_tok_s": 1 / medians["dense"],
            "sparse_tok_s": 1 / medians["sparse"],
            "speedup": medians["dense"] / medians["sparse"],
            "ceiling": total / sparse_total,
            "dense_gbps": total / medians["dense"] / 1e9,
            "sparse_gbps": sparse_total / medians["sparse"] / 1e9,
        },
        "host": host_record(device),
    }


def decode_bytes(model: Any) -> tuple[int, int]:
    """Weight bytes that decoding one token reads: all, and those of the patched FFNs.

    The input embedding is a look-up of one row and does not count; a tied output head does.
    """
    ffn = sum(
        linear.weight.numel() * linear.weight.element_size()
        for module in model.modules()
        if hasattr(module, "base_layer") and hasattr(module, "active_sets")
        for linear in module.base_layer.modules()
        if isinstance(linear, nn.Linear)
    )
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if head is None or head.weight is not embedding:
        parameters -= embedding.numel() * embedding.element_size()
    return parameters, ffn


def _milliseconds(seconds: dict[str, list[float]]) -> dict[str, float]:
    figures = {}
    for variant, values in seconds.items():
        ordered = sorted(values)
        figures[f"{variant}_ms"] = 1e3 * statistics.median(ordered)
        figures[f"{variant}_p90_ms"] = 1e3 * ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return figures
