"""The Triton backend: the sparse FFN on GPUs, in few launches and without host synchronization.

One token takes three launches, or four with looks:

    route (router, cluster, list of its neurons) → [look] → gate and up → down

Several tokens take four: their neurons are no list but a mask, and a row that any of them needs is read
once for all, so that a batch never reads more than the dense FFN.

Imported when a model on a GPU first asks for it. Without one, Triton's interpreter runs the same
kernels on the CPU, slowly, if ``TRITON_INTERPRET=1`` is set before this module is imported: for tests.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_runtime.cost import LOOK_BITS
from sparse_runtime.kernels.operands import (
    ClusterTables,
    Compensation,
    Counters,
    FFNWeights,
    RouterWeights,
)
from sparse_runtime.kernels.triton import kernels
from sparse_runtime.kernels.triton.config import TritonConfig, config_for
from sparse_runtime.kernels.triton.look_kernel import look_kernel

#: Whether the interpreter runs the kernels, as it was when they were defined.
INTERPRETED = bool(triton.knobs.runtime.interpret)
#: Calls of more tokens are cut in parts: activations and partial sums are kept for all of a part.
MAX_TOKENS = 64
#: Elements of a unit of planes: 4 groups of 64.
UNIT_SIZE = 256
# Places of the counters: one for each token while routing, one for looks, then one for each block of
# outputs.
_LOOK_COUNTER = MAX_TOKENS
_DOWN_COUNTERS = MAX_TOKENS + 1
#: The smallest block of outputs in any configuration bounds the number of counters.
_LEAST_BLOCK = 16


def num_counters(hidden_size: int) -> int:
    """Counters that a layer needs, int32 and zero at the start; every call leaves them zero."""
    return _DOWN_COUNTERS + -(-hidden_size // _LEAST_BLOCK)


@torch.library.custom_op(
    "sparse_runtime::triton_routed_ffn",
    mutates_args=("cluster_counts", "row_counts", "counters"),
)
def triton_routed_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down_t: Tensor,
    sets: Tensor,
    router_down: Tensor | None,
    router_up: Tensor,
    router_bias: Tensor,
    cluster_bias: Tensor | None,
    cluster_counts: Tensor,
    activation: str,
    maybe_sets: Tensor | None,
    look: Tensor | None,
    factors: Tensor | None,
    row_counts: Tensor | None,
    correction_down: Tensor | None,
    correction_up: Tensor | None,
    counters: Tensor,
    cluster_weights: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """Route tokens and compute their clusters' neurons, bias and correction.

    Args:
        x: hidden states [n, H], bfloat16, float16 or float32.
        w_gate: [I, H], contiguous and of x's dtype, as all weights are.
        w_up: [I, H], or None.
        w_down_t: [I, H].
        sets: bitmaps [K, ⌈I/8⌉] uint8.
        router_down: [r, H], or None for a linear router.
        router_up: [K, r], or [K, H].
        router_bias: [K].
        cluster_bias: [K, H] or None.
        cluster_counts: incremented for every token [K] int64.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu`` or ``relu2``.
        maybe_sets: bitmaps [K, ⌈I/8⌉] uint8, or None, as the next two.
        look: records [I, R] uint8 in ``LOOK_FORMAT``.
        factors: [I] float32.
        row_counts: incremented by the neurons computed and looked at [2] int64, or None.
        correction_down: [c, H] or None, as the next.
        correction_up: [c, H].
        counters: :func:`num_counters` zeros, int32; calls that may overlap need their own.
        cluster_weights: [K] float32, or None: all ones.
        gate_bias, up_bias: [I] float32, or None.

    Returns:
        [n, H], dtype of x.
    """
    outputs = []
    for tokens in x.contiguous().split(MAX_TOKENS):
        weights = FFNWeights(w_gate, w_up, w_down_t, activation, look, gate_bias, up_bias)
        call = _Call(tokens, weights, sets, maybe_sets, factors)
        call.counts, call.cluster_weights = row_counts, cluster_weights
        call.counters = counters
        call.bias = cluster_bias
        call.correction = None if correction_down is None else (correction_down, correction_up)
        with torch.cuda.device_of(x):  # Triton launches on the current device; no-op on the CPU
            call.route(router_down, router_up, router_bias, cluster_counts)
            outputs.append(call.compute())
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@triton_routed_ffn.register_fake
def _(x: Tensor, *unused: object, **also_unused: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("sparse_runtime::triton_sparse_ffn", mutates_args=("row_counts",))
def triton_sparse_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down_t: Tensor,
    sets: Tensor,
    cluster_ids: Tensor,
    activation: str,
    maybe_sets: Tensor | None,
    look: Tensor | None,
    factors: Tensor | None,
    row_counts: Tensor,
    cluster_weights: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """Compute the neurons of given clusters; arguments of :func:`sparse_runtime.kernels.sparse_ffn`."""
    counters = torch.zeros(num_counters(x.shape[1]), dtype=torch.int32, device=x.device)
    outputs = []
    parts = x.contiguous().split(MAX_TOKENS), cluster_ids.contiguous().split(MAX_TOKENS)
    for tokens, ids in zip(*parts, strict=True):
        weights = FFNWeights(w_gate, w_up, w_down_t, activation, look, gate_bias, up_bias)
        call = _Call(tokens, weights, sets, maybe_sets, factors)
        call.counts, call.cluster_weights = row_counts, cluster_weights
        call.counters = counters
        with torch.cuda.device_of(x):
            call.assign(ids)
            outputs.append(call.compute())
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@triton_sparse_ffn.register_fake
def _(x: Tensor, *unused: object, **also_unused: object) -> Tensor:
    return x.new_empty(x.shape)


def route_only(
    x: Tensor,
    weights: FFNWeights,
    tables: ClusterTables,
    router: RouterWeights,
    counters: Counters,
    compensation: Compensation,
) -> None:
    """The first launch of :func:`triton_routed_ffn` alone, to be timed; x is [n, H]."""
    sets, down = tables.active_sets, compensation.correction_down
    call = _Call(x, weights, sets, None, None)
    assert counters.programs is not None
    call.counters = counters.programs
    call.correction = None if down is None else (down, down)
    call.route(router.down, router.up, router.bias, counters.clusters)


class _Call:
    """One call's tensors; scratch memory comes from torch's allocator, which CUDA graphs know."""

    def __init__(
        self,
        x: Tensor,
        weights: FFNWeights,
        sets: Tensor,
        maybe_sets: Tensor | None,
        factors: Tensor | None,
    ) -> None:
        self.x, self.sets = x, sets
        gate, up = weights.gate, weights.up
        # x stands in for what is not read.
        self.weights = gate, gate if up is None else up, weights.down_t
        self.biases = tuple(x if b is None else b for b in (weights.gate_bias, weights.up_bias))
        self.form = {
            "ACTIVATION": weights.activation,
            "GATED": up is not None,
            "GATE_BIASED": weights.gate_bias is not None,
            "UP_BIASED": weights.up_bias is not None,
        }
        self.look = None
        if maybe_sets is not None and weights.look is not None and factors is not None:
            self.look = (maybe_sets, weights.look, factors)
        self.tokens, self.hidden_size = x.shape
        self.neurons = gate.shape[0]
        self.config = _config(str(x.device), self.hidden_size, self.neurons, x.dtype)
        self.counts: Tensor | None = None
        self.cluster_weights: Tensor | None = None
        self.bias: Tensor | None = None
        self.correction: Any = None
        self.counters = x
        self.ids = x.new_empty(self.tokens, dtype=torch.int64)
        self.projected = x.new_empty(0, dtype=torch.float32)
        self.projected_rows = 0
        one = self.tokens == 1
        self.rows = x.new_empty(self.neurons if one else 0, dtype=torch.int32)
        self.count = x.new_empty(1, dtype=torch.int32)

    def route(
        self, router_down: Tensor | None, router_up: Tensor, router_bias: Tensor, counts: Tensor
    ) -> None:
        """Pick each token's cluster; without looks, list a single token's neurons."""
        rank = 0 if router_down is None else len(router_down)
        first = router_up if router_down is None else router_down
        clusters = len(router_up)
        extra = 0 if self.correction is None else len(self.correction[0])
        self.projected_rows = len(first) + extra
        self.projected = self.x.new_empty(self.tokens, self.projected_rows, dtype=torch.float32)
        config, listed = self.config, self.tokens == 1 and self.look is None
        kernels.route_kernel[(-(-self.projected_rows // config.route_rows), self.tokens)](
            self.x, first, first if extra == 0 else self.correction[0], router_up, router_bias,
            self.projected, self.ids, counts, self.sets, self.rows, self.count,
            self.count if self.counts is None else self.counts, self.counters,
            self.hidden_size, self.neurons, clusters, self.sets.shape[1],
            RANK=rank, CORRECTION=extra, LISTED=listed, COUNTED=self.counts is not None,
            BLOCK_R=config.route_rows, BLOCK_H=_block(config.route_hidden, self.hidden_size),
            BLOCK_K=config.route_clusters, PADDED_RANK=max(1, triton.next_power_of_2(rank)),
            num_warps=config.route_warps,
        )  # fmt: skip

    def assign(self, cluster_ids: Tensor) -> None:
        """Take clusters as given."""
        self.ids = cluster_ids
        if self.tokens == 1 and self.look is None:
            kernels.list_kernel[(1,)](
                self.sets, self.ids, self.rows, self.count,
                self.count if self.counts is None else self.counts,
                self.neurons, self.sets.shape[1], COUNTED=self.counts is not None,
            )  # fmt: skip

    def compute(self) -> Tensor:
        """Outputs [n, H]."""
        if self.tokens == 0:
            return torch.empty_like(self.x)
        if self.look is not None or self.tokens > 1:
            self._look()
        return self._one() if self.tokens == 1 else self._many()

    def _look(self) -> None:
        config, verify = self.config, self.look is not None
        maybe_sets, look, factors = self.look or (self.sets, self.sets, self.x)
        self.member = self.x.new_empty(self.tokens, self.neurons, dtype=torch.uint8)
        look_kernel[(-(-self.neurons // config.look_rows), self.tokens)](
            self.x, self.ids, self.sets, maybe_sets, look, factors,
            self.x if self.cluster_weights is None else self.cluster_weights, *self.biases,
            self.member, self.rows, self.count, self.count if self.counts is None else self.counts,
            self.counters[_LOOK_COUNTER:], self.neurons, self.sets.shape[1],
            H=self.hidden_size, BASE=LOOK_BITS, VERIFY=verify,
            WEIGHTED=self.cluster_weights is not None, LISTED=self.tokens == 1,
            COUNTED=self.counts is not None, **self.form, BLOCK_I=config.look_rows,
            CODES=codes_dtype(self.x), num_warps=config.look_warps,
        )  # fmt: skip

    def _one(self) -> Tensor:
        gate, up, down = self.weights
        config, hidden_size = self.config, self.hidden_size
        activations = self.x.new_empty(self.neurons, dtype=torch.float32)
        kernels.gate_up_one_kernel[(-(-self.neurons // config.gate_rows),)](
            self.x, gate, up, *self.biases, self.rows, self.count, activations, hidden_size,
            **self.form, BLOCK_R=config.gate_rows,
            BLOCK_H=_block(config.gate_hidden, hidden_size), num_warps=config.gate_warps,
        )  # fmt: skip
        y, block = torch.empty_like(self.x), _block(config.down_hidden, hidden_size)
        partial = self.x.new_empty(config.down_splits, hidden_size, dtype=torch.float32)
        kernels.down_one_kernel[(-(-hidden_size // block), config.down_splits)](
            activations, down, self.rows, self.count, partial, y, *self._extras(), hidden_size,
            self.projected_rows, **self._finish(), SPLITS=config.down_splits,
            BLOCK_R=config.down_rows, BLOCK_H=block, STAGES=config.down_stages,
            num_warps=config.down_warps,
        )  # fmt: skip
        return y

    def _many(self) -> Tensor:
        gate, up, down = self.weights
        config, n, hidden_size, neurons = self.config, self.tokens, self.hidden_size, self.neurons
        padded = max(16, triton.next_power_of_2(n))
        activations = self.x.new_empty(n, neurons)
        kernels.gate_up_many_kernel[(-(-neurons // config.many_rows),)](
            self.x, gate, up, *self.biases, self.member, activations, n, hidden_size, neurons,
            **self.form, TOKENS=padded, WIDEN=INTERPRETED, BLOCK_R=config.many_rows,
            BLOCK_H=max(16, _block(config.many_hidden, hidden_size)), num_warps=config.many_warps,
        )  # fmt: skip
        y, block = torch.empty_like(self.x), max(16, _block(config.many_outputs, hidden_size))
        partial = self.x.new_empty(config.many_splits, n, hidden_size, dtype=torch.float32)
        kernels.down_many_kernel[(-(-hidden_size // block), config.many_splits)](
            activations, down, self.member, partial, y, *self._extras(), n, hidden_size, neurons,
            self.projected_rows, **self._finish(), TOKENS=padded, WIDEN=INTERPRETED,
            SPLITS=config.many_splits, BLOCK_R=config.many_rows, BLOCK_H=block,
            num_warps=config.many_warps,
        )  # fmt: skip
        return y

    def _extras(self) -> tuple[Tensor, ...]:
        """Tensors of the last step; x stands in for those that it does not read."""
        bias = self.x if self.bias is None else self.bias
        up = self.x if self.correction is None else self.correction[1]
        return self.ids, bias, self.projected, up, self.counters[_DOWN_COUNTERS:]

    def _finish(self) -> dict[str, Any]:
        extra = 0 if self.correction is None else len(self.correction[0])
        return {"BIASED": self.bias is not None, "CORRECTION": extra}


def _block(wanted: int, size: int) -> int:
    """A block of at most ``wanted`` that is no larger than it needs to be."""
    return min(wanted, int(triton.next_power_of_2(size)))


def codes_dtype(x: Tensor) -> tl.dtype:
    """What codes are multiplied with tokens as: whole numbers up to 128 are exact in any dtype.

    The interpreter computes bfloat16 wrongly.
    """
    if INTERPRETED or x.dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16


@contextmanager
def forced_config(config: TritonConfig) -> Iterator[None]:
    """Run all calls inside the context with one configuration, to measure it."""
    _FORCED.append(config)
    try:
        yield
    finally:
        _FORCED.pop()


_FORCED: list[TritonConfig] = []


def _config(device: str, hidden_size: int, neurons: int, dtype: torch.dtype) -> TritonConfig:
    return _FORCED[-1] if _FORCED else _known_config(device, hidden_size, neurons, dtype)


@functools.cache
def _known_config(device: str, hidden_size: int, neurons: int, dtype: torch.dtype) -> TritonConfig:
    return config_for(torch.device(device), hidden_size, neurons, dtype)
