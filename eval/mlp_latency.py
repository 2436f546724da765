"""Latency of FFNs alone: dense as torch runs it, the best dense there is, and sparse.

Weights are rotated over several layers, so that a call finds none of them in the caches, as in a real
decode step. All variants take turns in one run, and the read bandwidth is measured between them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.host import ReadBandwidth
from sparse_runtime.ffn.counts import read_counts
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.kernels.reference import (
    ACTIVATION_FUNCTIONS,
    add_compensation,
    sparse_ffn_reference,
)

# Layers that calls rotate over, at least; together they are beyond every cache, and copied.
_LAYERS = 2
_MIN_BYTES = 256 * 2**20
#: Tokens per call of the second table.
TOKEN_COUNTS = (1, 2, 4, 8, 16, 32, 64)
# A call that takes longer than this is repeated three times only.
_SLOW_SECONDS = 0.3

Variant = Callable[[int, Tensor], Any]


def bench_mlp(
    modules: Sequence[SparseFFN],
    states: Mapping[int, Tensor] | None = None,
    *,
    repeats: int = 41,
    token_counts: Sequence[int] = TOKEN_COUNTS,
) -> dict[str, Any]:
    """Time the FFNs of a sparse model against dense ones of the same weights.

    Args:
        modules: the model's sparse FFNs, backend ``cpu``.
        states: layer index -> hidden states [n, H] that calls draw their tokens from: the model's own.
            If None, noise that the routers spread over their clusters; looks then confirm more or
            fewer neurons than in the model.
        repeats: calls of each variant at one token; a quarter of that at several.
        token_counts: tokens per call of the second table.

    Returns:
        For one token its ``cost_share``, ``density`` and share of neurons ``looked_at``; ``dense_ms``
        (``F.linear``), ``prepacked_ms`` (oneDNN's weights, None where it has no bfloat16),
        ``all_rows_ms`` (our kernels, nothing skipped) and ``sparse_ms``; ``speedup`` over
        prepacked, ``speedup_over_linear``; ``gbps`` and ``bandwidth_share`` of the sparse calls
        beside ``read_gbps``. Under ``tokens``, by number of tokens: the same milliseconds, and
        ``path`` and ``chosen_ms`` of what the runtime chooses.

    Raises:
        SparseRuntimeError: the sparse FFN's outputs are not those of the reference.
    """
    layers = bench_layers(modules)
    _verify(layers[:_LAYERS])
    dense = [_DenseFFN(module) for module in layers]
    variants: dict[str, Variant] = {
        "dense": lambda i, x: dense[i].linear(x),
        "all_rows": lambda i, x: layers[i].all_rows(x),
        "sparse": lambda i, x: layers[i].sparse(x),
    }
    if dense[0].packed is not None:
        variants["prepacked"] = lambda i, x: dense[i].prepacked(x)
    result: dict[str, Any] = {"tokens": []}
    for num_tokens in token_counts:
        calls = dict(variants)
        if num_tokens > 1:
            calls["chosen"] = lambda i, x: layers[i](x)
        rounds = repeats if num_tokens == 1 else max(1, repeats // 4)
        for module in layers:
            module.reset_counts()
        seconds, read_gbps = in_turns(calls, layers, num_tokens, rounds, states)
        milliseconds = {f"{name}_ms": 1e3 * value for name, value in seconds.items()}
        if num_tokens == 1:
            result |= _one_token(seconds, layers, statistics.median(read_gbps))
        else:
            milliseconds["path"] = layers[0].rule.path(num_tokens)  # type: ignore[assignment]
        result["tokens"].append({"tokens": num_tokens, **milliseconds})
    return result


def bench_layers(modules: Sequence[SparseFFN]) -> list[SparseFFN]:
    """The first few FFNs, enough that their weights are beyond every cache."""
    count = max(_LAYERS, -(-_MIN_BYTES // modules[0].cost.dense_bytes))
    return list(modules[:count])


def _one_token(
    seconds: dict[str, float], layers: Sequence[SparseFFN], read_gbps: float
) -> dict[str, Any]:
    counts = [read_counts(module) for module in layers]
    tokens = sum(count.sparse_tokens for count in counts)
    computed = sum(count.computed for count in counts) / tokens
    looked = sum(count.looked_at for count in counts) / tokens
    cost = layers[0].cost
    bytes_read = cost.sparse_bytes(computed, looked)
    gbps = bytes_read / seconds["sparse"] / 1e9
    opponent = seconds.get("prepacked", seconds["dense"])
    return {
        "cost_share": cost.share(computed, looked),
        "density": computed / cost.intermediate_size,
        "looked_at": looked / cost.intermediate_size,
        "dense_ms": 1e3 * seconds["dense"],
        "prepacked_ms": 1e3 * seconds["prepacked"] if "prepacked" in seconds else None,
        "all_rows_ms": 1e3 * seconds["all_rows"],
        "all_rows_gbps": cost.dense_bytes / seconds["all_rows"] / 1e9,
        "sparse_ms": 1e3 * seconds["sparse"],
        "speedup": opponent / seconds["sparse"],
        "speedup_over_linear": seconds["dense"] / seconds["sparse"],
        "gbps": gbps,
        "read_gbps": read_gbps,
        "bandwidth_share": gbps / read_gbps,
    }


def in_turns(
    calls: dict[str, Variant],
    layers: Sequence[SparseFFN],
    num_tokens: int,
    repeats: int,
    states: Mapping[int, Tensor] | None = None,
) -> tuple[dict[str, float], list[float]]:
    """Median seconds of each call, and the read bandwidths measured between the rounds.

    Every call runs on every layer equally often, as their sets differ in size. ``states`` are as in
    :func:`bench_mlp`.
    """
    generator = torch.Generator().manual_seed(num_tokens)
    repeats = -(-repeats // len(layers)) * len(layers)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    read_gbps = []
    bandwidth = ReadBandwidth()
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            if repeat % 4 == 0:
                read_gbps.append(bandwidth())
            for position, (name, call) in enumerate(calls.items()):
                # Each on another layer, whose weights no recent call has left in the caches.
                layer = (repeat + position * len(layers) // len(calls)) % len(layers)
                taken = seconds[name]
                if len(taken) >= 4 and min(taken) > _SLOW_SECONDS:
                    continue
                module = layers[layer]
                if states is None:
                    x = _spread_tokens(module, num_tokens, generator)
                else:
                    x = _drawn_tokens(states[module.layer_index], num_tokens, generator)
                started = time.perf_counter()
                call(layer, x)
                taken.append(time.perf_counter() - started)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}, read_gbps


def _drawn_tokens(states: Tensor, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Rows of states, each once as long as there are enough."""
    order = torch.randperm(len(states), generator=generator)
    return states[order.repeat(-(-num_tokens // len(order)))[:num_tokens]]


def _spread_tokens(module: SparseFFN, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Hidden states [n, H] that the router spreads over its clusters, as it does those of a batch.

    It would send nearly all Gaussian noise to a few clusters.
    """
    router = module.router
    up = router.up.float()
    noise = torch.randn(num_tokens, module.cost.hidden_size, generator=generator)
    ids = torch.randint(len(up), (num_tokens,), generator=generator)
    wanted = (up - up.mean(0))[ids]
    if router.down is not None:
        wanted = wanted @ router.down.float()
    wanted *= (
        4 * noise.norm(dim=-1, keepdim=True) / wanted.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    )
    x = noise + wanted
    # Of the size that hidden states have after a norm: how many looks confirm depends on it.
    x *= (x.shape[1] ** 0.5) / x.norm(dim=-1, keepdim=True)
    return x.to(router.up.dtype)


def _verify(layers: Sequence[SparseFFN]) -> None:
    """Compare sparse FFNs with the reference before anything is timed."""
    for module in layers:
        generator = torch.Generator().manual_seed(module.layer_index)
        x = torch.randn(1, module.cost.hidden_size, generator=generator).to(module.router.up.dtype)
        with torch.inference_mode():
            before = module.cluster_counts.clone()
            found = module.sparse(x).float()
            # Not module.cluster_ids(x): of noise, two clusters' logits may be as good as equal.
            ids = (module.cluster_counts - before).nonzero().flatten()
            expected = sparse_ffn_reference(x, module.weights, module.tables, ids).float()
            expected = add_compensation(expected, x, ids, module.compensation)
            error = (found - expected).norm() / expected.norm()
        if not error < 0.02:
            raise SparseRuntimeError(
                f"layer {module.layer_index}: the sparse FFN is {error:.3f} (relative) away from the "
                "reference; expected less than 0.02. Its speed means nothing; please report this"
            )


class _DenseFFN:
    """A dense FFN of a sparse one's weights in torch's own layouts."""

    def __init__(self, module: SparseFFN) -> None:
        weights = module.weights
        gate, up = weights.gate.detach(), weights.up.detach()
        self.weights = (gate, up, weights.down_t.detach().t().contiguous())
        self.packed: tuple[Tensor, ...] | None = None
        self._activation: Callable[[Tensor], Tensor] = ACTIVATION_FUNCTIONS[module.activation]
        if gate.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            # What torch.compile with freezing does to a linear layer's weight.
            self.packed = tuple(
                torch.ops.mkldnn._reorder_linear_weight(weight, 1) for weight in self.weights
            )

    def linear(self, x: Tensor) -> Tensor:
        gate, up, down = self.weights
        return F.linear(self._activation(F.linear(x, gate)) * F.linear(x, up), down)

    def prepacked(self, x: Tensor) -> Tensor:
        assert self.packed is not None
        gate, up, down = self.packed
        return _packed_linear(
            self._activation(_packed_linear(x, gate)) * _packed_linear(x, up), down
        )


def _packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return output
