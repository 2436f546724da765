"""A mixture of experts whose weights are in planes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_runtime.ffn.plane_modules import PlaneFFN, shallow
from sparse_runtime.kernels.operands import ExpertChoice
from sparse_runtime.kernels.plane_op import dense_plane_ffn
from sparse_runtime.kernels.planes import PlaneFormat
from sparse_runtime.models.ffn_layer import FFNLayer


class PlaneExperts(PlaneFFN):
    """Experts over neurons in planes, one expert's after the other's, in place of a model's own.

    Attributes:
        experts: E.
    """

    def __init__(self, layer: FFNLayer, form: PlaneFormat) -> None:
        """Planes of no value yet; see :class:`PlaneFFN`."""
        super().__init__(layer, form)
        self.experts = layer.experts

    def forward(self, hidden_states: Tensor, *choice: Tensor) -> Tensor:
        """Map hidden states [n, H], with index and weights [n, k] of their experts, to [n, H].

        Raises:
            ConfigError: the input has another last dimension.
            SparseRuntimeError: a gradient is asked for.
        """
        return self.all_neurons(hidden_states, "auto", *choice)

    def all_rows(self, x: Tensor, backend: str, *choice: Tensor) -> Tensor:
        """The same of hidden states [n, H], without a check, by one of ``BACKENDS``."""
        chosen = ExpertChoice.of(self.experts, *choice)
        return dense_plane_ffn(x, self.planes, backend=backend, choice=chosen)

    @torch.no_grad()
    def to_float(self) -> nn.Module:
        """The module that it replaced, of the same class, with parameters of the packed values."""
        neurons = self.intermediate_size // self.experts
        sizes = (2 * neurons, self.hidden_size), (self.hidden_size, neurons)
        gate_up, down = (
            torch.empty(self.experts, *size, dtype=self.dtype, device=self.look.device)
            for size in sizes
        )
        for expert in range(self.experts):
            rows = slice(expert * neurons, (expert + 1) * neurons)
            gate, up, down_t = self.planes.rounded(rows)
            assert up is not None
            gate_up[expert] = torch.cat([gate.values(), up.values()])
            down[expert] = down_t.values().t()
        module = shallow(self._float[0])
        own = (nn.Parameter(gate_up), nn.Parameter(down))
        module._parameters.update(zip(self.form.projections, own, strict=True))
        return module.train(self.training)


def packed_kind(layer: FFNLayer) -> type[PlaneFFN]:
    """The class of a layer's packed module."""
    return PlaneExperts if layer.experts else PlaneFFN
