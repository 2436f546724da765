"""The tensors that a sparse FFN has besides its projections, as the operation's objects."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from sparse_runtime.ffn.rule import DENSE_REASONS
from sparse_runtime.kernels.operands import ClusterTables, Compensation, Counters, RouterWeights

# An addition of torch's is no atomic one. The kernels of the other backends count atomically.
_COUNTING = threading.Lock()


class FFNBuffers(nn.Module):
    """Cluster tables, router, compensation and counters of one FFN.

    Attributes:
        cluster_counts: tokens routed to each cluster so far [K] int64.
        row_counts: neurons computed and neurons looked at so far, over all tokens [2] int64; over
            planes also neurons refined [3].
        dense_counts: tokens that ran dense so far, by ``DENSE_REASONS`` int64.
        audit_cluster_counts, audit_row_counts: of what the guard ran beside dense calls, likewise.
    """

    cluster_counts: Tensor
    row_counts: Tensor
    dense_counts: Tensor
    audit_cluster_counts: Tensor
    audit_row_counts: Tensor

    @property
    def tables(self) -> ClusterTables:
        """Sets of the clusters."""
        b = self._buffers
        return ClusterTables(
            b["active_sets"],  # type: ignore[arg-type]
            b["maybe_sets"],
            b["factors"],
            b["cluster_weights"],
        )

    @property
    def router(self) -> RouterWeights:
        """The router."""
        b = self._buffers
        return RouterWeights(b["router_up"], b["router_bias"], b["router_down"])  # type: ignore[arg-type]

    @property
    def compensation(self) -> Compensation:
        """Bias and correction for what is left out."""
        b = self._buffers
        return Compensation(b["cluster_bias"], b["correction_down"], b["correction_up"])

    @property
    def counters(self) -> Counters:
        """What calls have read so far."""
        b = self._buffers
        return Counters(b["cluster_counts"], b["row_counts"], b["programs"])  # type: ignore[arg-type]

    @property
    def audit_counters(self) -> Counters:
        """What audits have read so far."""
        b = self._buffers
        return Counters(b["audit_cluster_counts"], b["audit_row_counts"], b["programs"])  # type: ignore[arg-type]

    def count_dense(self, reason: str, num_tokens: int) -> None:
        """Count tokens that run dense for one of ``DENSE_REASONS``."""
        index = DENSE_REASONS.index(reason)
        if torch.compiler.is_compiling():
            self.dense_counts[index] += num_tokens
            return
        # A transform of torch.func would refuse to write to what it does not know.
        with _COUNTING, torch._C._DisableFuncTorch():
            self.dense_counts[index] += num_tokens

    def reset_counts(self) -> None:
        """Set the counters to zero."""
        audits = self.audit_cluster_counts, self.audit_row_counts
        for counts in (self.cluster_counts, self.row_counts, self.dense_counts, *audits):
            counts.zero_()
