"""Latency of a mixture's experts alone: by the model's own code, all rows by ours, and sparse."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.latency.ffn_checks import TOLERANCE, tokens_for, verify_outputs
from sparse_runtime.eval.latency.mlp import over_layers
from sparse_runtime.ffn.counts import count_cost
from sparse_runtime.ffn.patch import SparseForward
from sparse_runtime.ffn.plane_modules import shallow
from sparse_runtime.ffn.projections import own_class
from sparse_runtime.ffn.sparse_experts import SparseExperts
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.kernels import routed_ffn
from sparse_runtime.kernels.operands import ClusterTables, Compensation, Counters, ExpertChoice
from sparse_runtime.kernels.reference import add_compensation, sparse_experts_reference

# Layers that calls rotate over; their experts are beyond every cache, and down is copied.
_LAYERS = 2
# Choices of experts that calls take in turns.
_CHOICES = 61


def bench_experts(
    modules: Sequence[SparseFFN],
    states: Mapping[int, Tensor] | None = None,
    *,
    repeats: int = 41,
) -> dict[str, Any]:
    """Time a sparse model's experts for one token against dense ones of the same weights.

    Each call has other experts, drawn at random, whose weights no recent call has left in the caches.

    Args:
        modules: the model's sparse FFNs, backend ``cpu``; some are experts.
        states: as of :func:`sparse_runtime.eval.latency.mlp.bench_mlp`.
        repeats: calls of each variant.

    Returns:
        ``cost_share``; ``dense_ms`` (the model's own implementation, on its own layout),
        ``all_rows_ms`` (our kernels, nothing skipped) and ``sparse_ms``; ``speedup`` over dense and
        ``speedup_over_all_rows``; ``gbps`` of the sparse calls, ``all_rows_gbps`` and ``read_gbps``.

    Raises:
        SparseRuntimeError: the sparse experts' outputs are not those of the reference, or all rows give
            something else than the model's own implementation.
    """
    layers = [module for module in modules if isinstance(module, SparseExperts)][:_LAYERS]
    draw = _Draw(layers[0])
    verify_outputs(layers, draw.sparse, reference=draw.reference)
    dense = [_own_experts(module.owner) for module in layers]
    whole = [_all_rows(module) for module in layers]
    for module, own, rows in zip(layers, dense, whole, strict=True):
        _check_same(module, own, rows, draw())
    calls: dict[str, Callable[[int, Tensor], Any]] = {
        "dense": lambda i, x: dense[i](x, *draw()),
        "all_rows": lambda i, x: whole[i](x, *draw()),
        "sparse": lambda i, x: layers[i].sparse(x, *draw()),
    }
    for module in layers:
        module.reset_counts()
    seconds, read_gbps = over_layers(calls, layers, 1, repeats, states)
    report, dense_bytes = count_cost(layers), layers[0].cost.dense_bytes
    return {
        "cost_share": report.cost_share,
        **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
        "speedup": seconds["dense"] / seconds["sparse"],
        "speedup_over_all_rows": seconds["all_rows"] / seconds["sparse"],
        "gbps": report.sparse_bytes / report.sparse_tokens / seconds["sparse"] / 1e9,
        "all_rows_gbps": dense_bytes / seconds["all_rows"] / 1e9,
        "dense_gbps": dense_bytes / seconds["dense"] / 1e9,
        "read_gbps": statistics.median(read_gbps),
    }


class _Draw:
    """Choices of experts for one token, in turns; and the same ones for calls of several."""

    def __init__(self, module: SparseExperts) -> None:
        self._module = module
        self._generator = torch.Generator().manual_seed(0)
        self._next = itertools.cycle([self._choice(1) for _ in range(_CHOICES)])
        self._of_several: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self) -> tuple[Tensor, Tensor]:
        return next(self._next)

    def sparse(self, module: SparseFFN, x: Tensor) -> Tensor:
        return module.sparse(x, *self._several(len(x)))

    def reference(self, module: SparseFFN, x: Tensor, ids: Tensor) -> Tensor:
        choice = ExpertChoice.of(self._module.experts, *self._several(len(x)))
        expected = sparse_experts_reference(x, module.weights, module.tables, ids, choice)
        return add_compensation(expected, x, ids, module.compensation)

    def _several(self, count: int) -> tuple[Tensor, Tensor]:
        if count not in self._of_several:
            self._of_several[count] = self._choice(count)
        return self._of_several[count]

    def _choice(self, count: int) -> tuple[Tensor, Tensor]:
        experts, cost = self._module.experts, self._module.cost
        active = cost.neurons * experts // cost.intermediate_size
        order = torch.rand(count, experts, generator=self._generator).argsort(1)
        weights = torch.rand(count, active, generator=self._generator).softmax(1)
        return order[:, :active].contiguous(), weights.to(self._module.router.up.dtype)


@torch.inference_mode()
def _check_same(
    module: SparseFFN,
    own: Callable[..., Tensor],
    rows: Callable[..., Tensor],
    choice: tuple[Tensor, Tensor],
) -> None:
    """Check that both dense variants compute the same for a token."""
    x = tokens_for(module, 1)
    expected, found = own(x, *choice).float(), rows(x, *choice).float()
    error = ((found - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE:
        raise SparseRuntimeError(
            f"layer {module.layer_index}: all rows of its experts are {error:.3f} (relative) away from "
            f"the model's own; expected less than {TOLERANCE}. Their speed means nothing; please "
            "report this"
        )


def _own_experts(owner: nn.Module) -> nn.Module:
    """The experts as the model has them: their class, and down in its own layout."""
    assert isinstance(owner, SparseForward)
    twin = shallow(owner)
    twin.__class__ = own_class(owner)
    for name, parameter in owner._parameters.items():
        if parameter is not None and not parameter.is_contiguous():
            copied = parameter.detach().clone(memory_format=torch.contiguous_format)
            twin._parameters[name] = nn.Parameter(copied, requires_grad=False)
    return twin


def _all_rows(module: SparseExperts) -> Callable[..., Tensor]:
    """The experts by our kernels with every neuron in every set."""
    tables = ClusterTables(torch.full_like(module.tables.active_sets, 255))
    counters = Counters(module.cluster_counts.clone(), module.row_counts.clone())
    operands = module.weights, tables, module.router, Compensation(), counters

    def call(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        chosen = ExpertChoice.of(module.experts, index, weights)
        return routed_ffn(x, *operands, backend="cpu", choice=chosen)

    return call
