"""What sparse FFNs have read: their counters, added up at the bytes of ``sparse_runtime.cost``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from sparse_runtime.cost import CostReport, FFNCost, share_in_bits
from sparse_runtime.errors import NothingMatchedError, UnsupportedArchitectureError
from sparse_runtime.ffn.patch import ffn_parts, owners, sparse_ffn_of
from sparse_runtime.ffn.rule import DENSE_REASONS
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.models.ffn_layers import find_ffn_layers


@dataclass(frozen=True)
class FFNCounts:
    """Counters of one FFN, on the CPU.

    Attributes:
        clusters: tokens routed to each cluster [K] int64.
        computed: neurons computed, over all sparse tokens.
        looked_at: neurons looked at, over all sparse tokens.
        refined: neurons whose residual planes were read, over all sparse tokens; 0 for float weights.
        dense: reason -> tokens that ran dense for it.
    """

    clusters: Tensor
    computed: int
    looked_at: int
    refined: int
    dense: dict[str, int]

    @property
    def sparse_tokens(self) -> int:
        """Tokens that ran sparsely."""
        return int(self.clusters.sum())


def read_counts(module: SparseFFN) -> FFNCounts:
    """Read the counters of an FFN; synchronizes with its device."""
    computed, looked_at, *refined = module.row_counts.tolist()
    dense = dict(zip(DENSE_REASONS, module.dense_counts.tolist(), strict=True))
    return FFNCounts(module.cluster_counts.cpu(), computed, looked_at, sum(refined), dense)


def count_cost(modules: Sequence[SparseFFN], *, element_size: int | None = None) -> CostReport:
    """Add up the counters of sparse FFNs; synchronizes with their devices.

    Args:
        modules: the sparse FFNs.
        element_size: bytes per weight to count with; those of the weights if None.
    """
    counted = [(module.cost, read_counts(module)) for module in modules]
    report = _added_up(counted, element_size)
    return replace(report, bits_per_weight=share_in_bits(_added_up(counted, 2).cost_share))


def _added_up(counted: Sequence[tuple[FFNCost, FFNCounts]], size: int | None) -> CostReport:
    sparse_tokens = 0
    sparse_bytes = dense_of_sparse = dense_of_dense = of_dense = 0.0
    reasons = dict.fromkeys(DENSE_REASONS, 0)
    for own, counts in counted:
        cost = own if size is None else replace(own, element_size=size)
        tokens, dense_tokens = counts.sparse_tokens, sum(counts.dense.values())
        sparse_tokens += tokens
        sparse_bytes += tokens * _per_token(cost, counts)
        dense_of_sparse += cost.dense_bytes * tokens
        dense_of_dense += cost.dense_bytes * dense_tokens
        of_dense += cost.whole_bytes * dense_tokens
        for reason, number in counts.dense.items():
            reasons[reason] += number
    return CostReport(
        sparse_tokens=sparse_tokens,
        dense_reasons={reason: tokens for reason, tokens in reasons.items() if tokens},
        sparse_bytes=sparse_bytes,
        dense_bytes_of_sparse_tokens=dense_of_sparse,
        dense_bytes_of_dense_tokens=dense_of_dense,
        bytes_of_dense_tokens=of_dense,
    )


def _per_token(cost: FFNCost, counts: FFNCounts) -> float:
    """Mean bytes of the tokens that ran sparsely; 0 without any."""
    tokens = counts.sparse_tokens
    if tokens == 0:
        return 0.0
    return cost.sparse_bytes(
        counts.computed / tokens, counts.looked_at / tokens, counts.refined / tokens
    )


def bytes_per_token(model: Any) -> float:
    """Bytes of weights that decoding one token reads, of the whole model as it is stored.

    Sparse FFNs count by what their sparse tokens have read since the last reset, routers included;
    where none ran sparsely, they count whole, as attention, head, norms and dense FFNs do, packed or
    not, and of experts those that a token has. The input embedding is a look-up of one row and does not
    count; a tied output head does. Synchronizes with the devices.

    Args:
        model: a causal language model, dense or sparse.
    """
    total = float(sum(map(_size, model.parameters())))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if getattr(head, "weight", None) is not embedding:
        total -= _size(embedding)
    counted = set()
    for owner in owners(model):
        module = sparse_ffn_of(owner)
        read = _per_token(module.cost, read_counts(module))
        if read:
            counted.add(owner)
            total += read
            total -= sum(_size(p) for part in ffn_parts(owner) for p in part.parameters())
    for experts, share in _shares_of_experts(model):
        if experts not in counted:
            total -= (1 - share) * sum(map(_size, experts.parameters()))
    return total


def _shares_of_experts(model: nn.Module) -> Iterator[tuple[nn.Module, float]]:
    """The modules that hold experts, and which share of these a token has."""
    with suppress(UnsupportedArchitectureError, NothingMatchedError):
        for layer in find_ffn_layers(model, packed=True, int8=True):
            if layer.experts:
                yield layer.mlp, layer.active / layer.experts


def _size(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()
