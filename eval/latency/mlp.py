"""Latency of FFNs alone: dense as torch runs it, the best dense there is, and sparse.

Weights are rotated over several layers, so that a call finds none of them in the caches, as in a real
decode step. All variants take turns in one run, and the read bandwidth is measured between them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.eval.latency.ffn_checks import DenseFFN, drawn_tokens, verify_outputs
from sparse_runtime.eval.latency.host import ReadBandwidth
from sparse_runtime.eval.latency.timing import in_turns
from sparse_runtime.ffn.counts import read_counts
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS

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
    verify_outputs(layers[:_LAYERS], SparseFFN.sparse)
    dense = [_PrepackedFFN(module) for module in layers]
    variants: dict[str, Variant] = {
        "dense": lambda i, x: dense[i](x),
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
        seconds, read_gbps = over_layers(calls, layers, num_tokens, rounds, states)
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


def over_layers(
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
    read_gbps: list[float] = []
    bandwidth = ReadBandwidth()

    def prepared(position: int, call: Variant) -> Callable[[int], Callable[[], Any]]:
        def prepare(number: int) -> Callable[[], Any]:
            # Each on another layer, whose weights no recent call has left in the caches.
            layer = (number + position * len(layers) // len(calls)) % len(layers)
            module = layers[layer]
            if states is None:
                x = _spread_tokens(module, num_tokens, generator)
            else:
                x = drawn_tokens(states[module.layer_index], num_tokens, generator)
            return lambda: call(layer, x)

        return prepare

    def read(number: int) -> None:
        if number % 4 == 0:
            read_gbps.append(bandwidth())

    with torch.inference_mode():
        seconds = in_turns(
            {name: prepared(position, call) for position, (name, call) in enumerate(calls.items())},
            -(-repeats // len(layers)) * len(layers),
            before_round=read,
            slow_seconds=_SLOW_SECONDS,
        )
    return seconds, read_gbps


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


class _PrepackedFFN(DenseFFN):
    """A dense FFN of a sparse one's weights, also in oneDNN's layout where it has bfloat16."""

    def __init__(self, module: SparseFFN) -> None:
        weights = module.weights
        super().__init__(weights.gate, weights.up, weights.down_t.t(), module.activation)
        self.packed: tuple[Tensor, ...] | None = None
        if weights.gate.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            # What torch.compile with freezing does to a linear layer's weight.
            self.packed = tuple(
                torch.ops.mkldnn._reorder_linear_weight(weight, 1)
                for weight in self.weights
                if weight is not None
            )

    def prepacked(self, x: Tensor) -> Tensor:
        assert self.packed is not None
        gate, *up, down = self.packed
        h = ACTIVATION_FUNCTIONS[self.activation](_packed_linear(x, gate))
        return _packed_linear(h * _packed_linear(x, up[0]) if up else h, down)


def _packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return output
