"""What sparse FFNs have read: their counters, added up at the bytes of ``sparse_runtime.cost``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sparse_runtime.cost import CostReport
from sparse_runtime.ffn.rule import DENSE_REASONS
from sparse_runtime.ffn.sparse_ffn import SparseFFN


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
    sparse_tokens = 0
    sparse_bytes = dense_of_sparse = dense_of_dense = 0.0
    reasons = dict.fromkeys(DENSE_REASONS, 0)
    for module in modules:
        cost = replace(module.cost, element_size=element_size or module.cost.element_size)
        counts = read_counts(module)
        tokens = counts.sparse_tokens
        sparse_tokens += tokens
        if tokens:
            sparse_bytes += tokens * cost.sparse_bytes(
                counts.computed / tokens, counts.looked_at / tokens, counts.refined / tokens
            )
        dense_of_sparse += cost.dense_bytes * tokens
        dense_of_dense += cost.dense_bytes * sum(counts.dense.values())
        for reason, dense_tokens in counts.dense.items():
            reasons[reason] += dense_tokens
    return CostReport(
        sparse_tokens=sparse_tokens,
        dense_reasons={reason: tokens for reason, tokens in reasons.items() if tokens},
        sparse_bytes=sparse_bytes,
        dense_bytes_of_sparse_tokens=dense_of_sparse,
        dense_bytes_of_dense_tokens=dense_of_dense,
    )
