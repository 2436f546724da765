"""The Triton backend of the operation over neurons in planes (``kernels/planes.py``).

As in ``ffn.py``, without host synchronization, and in three launches for any number of tokens:

    route (router, cluster) → look, refine, gate and up → down

A program looks at some neurons and refines those of them that matter most at once: their sums so far
are in its registers. A row that any of several tokens needs is read once for all. One token's neurons
are listed before down. All neurons, without clusters, take the last two launches, and one that clears
their counters.

``tune`` does not measure them: they take the block sizes of the bfloat16 kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from sparse_runtime.kernels.operands import FFNWeights
from sparse_runtime.kernels.planes import NeuronPlanes, PlaneFormat
from sparse_runtime.kernels.triton import plane_kernels, plane_row_kernels
from sparse_runtime.kernels.triton.config import TritonConfig
from sparse_runtime.kernels.triton.ffn import (
    _FORCED,
    _LOOK_COUNTER,
    MAX_TOKENS,
    UNIT_SIZE,
    _Call,
    codes_dtype,
    num_counters,
)

_FEW = plane_kernels.FEW.value
# Rows that a program unpacks: from 16 on the compiler loads 16 bytes at a time.
_VALUE_ROWS = 16


@torch.library.custom_op(
    "sparse_runtime::triton_plane_ffn",
    mutates_args=("cluster_counts", "row_counts", "counters"),
)
def triton_plane_ffn(
    x: Tensor,
    look: Tensor,
    count: Tensor,
    refine: Tensor,
    base: int,
    residual: int,
    activation: str,
    sets: Tensor,
    cluster_ids: Tensor | None,
    router_down: Tensor | None,
    router_up: Tensor | None,
    router_bias: Tensor | None,
    factors: Tensor | None,
    tau: float,
    width: float,
    cluster_bias: Tensor | None,
    cluster_counts: Tensor,
    row_counts: Tensor,
    correction_down: Tensor | None,
    correction_up: Tensor | None,
    counters: Tensor,
    cluster_weights: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """Read the neurons of tokens' clusters as far as they matter; add bias and correction.

    :func:`sparse_runtime.kernels.plane_reference.plane_ffn_reference` is the definition.

    Args:
        x: hidden states [n, H], bfloat16, float16 or float32.
        look: records [I, ·] uint8; of one matrix where the FFN has no gate.
        count: records [I, ·] uint8.
        refine: records [I, ·] uint8; of no width without a residual.
        base: bits of base planes.
        residual: bits of residual planes.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu`` or ``relu2``.
        sets: bitmaps of candidates [K, ⌈I/8⌉] uint8.
        cluster_ids: [n] int64, instead of the router's.
        router_down: [r, H] of x's dtype, or None for a linear router.
        router_up: [K, r], or [K, H]; None with ``cluster_ids``.
        router_bias: [K]; None with ``cluster_ids``.
        factors: [I] float32; None: every candidate is refined whole.
        tau: a neuron is refined beyond.
        width: of the ramp.
        cluster_bias: [K, H], or None.
        cluster_counts: incremented for every token [K] int64.
        row_counts: incremented by neurons counted, looked at and refined [3] int64.
        correction_down: [c, H] or None, as the next.
        correction_up: [c, H].
        counters: :func:`sparse_runtime.kernels.triton.ffn.num_counters` zeros, int32; calls that may
            overlap need their own.
        cluster_weights: [K] float32, or None: all ones.
        gate_bias: added to gate·x [I] float32, or None.
        up_bias: added to up·x [I] float32, or None.

    Returns:
        [n, H], dtype of x.
    """
    planes = NeuronPlanes(
        look, count, refine, PlaneFormat(base, residual), x.shape[1], activation, gate_bias, up_bias
    )
    given = () if cluster_ids is None else cluster_ids.contiguous().split(_part(x))
    ids_of_parts = iter(given)

    def compute(tokens: Tensor) -> Tensor:
        call = _PlaneCall(tokens, planes, counters, sets)
        call.counts, call.bias = row_counts, cluster_bias
        call.cluster_weights = cluster_weights
        call.correction = None if correction_down is None else (correction_down, correction_up)
        if cluster_ids is not None:
            call.take(next(ids_of_parts), cluster_counts)
        else:
            assert router_up is not None
            assert router_bias is not None
            call.route(router_down, router_up, router_bias, cluster_counts)
        return call.compute_stages(factors, tau, width)

    return _in_parts(x, compute)


@triton_plane_ffn.register_fake
def _(x: Tensor, *unused: object, **also_unused: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("sparse_runtime::triton_dense_plane_ffn", mutates_args=())
def triton_dense_plane_ffn(
    x: Tensor,
    look: Tensor,
    count: Tensor,
    refine: Tensor,
    base: int,
    residual: int,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """All neurons with all their bits: arguments and result of the operation above, of these names."""
    counters = torch.zeros(num_counters(x.shape[1]), dtype=torch.int32, device=x.device)
    planes = NeuronPlanes(
        look, count, refine, PlaneFormat(base, residual), x.shape[1], activation, gate_bias, up_bias
    )

    def compute(tokens: Tensor) -> Tensor:
        call = _PlaneCall(tokens, planes, counters, None)
        return call.compute_stages(None, 1.0, 0.0)

    return _in_parts(x, compute)


@triton_dense_plane_ffn.register_fake
def _(x: Tensor, *unused: object, **also_unused: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("sparse_runtime::triton_plane_linear", mutates_args=())
def triton_plane_linear(
    x: Tensor, records: Tensor, base: int, residual: int, bias: Tensor | None
) -> Tensor:
    """A linear layer over rows in planes.

    Args:
        x: inputs [n, K], bfloat16, float16 or float32.
        records: of the layer's rows [N, ·] uint8.
        base: bits of base planes.
        residual: bits of residual planes.
        bias: [N] of x's dtype, or None.

    Returns:
        [n, N], dtype of x.
    """
    # Nothing is tuned for the shape of a linear layer.
    config = _FORCED[-1] if _FORCED else TritonConfig()
    rows, size, records = records.shape[0], x.shape[1], records.contiguous()
    y = x.new_empty(x.shape[0], rows)
    part = _part(x)
    for tokens, outputs in zip(x.contiguous().split(part), y.split(part), strict=True):
        if outputs.numel() == 0:
            continue
        block = config.linear_rows if len(tokens) <= _FEW else max(16, config.many_rows)
        with torch.cuda.device_of(x):
            plane_row_kernels.plane_linear_kernel[(-(-rows // block),)](
                tokens, records, records if bias is None else bias, outputs, len(tokens), rows,
                H=size, BASE=base, RESIDUAL=residual, BIASED=bias is not None, BLOCK_R=block,
                CODES=codes_dtype(x), **_tokens(tokens, config.linear_warps, config),
            )  # fmt: skip
    return y


@triton_plane_linear.register_fake
def _(x: Tensor, records: Tensor, *unused: object, **also_unused: object) -> Tensor:
    return x.new_empty(x.shape[0], records.shape[0])


@torch.library.custom_op("sparse_runtime::triton_plane_values", mutates_args=())
def triton_plane_values(
    base_planes: Tensor,
    residual_planes: Tensor,
    scales: Tensor,
    base: int,
    residual: int,
    length: int,
    like: Tensor,
) -> Tensor:
    """What rows in planes stand for.

    Args:
        base_planes: [rows, ·] uint8, as the next two; bytes of a row lie side by side, and rows may
            be apart.
        residual_planes: of no width without a residual.
        scales: bytes of the scales.
        base: bits of base planes.
        residual: bits of residual planes.
        length: weights of a row.
        like: of the dtype of the result.

    Returns:
        [rows, length] of the dtype of ``like``.
    """
    rows = len(base_planes)
    y = like.new_empty(rows, length)
    if y.numel() == 0:
        return y
    with torch.cuda.device_of(y):
        grid = -(-rows // _VALUE_ROWS), -(-length // UNIT_SIZE)
        plane_row_kernels.plane_values_kernel[grid](
            base_planes, residual_planes, scales, y, rows,
            base_planes.stride(0), residual_planes.stride(0), scales.stride(0),
            H=length, BASE=base, RESIDUAL=residual, BLOCK_R=_VALUE_ROWS,
        )  # fmt: skip
    return y


@triton_plane_values.register_fake
def _(
    base_planes: Tensor,
    residual_planes: Tensor,
    scales: Tensor,
    base: int,
    residual: int,
    length: int,
    like: Tensor,
) -> Tensor:
    return like.new_empty(len(base_planes), length)


class _PlaneCall(_Call):
    """One call's tensors, with streams of records as weights; without sets, of all neurons."""

    def __init__(
        self,
        x: Tensor,
        planes: NeuronPlanes,
        counters: Tensor,
        sets: Tensor | None,
    ) -> None:
        streams = (planes.look, planes.count, planes.refine)
        look, count, refine = (stream.contiguous() for stream in streams)
        biases = planes.gate_bias, planes.up_bias
        bitmaps = look if sets is None else sets
        weights = FFNWeights(look, count, refine, planes.activation, None, *biases)
        super().__init__(x, weights, bitmaps, None, None)
        # Neurons are listed after a look, not by the router.
        self.look = (bitmaps, look, look)
        self.clustered, self.counters = sets is not None, counters
        self.form["GATED"] = gated = planes.matrices == 2
        bits = {"BASE": planes.format.base, "RESIDUAL": planes.format.residual}
        self.format = {"H": self.hidden_size, **bits, "GATED": gated}

    def take(self, cluster_ids: Tensor, cluster_counts: Tensor) -> None:
        """Take clusters as given."""
        self.assign(cluster_ids)
        cluster_counts.scatter_add_(0, self.ids, torch.ones_like(self.ids))
        if self.correction is not None:  # the router's kernel would have projected the tokens
            self.projected = self.x.float() @ self.correction[0].float().t()
            self.projected_rows = len(self.correction[0])

    def compute_stages(self, factors: Tensor | None, tau: float, width: float) -> Tensor:
        """Outputs [n, H]; without factors every candidate is refined whole."""
        if self.tokens == 0:
            return torch.empty_like(self.x)
        activations = self.x.new_empty(self.tokens, self.neurons, dtype=torch.float32)
        finer = torch.empty_like(activations) if self.format["RESIDUAL"] else activations
        self._gate_up(activations, finer, factors, tau, width)
        return self._down(activations, finer)

    def _gate_up(
        self,
        activations: Tensor,
        finer: Tensor,
        factors: Tensor | None,
        tau: float,
        width: float,
    ) -> None:
        config = self.config
        look, _, refine = self.weights
        # All rows of a neuron are one step's rows, 16 at least as matrix units want.
        block = max(16, 2 * config.look_rows if self.tokens <= _FEW else config.many_rows)
        block //= 2 if self.form["GATED"] else 1
        plane_kernels.plane_gate_up_kernel[(-(-self.neurons // block),)](
            self.x, self.ids, self.sets, activations if factors is None else factors,
            activations if self.cluster_weights is None else self.cluster_weights, look, refine,
            *self.biases, activations, finer, self.rows, self.count,
            self.count if self.counts is None else self.counts, self.counters[_LOOK_COUNTER:],
            self.tokens, self.neurons, self.sets.shape[1], float(tau), float(width),
            **(self.format | self.form), CLUSTERED=self.clustered, STAGED=factors is not None,
            WEIGHTED=self.cluster_weights is not None, RAMP=width > 0, BLOCK_I=block,
            CODES=codes_dtype(self.x), **_tokens(self.x, config.look_warps, config),
        )  # fmt: skip

    def _down(self, activations: Tensor, finer: Tensor) -> Tensor:
        config, n = self.config, self.tokens
        _, count, refine = self.weights
        y, units = torch.empty_like(self.x), -(-self.hidden_size // UNIT_SIZE)
        splits = config.down_splits if n == 1 else config.many_splits
        # A row has 64 lanes in a unit of 256 outputs: one token's programs take more rows at a time.
        block = 2 * config.down_rows if n == 1 else max(16, config.many_rows)
        partial = self.x.new_empty(splits, n, self.hidden_size, dtype=torch.float32)
        plane_kernels.plane_down_kernel[(units, splits)](
            activations, finer, count, refine, self.rows, self.count, partial, y, *self._extras(),
            n, self.neurons, self.projected_rows, **self.format, **self._finish(),
            LISTED=self.clustered and n == 1, SPLITS=splits, BLOCK_R=block, STAGES=config.down_stages,
            **_tokens(self.x, config.down_warps, config, few=1),
        )  # fmt: skip
        return y


def _in_parts(x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Outputs [n, H] of so many tokens at a time as the kernels take."""
    with torch.cuda.device_of(x):  # Triton launches on the current device; no-op on the CPU
        outputs = [compute(tokens) for tokens in x.contiguous().split(_part(x))]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _part(x: Tensor) -> int:
    """Tokens at a time: products of float32 go without matrix units, through registers."""
    return 16 if x.dtype == torch.float32 else MAX_TOKENS


def _tokens(x: Tensor, warps: int, config: TritonConfig, few: int = _FEW) -> dict[str, Any]:
    """How a part's products are computed; tf32 holds all of 16 bits.

    Args:
        x: the part [n, H].
        warps: of a program, for few tokens.
        config: has those for more.
        few: so many tokens have a place of their own in a kernel; more are 16 at least.
    """
    exact = x.dtype == torch.float32
    padded = triton.next_power_of_2(len(x))
    if padded > few:
        padded = max(16, padded)
        # Sums of more tokens do not fit into the registers of the same number of threads.
        warps = config.many_warps * (2 if exact or padded > 16 else 1)
    return {"TOKENS": padded, "PRECISION": "ieee" if exact else "tf32", "num_warps": warps}
