"""The part of a mixture of experts that makes it sparse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_runtime.errors import BackendUnavailableError
from sparse_runtime.ffn.rule import NO_DERIVATIVE
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.ffn.sparse_planes import SparsePlaneFFN
from sparse_runtime.kernels import routed_ffn
from sparse_runtime.kernels.linear import needs_gradient
from sparse_runtime.kernels.operands import ExpertChoice, FFNWeights
from sparse_runtime.kernels.plane_op import routed_plane_ffn
from sparse_runtime.kernels.reference import add_compensation, sparse_experts_reference
from sparse_runtime.models.experts import ExpertRows


class _OfExperts(SparseFFN):
    """What is the same of experts with float weights and in planes."""

    def forward(self, hidden_states: Tensor, *choice: Tensor) -> Tensor:
        """Map hidden states [n, H], with index and weights [n, k] of their experts, to [n, H]."""
        if needs_gradient(*choice):  # the router's
            self.state.warn_once("gradients", NO_DERIVATIVE)
            self.count_dense("gradients", len(hidden_states))
            return self.dense(hidden_states, *choice)
        return super().forward(hidden_states, *choice)

    @property
    def experts(self) -> int:
        """E."""
        down: Any = self.owner._parameters[self.form.projections[-1]]
        return int(down.shape[0])

    @property
    def decoder_layer(self) -> nn.Module:
        """That holds them."""
        return self._decoder_layer[0]

    def _choice(self, choice: tuple[Tensor, ...]) -> ExpertChoice:
        return ExpertChoice.of(self.experts, *choice)

    def _place(self, device: torch.device, dtype: torch.dtype) -> None:
        super()._place(device, dtype)
        self.rule = replace(self.rule, rows=0)
        if self.backend == "triton":
            self.backend, self._placed = "dense", None
            problem = "experts have no Triton kernels yet"
            if self.config.strict:
                raise BackendUnavailableError(f"{self.name}: {problem}; sparsify without strict")
            self.state.warn_once("no backend", f"{self.name} runs dense: {problem}")


class SparseExperts(_OfExperts):
    """What ``sparsify`` adds to the experts of a decoder layer, as their child ``sparse_ffn``.

    The model's own router chooses experts as before; of those that a token has, the neurons of its
    cluster are read. Calls of more tokens run by the model's own implementation.
    """

    def _routed(self, x: Tensor, operands: Any, *choice: Tensor) -> Tensor:
        return routed_ffn(x, *operands, backend=self.backend, choice=self._choice(choice))

    def _by_clusters(self, x: Tensor, ids: Tensor, *choice: Tensor) -> Tensor:
        self.cluster_counts.scatter_add_(0, ids, torch.ones_like(ids))
        chosen = self._choice(choice)
        output = sparse_experts_reference(
            x, self.weights, self.tables, ids, chosen, self.row_counts
        )
        return add_compensation(output, x, ids, self.compensation)

    # What it works on

    def _own_weights(self) -> tuple[Tensor, ...]:
        return tuple(self.owner._parameters[name] for name in self.form.projections)  # type: ignore[misc]

    def _projection_weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        gate, up, down = (ExpertRows(self.owner, part).weight for part in ("gate", "up", "down"))
        return gate, up, down

    @property
    def weights(self) -> FFNWeights:
        """The parameters, a neuron or one of its parts a row."""
        gate_up, down = self._own_weights()
        rows = gate_up.flatten(0, 1), None, down.mT.flatten(0, 1)
        return FFNWeights(*rows, self.activation, self._buffers["look"])


class SparsePlaneExperts(_OfExperts, SparsePlaneFFN):
    """The same for experts in planes."""

    @property
    def experts(self) -> int:
        """E."""
        return self.owner.experts  # type: ignore[return-value]

    def _routed(self, x: Tensor, operands: Any, *choice: Tensor) -> Tensor:
        chosen = self._choice(choice)
        return routed_plane_ffn(x, *operands, backend=self.backend, choice=chosen)

    def _by_clusters(self, x: Tensor, ids: Tensor, *choice: Tensor) -> Tensor:
        extra: dict[str, Any] = {"cluster_ids": ids, "choice": self._choice(choice)}
        return routed_plane_ffn(x, *self._flattened(), backend=self.backend, **extra)
