"""Latency on a GPU: one FFN and a whole decode step, dense and sparse, each eager and as a CUDA graph.

The fair opponent is the dense model compiled with CUDA graphs; beside eager code sparsity would also be
credited with launches that are saved. FFNs run over several layers in one go, so that none finds its
weights in the cache, and variants take turns. On a CPU the same code runs without graphs, for tests.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.api import reset_cost, sparse_modules, sparsify, unsparsify
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.config import SparseConfig
from sparse_runtime.cost import share_in_bits
from sparse_runtime.eval.latency.ffn_checks import DenseFFN, own_states, tokens_for, verify_outputs
from sparse_runtime.eval.latency.host import host_record
from sparse_runtime.eval.latency.timing import in_turns, wall_seconds
from sparse_runtime.ffn.counts import bytes_per_token, count_cost, read_counts
from sparse_runtime.ffn.patch import owners
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.progress import ProgressReporter, SilentProgress

# Layers of the FFN measurements: 2.8 GB of Mistral's, far beyond any cache.
_LAYERS = 8
_COPY_BYTES = 2**31
#: Sequences decoded at once, unless told otherwise.
DECODE_BATCHES = (1, 8)

Call = Callable[[], Any]


def bench_gpu(
    model: Any,
    clusters: Sequence[ClusterSet],
    *,
    batches: Sequence[int] = (1, 8),
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 20,
    decode_batches: Sequence[int] = DECODE_BATCHES,
    progress: ProgressReporter | None = None,
) -> dict[str, Any]:
    """Time a model on a GPU, dense and with each of several artifacts.

    Args:
        model: a dense causal language model on the GPU; dense again when this returns.
        clusters: artifacts to run.
        batches: tokens per call of the FFNs.
        prompt_tokens: length of the random prompt before the decode steps.
        new_tokens: decode steps per run.
        repeats: runs of each variant.
        decode_batches: sequences of whole decode steps, each of which takes a compilation for every
            artifact; what users get, that is, dense above the measured switch-over.
        progress: reports one unit per measurement.

    Returns:
        ``copy_gbps`` (bytes read and written); ``inputs``, what FFNs alone run on: the model's own
        hidden states, or noise for random clusters; ``ffn``: rows of ``cost_share`` and, the same,
        ``bits_per_weight``, ``batch``, ``bytes`` that a token reads, and microseconds of one FFN
        ``dense_eager``, ``dense_graph``, ``sparse_eager`` and ``sparse_graph``, ``speedup`` of the
        graphs and, for one token, ``gbps`` and its ``bandwidth_share``; ``route``: microseconds of
        router and look-up; ``decode``: rows with share and bits, too, ``bytes_per_token`` of the whole
        model's weights, milliseconds per step and the ``speedup`` of compiled over compiled; ``host``.

    Raises:
        SparseRuntimeError: the sparse FFNs' outputs are not those of the reference, or the kernels
            cannot run.
    """
    progress = progress or SilentProgress()
    device = next(model.parameters()).device
    result: dict[str, Any] = {"copy_gbps": copy_bandwidth(device), "ffn": [], "route": []}
    prompt = random_prompt(model, 1, prompt_tokens)
    states = own_states(model, clusters, prompt)
    result["inputs"] = "noise" if states is None else "the model's states"
    dense_ffns = [DenseFFN.of(layer) for layer in find_ffn_layers(model)[:_LAYERS]]
    measurements = len(clusters) * (len(batches) + len(decode_batches)) + len(decode_batches)
    with progress.task("gpu", measurements) as advance:
        dense_steps: dict[int, dict[str, list[float]]] = {}
        for batch in decode_batches:
            dense_steps[batch] = time_decode(model, batch, prompt_tokens, new_tokens, "dense")
            advance(1)
        for artifact in clusters:
            sparsify(model, artifact, config=_ALL_SPARSE)
            modules = sparse_modules(model)
            verify_outputs(modules[:2])
            for batch in batches:
                inputs = [tokens_for(module, batch, states) for module in modules[:_LAYERS]]
                result["ffn"].append(
                    _bench_ffn(modules[:_LAYERS], dense_ffns, inputs, repeats, result["copy_gbps"])
                )
                advance(1)
            result["route"].append(_bench_route(modules[:_LAYERS], repeats))
            unsparsify(model)
            sparsify(model, artifact, config=_DECODE)
            for batch in decode_batches:
                seconds = dense_steps[batch] | time_decode(
                    model, batch, prompt_tokens, new_tokens, "sparse"
                )
                result.setdefault("decode", []).append(_decode_row(model, batch, seconds))
                advance(1)
            unsparsify(model)
    return {**result, "host": host_record(device)}


_DECODE = SparseConfig(backend="triton", check_fingerprint=False)
# FFNs are all timed sparse, so that one sees from where on dense is faster.
_ALL_SPARSE = replace(_DECODE, prefill="sparse")


def random_prompt(model: Any, batch: int, length: int) -> Tensor:
    """Random tokens [batch, length] on the model's device."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(
        0, model.config.get_text_config().vocab_size, (batch, length), generator=generator
    )
    return prompt.to(model.device)


def copy_bandwidth(device: torch.device) -> float:
    """GB/s (10⁹ bytes, read and written) of a copy far beyond the caches."""
    size = _COPY_BYTES if device.type == "cuda" else 2**20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = on_device({"copy": lambda: target.copy_(source)}, device, 10)["copy"]
    return 2 * size / seconds / 1e9


def on_device(calls: dict[str, Call], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each call, all in turns."""
    return in_turns(
        {name: lambda _, call=call: call for name, call in calls.items()},  # type: ignore[misc]
        repeats,
        seconds=lambda call: _seconds(call, device),
    )


def _seconds(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        return wall_seconds(call)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(call: Call, device: torch.device) -> Call:
    """The call as a CUDA graph; itself on other devices."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _bench_ffn(
    modules: Sequence[SparseFFN],
    dense: Sequence[DenseFFN],
    inputs: Sequence[Tensor],
    repeats: int,
    copy_gbps: float,
) -> dict[str, Any]:
    """Time FFNs, sparse and dense, each on its own hidden states [n, H]."""
    batch, device = len(inputs[0]), inputs[0].device

    def run_sparse() -> None:
        for module, x in zip(modules, inputs, strict=True):
            module(x)

    def run_dense() -> None:
        for ffn, x in zip(dense, inputs, strict=True):
            ffn(x)

    with torch.inference_mode():
        calls = {
            "dense_eager": run_dense,
            "dense_graph": captured(run_dense, device),
            "sparse_eager": run_sparse,
            "sparse_graph": captured(run_sparse, device),
        }
        for module in modules:
            module.reset_counts()
        seconds = on_device(calls, device, repeats)
    micro = {name: 1e6 * value / len(modules) for name, value in seconds.items()}
    counts = [read_counts(module) for module in modules]
    tokens = sum(count.sparse_tokens for count in counts)
    computed = sum(count.computed for count in counts) / tokens
    looked = sum(count.looked_at for count in counts) / tokens
    cost = modules[0].cost
    row = {
        "cost_share": cost.share(computed, looked),
        "bits_per_weight": share_in_bits(cost.share(computed, looked)),
        "batch": batch,
        "bytes": cost.sparse_bytes(computed, looked),
        **micro,
        "speedup": micro["dense_graph"] / micro["sparse_graph"],
    }
    if batch == 1:
        row["gbps"] = row["bytes"] / micro["sparse_graph"] / 1e3
        row["bandwidth_share"] = row["gbps"] / copy_gbps
    return row


def _decode_row(model: Any, batch: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Figures of decode steps, dense and sparse; the model is sparse and has run them."""
    medians = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
    share = count_cost(sparse_modules(model)).overall_cost_share
    return {
        "cost_share": share,
        "bits_per_weight": share_in_bits(share),
        "bytes_per_token": bytes_per_token(model),
        "batch": batch,
        **medians,
        "speedup": medians["dense_compiled"] / medians["sparse_compiled"],
    }


def _bench_route(modules: Sequence[SparseFFN], repeats: int) -> dict[str, float]:
    """Microseconds of the first launch alone: router, pick and the list of one token's neurons."""
    from sparse_runtime.kernels.triton.ffn import route_only

    x = tokens_for(modules[0], 1)

    def run() -> None:
        for module in modules:
            route_only(
                x,
                module.weights,
                module.tables,
                module.router,
                module.counters,
                module.compensation,
            )

    with torch.inference_mode():
        seconds = on_device({"route": captured(run, x.device)}, x.device, repeats)["route"]
    return {"us": 1e6 * seconds / len(modules)}


def time_decode(
    model: Any, batch: int, prompt_tokens: int, new_tokens: int, name: str
) -> dict[str, list[float]]:
    """Seconds of decode steps with a static cache, eager and compiled with CUDA graphs."""
    device = next(model.parameters()).device
    options: dict[str, Any] = {"fullgraph": True}
    options |= {"mode": "reduce-overhead"} if device.type == "cuda" else {"backend": "eager"}
    torch._dynamo.reset()
    compiled = torch.compile(model, **options)
    seconds = {}
    for how, run in (("eager", model), ("compiled", compiled)):
        step = _decode_step(model, run, batch, prompt_tokens, new_tokens)
        for _ in range(3):  # compiles, then captures
            step()
        if any(owners(model)):
            reset_cost(model)
        seconds[f"{name}_{how}"] = [_seconds(step, device) for _ in range(new_tokens)]
    torch._dynamo.reset()
    return seconds


def _decode_step(model: Any, run: Any, batch: int, prompt_tokens: int, new_tokens: int) -> Call:
    from transformers import StaticCache

    device = next(model.parameters()).device
    length = prompt_tokens + new_tokens + 8
    cache = StaticCache(config=model.config, max_cache_len=length)
    prompt = random_prompt(model, batch, prompt_tokens)
    with torch.inference_mode():
        logits = model(input_ids=prompt, past_key_values=cache, use_cache=True).logits
    token = logits[:, -1:].argmax(-1)

    def step() -> None:
        if device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.inference_mode():
            logits = run(input_ids=token, past_key_values=cache, use_cache=True).logits
            token.copy_(logits[:, -1:].argmax(-1))

    return step
