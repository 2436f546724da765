"""End-to-end latency of generation: dense and sparse, interleaved in one run.

What a user feels: ``model.generate`` with greedy decoding, timed token by token, and the forward pass
over the prompt. Four variants take turns, so that drift of the machine hits all of them:

- ``dense``: the model as transformers runs it;
- ``dense_fast``: dense, every linear layer by the CPU kernels (``fast_linear``);
- ``sparse``: sparse FFNs, all else as in ``dense``;
- ``sparse_fast``: sparse FFNs, the other linear layers by the CPU kernels.

With weights in planes there is a fifth: ``packed``, all neurons of the planes. The sparse ones run on
the planes, too, and the dense ones on the float model, which is in memory beside them.

Sparsity is what ``sparse`` gains over ``dense`` and ``sparse_fast`` over ``dense_fast``; the rest is
only a better matrix–vector product. Figures are medians.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_runtime.api import cost_report, reset_cost, sparse_modules, sparsify, unsparsify
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.compiled import compiled_decode, compiling
from sparse_runtime.config import SparseConfig
from sparse_runtime.cost import DENSE_BITS, CostReport
from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.latency.experts import bench_experts
from sparse_runtime.eval.latency.ffn_checks import own_states
from sparse_runtime.eval.latency.host import ReadBandwidth, host_record
from sparse_runtime.eval.latency.mlp import TOKEN_COUNTS, bench_mlp
from sparse_runtime.eval.latency.prediction import bench_prediction
from sparse_runtime.eval.latency.timing import TokenClock
from sparse_runtime.ffn.counts import bytes_per_token
from sparse_runtime.ffn.fast_linear import fast_linear, slow_linear
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.ffn.sparse_experts import SparseExperts
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.progress import ProgressReporter, SilentProgress

_PREFILL_SECONDS = 60.0


def time_prefill(model: Any, input_ids: Tensor) -> tuple[float, Any]:
    """Seconds of the forward pass over a prompt [B, n] up to its last logits, and the KV cache."""
    with torch.inference_mode():
        started = time.perf_counter()
        output = model(input_ids=input_ids, use_cache=True, logits_to_keep=1)
        output.logits.sum().item()
        return time.perf_counter() - started, output.past_key_values


def time_decode(model: Any, input_ids: Tensor, cache: Any, new_tokens: int) -> list[float]:
    """Seconds of each step of a greedy ``generate`` that goes on from a filled cache.

    Args:
        model: a causal language model.
        input_ids: prompt [B, n]; the cache holds all of it but the last token. It is not changed.
        cache: of the prompt.
        new_tokens: steps timed, end-of-sequence or not; one more is generated before them.
    """
    with torch.inference_mode():
        return _steps(model, input_ids, new_tokens, past_key_values=copy.deepcopy(cache))


def time_compiled_decode(model: Any, input_ids: Tensor, new_tokens: int) -> list[float]:
    """Seconds of each compiled decode step of a greedy ``generate``; compiling is not timed.

    The model's attention is what it was afterwards, and graphs of other models are forgotten: torch
    keeps few of one function.

    Args:
        model: a causal language model.
        input_ids: prompt [1, n].
        new_tokens: steps timed, end-of-sequence or not.

    Raises:
        CompilationError: the model cannot be compiled here.
    """
    torch.compiler.reset()
    attention, length = model.config._attn_implementation, input_ids.shape[1] + new_tokens + 1
    try:
        with torch.inference_mode():
            with compiling(model):
                _steps(model, input_ids, 2, **compiled_decode(model, length))
            return _steps(model, input_ids, new_tokens, **compiled_decode(model, length))
    finally:
        model.set_attn_implementation(attention)


def _steps(model: Any, input_ids: Tensor, new_tokens: int, **options: Any) -> list[float]:
    clock = TokenClock()
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens + 1,
        min_new_tokens=new_tokens + 1,
        do_sample=False,
        streamer=clock,
        pad_token_id=model.generation_config.pad_token_id or 0,
        **options,
    )
    return clock.steps


def bench(
    model: Any,
    clusters: Sequence[ClusterSet],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 16,
    repeats: int = 5,
    batches: Sequence[int] = (),
    planes: Mapping[str, Any] | None = None,
    progress: ProgressReporter | None = None,
) -> dict[str, Any]:
    """Time a model dense and sparse: its FFNs alone, prefill, decode, and the memory it takes.

    Args:
        model: a dense causal language model on the CPU; dense again when this returns.
        clusters: artifacts to run; the first one's figures also stand at the top level.
        prompt_tokens: length of a random prompt.
        new_tokens: decode steps timed per run, at least 1.
        repeats: runs of each variant, after one warm-up each.
        batches: further batch sizes to decode, ``dense`` and ``sparse`` only, with the first artifact.
        planes: options of ``sparsify`` about weights in planes (``weights``, ``linear_weights``,
            ``tau``, ``ramp``) for the sparse runs; a model that came packed is so in the dense ones.
        progress: reports one unit per run.

    Returns:
        ``read_gbps``; where FFNs are float ``mlp`` (see :func:`bench_mlp`) and ``prediction`` (see
        :func:`bench_prediction`), or of a mixture ``experts`` (see :func:`bench_experts`); ``prefill``
        and ``decode``: milliseconds (median and p90), tokens/s of each variant, ``speedup`` (sparse
        over dense), ``speedup_fast`` (sparse_fast over dense_fast), ``ceiling`` (by bytes), and by
        variant ``bytes_per_token`` of the whole model's weights and ``gbps``; ``cost_share`` and, the
        same, ``bits_per_weight``; ``memory`` in MiB; ``batches``; ``runs``, the same for every
        artifact; ``num_layers``; ``host``.

    Raises:
        SparseRuntimeError: the sparse runs did not take the sparse path, or compute something else.
    """
    progress = progress or SilentProgress()
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(0, vocabulary, (1, prompt_tokens), generator=generator)
    bandwidth = ReadBandwidth()
    read_gbps = [bandwidth()]
    memory: dict[str, float] = {}
    planes = dict(planes or {})
    bits = (planes.pop("weights", None), planes.pop("linear_weights", None))
    sparse_model = model if bits == (None, None) else _packed_twin(model, *bits)
    config = SparseConfig(check_fingerprint=False, **planes)
    runs = [_Run(artifact, config, model, sparse_model) for artifact in clusters]
    if not any(layer.packed for layer in find_ffn_layers(sparse_model, packed=True)):
        states = own_states(model, clusters, prompt)
        for number, run in enumerate(runs):
            # How many tokens pay is told once: it depends on the density less than on the machine.
            run.time_ffns(model, states, TOKEN_COUNTS if number == 0 else (1,))
    cache = time_prefill(model, prompt[:, :-1])[1]
    with progress.task("bench", (repeats + 1) * (2 + 2 * len(runs))) as advance:
        for repeat in range(repeats + 1):
            _time_dense(model, runs, prompt, cache, new_tokens)
            memory.setdefault("dense_mib", _resident_mib())
            advance(2)
            for run in runs:
                run.time_sparse(prompt, cache, new_tokens)
                memory.setdefault("sparse_mib", _resident_mib())
                read_gbps.append(bandwidth())
                advance(2)
            if repeat == 0:  # it warms up
                for run in runs:
                    run.seconds = {}
    results = [run.result() for run in runs]
    return {
        "read_gbps": statistics.median(read_gbps),
        **results[0],
        "memory": _memory(memory, model, sparse_model, clusters[0]),
        "batches": [
            _bench_batch(runs[0], prompt, cache, size, new_tokens, repeats) for size in batches
        ],
        "runs": results,
        "num_layers": len(find_ffn_layers(model, packed=True)),
        "prompt_tokens": prompt_tokens,
        "host": host_record(),
    }


class _Run:
    """Times of one artifact, and of the dense runs beside it.

    Attributes:
        model: what runs dense.
        sparse_model: what runs sparse: the same, or packed in planes.
    """

    def __init__(
        self, clusters: ClusterSet, config: SparseConfig, model: Any, sparse_model: Any
    ) -> None:
        self.clusters, self.config = clusters, config
        self.model, self.sparse_model = model, sparse_model
        self.seconds: dict[str, list[float]] = {}
        self.cost_share, self.bits_per_weight = 1.0, float(DENSE_BITS)
        self.sparse_bytes = 0.0
        self.ffns: dict[str, Any] = {}

    @contextmanager
    def sparse(self) -> Iterator[Any]:
        """The model that runs sparse, sparse."""
        model = sparsify(self.sparse_model, self.clusters, config=self.config)
        try:
            yield model
        finally:
            unsparsify(self.sparse_model)

    def add(self, name: str, seconds: Sequence[float]) -> None:
        self.seconds.setdefault(name, []).extend(seconds)

    def wants_prefill(self, variant: str) -> bool:
        """Whether a prefill is still worth its time: with large models, two or three are enough."""
        return sum(self.seconds.get(f"prefill {variant}", [])) < _PREFILL_SECONDS

    def time_ffns(
        self, model: Any, states: Mapping[int, Tensor] | None, token_counts: Sequence[int]
    ) -> None:
        """Time FFNs alone, and what a prediction takes; of a mixture its experts."""
        sparsify(model, self.clusters)
        modules = sparse_modules(model)
        if any(isinstance(module, SparseExperts) for module in modules):
            self.ffns["experts"] = bench_experts(modules, states)
        else:
            self.ffns["mlp"] = bench_mlp(modules, states, token_counts=token_counts)
            self.ffns["prediction"] = bench_prediction(modules, states)
        unsparsify(model)

    def time_sparse(self, prompt: Tensor, cache: Any, new_tokens: int) -> None:
        with self.sparse() as model:
            if self.wants_prefill("sparse"):
                self.add("prefill sparse", [time_prefill(model, prompt)[0]])
            reset_cost(model)
            self.add("decode sparse", time_decode(model, prompt, cache, new_tokens))
            report = sparse_report(model)
            self.cost_share, self.bits_per_weight = report.cost_share, report.bits_per_weight
            self.sparse_bytes = bytes_per_token(model)
            fast_linear(model)
            self.add("decode sparse_fast", time_decode(model, prompt, cache, new_tokens))
            slow_linear(model)
        if self.sparse_model is not self.model:
            self.add("decode packed", time_decode(model, prompt, cache, new_tokens))

    def result(self) -> dict[str, Any]:
        read = {
            "dense": bytes_per_token(self.model),
            "packed": bytes_per_token(self.sparse_model),
            "sparse": self.sparse_bytes,
        }
        prefill = {key.split()[1]: v for key, v in self.seconds.items() if "prefill" in key}
        decode = {key.split()[1]: v for key, v in self.seconds.items() if "decode" in key}
        medians = {name: statistics.median(values) for name, values in decode.items()}
        ceiling = read["dense"] / read["sparse"]
        speedup = medians["dense"] / medians["sparse"]
        return {
            **self.ffns,
            "cost_share": self.cost_share,
            "bits_per_weight": self.bits_per_weight,
            "prefill": {
                **_milliseconds(prefill),
                "speedup": statistics.median(prefill["dense"])
                / statistics.median(prefill["sparse"]),
            },
            "decode": {
                **_milliseconds(decode),
                **{f"{name}_tok_s": 1 / seconds for name, seconds in medians.items()},
                "speedup": speedup,
                "speedup_fast": medians["dense_fast"] / medians["sparse_fast"],
                "speedup_total": medians["dense"] / medians["sparse_fast"],
                "ceiling": ceiling,
                "share_of_ceiling": medians["dense_fast"] / medians["sparse_fast"] / ceiling,
                "bytes_per_token": {name: read[name.removesuffix("_fast")] for name in medians},
                "gbps": {
                    name: read[name.removesuffix("_fast")] / seconds / 1e9
                    for name, seconds in medians.items()
                },
            },
        }


def _time_dense(
    model: Any, runs: Sequence[_Run], prompt: Tensor, cache: Any, new_tokens: int
) -> None:
    prefill = time_prefill(model, prompt)[0] if runs[0].wants_prefill("dense") else None
    slow = time_decode(model, prompt, cache, new_tokens)
    fast_linear(model)
    fast = time_decode(model, prompt, cache, new_tokens)
    slow_linear(model)
    for run in runs:
        run.add("prefill dense", [] if prefill is None else [prefill])
        run.add("decode dense", slow)
        run.add("decode dense_fast", fast)


def _bench_batch(
    run: _Run,
    prompt: Tensor,
    cache: Any,
    size: int,
    new_tokens: int,
    repeats: int,
) -> dict[str, Any]:
    """Decode ``size`` sequences at once, dense and sparse in turns."""
    # Sequences that differ in their last token route differently from there on.
    prompts = prompt.repeat(size, 1)
    prompts[:, -1] = torch.arange(size) * 7 % run.model.config.get_text_config().vocab_size
    caches = copy.deepcopy(cache)
    caches.batch_repeat_interleave(size)
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    for repeat in range(repeats + 1):
        steps = {"dense": time_decode(run.model, prompts, caches, new_tokens)}
        with run.sparse() as model:
            steps["sparse"] = time_decode(model, prompts, caches, new_tokens)
        if repeat:
            for name, taken in seconds.items():
                taken += steps[name]
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        "batch": size,
        **_milliseconds(seconds),
        "speedup": medians["dense"] / medians["sparse"],
    }


def _packed_twin(model: Any, bits: int | None, linears: int | None) -> Any:
    """A packed model beside a float one, which shares the weights that stay float."""
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    return pack_model(twin, bits, linears=linears)


def sparse_report(model: Any) -> CostReport:
    """Costs of what a sparse model ran since the last reset.

    Raises:
        SparseRuntimeError: nothing ran sparse.
    """
    report = cost_report(model)
    if report.sparse_tokens == 0:
        raise SparseRuntimeError(
            "no token took the sparse path, so there is nothing to compare; is the C++ library "
            "there? See the warning above"
        )
    return report


def _milliseconds(seconds: dict[str, list[float]]) -> dict[str, float]:
    figures = {}
    for variant, values in seconds.items():
        ordered = sorted(values)
        figures[f"{variant}_ms"] = 1e3 * statistics.median(ordered)
        figures[f"{variant}_p90_ms"] = 1e3 * ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return figures


def _resident_mib() -> float:
    """Memory that the process holds now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _memory(
    memory: dict[str, float], model: nn.Module, sparse_model: nn.Module, clusters: ClusterSet
) -> dict[str, float]:
    """Resident memory; ``ratio`` is that of the weights alone, the artifact being loaded in both."""
    weights, sparse_weights = (
        sum(p.numel() * p.element_size() for p in m.parameters()) / 2**20
        for m in (model, sparse_model)
    )
    growth = memory["sparse_mib"] - memory["dense_mib"]
    return {
        **memory,
        "weights_mib": weights,
        "sparse_weights_mib": sparse_weights,
        "artifact_mib": clusters.num_bytes / 2**20,
        "ratio": (weights + growth) / weights,
    }
