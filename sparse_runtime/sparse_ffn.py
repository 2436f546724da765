"""The module that stands in for a model's FFN: route each token, compute its cluster's neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_runtime.architectures import FFNLayer
from sparse_runtime.bitmaps import set_sizes
from sparse_runtime.cluster_set import LayerClusters
from sparse_runtime.config import SparseConfig
from sparse_runtime.cost import FFNCost, element_size
from sparse_runtime.kernels import resolve_backend, sparse_ffn
from sparse_runtime.predictors import router_logits


class SparseFFN(nn.Module):
    """A gated FFN that reads only the neurons of the cluster its router picks.

    Wraps the original module as ``base_layer``. The state dict is that of the original module: the
    clusters and the router are not part of it, and ``base_layer`` does not show in its keys.

    The wrapped down projection is kept transposed in memory ([I, H] rows behind a [H, I] view), so
    that a neuron is one contiguous row in all three matrices; :meth:`restore` puts it back.

    Attributes:
        cluster_counts: tokens routed to each cluster so far [K] int64.
        dense_token_count: tokens that took the dense path so far, int64 scalar tensor.
        backend: kernel backend in use, ``cpu`` or ``reference``.
        forced_dense: run ``base_layer`` whatever the call (see ``sparse_runtime.dense``).
        route: hidden states [n, H] -> cluster ids [n] int64; evaluation swaps it for an oracle.
    """

    active_sets: Tensor
    set_sizes: Tensor
    router_down: Tensor | None
    router_up: Tensor
    router_bias: Tensor
    cluster_bias: Tensor | None
    cluster_counts: Tensor
    dense_token_count: Tensor
    _one: Tensor

    def __init__(self, layer: FFNLayer, clusters: LayerClusters, config: SparseConfig) -> None:
        super().__init__()
        self.base_layer: nn.Module = layer.mlp
        self.layer_index = layer.index
        self.activation = layer.activation
        self.config = config
        self.forced_dense = False
        self.backend = resolve_backend(
            config.backend, layer.gate.weight.device, strict=config.strict
        )
        self._projections = (layer.gate, layer.up, layer.down)
        self.route: Callable[[Tensor], Tensor] = self._predict

        device, dtype = layer.gate.weight.device, layer.gate.weight.dtype
        sets = clusters.active_sets.to(device)
        weights = {
            name: None if tensor is None else tensor.to(device=device, dtype=dtype)
            for name, tensor in (
                ("router_down", clusters.router_down),
                ("router_up", clusters.router_up),
                ("router_bias", clusters.router_bias),
                ("cluster_bias", clusters.cluster_bias),
            )
        }
        buffers = {
            "active_sets": sets,
            "set_sizes": set_sizes(sets),
            **weights,
            "cluster_counts": torch.zeros(sets.shape[0], dtype=torch.int64, device=device),
            "dense_token_count": torch.zeros((), dtype=torch.int64, device=device),
            "_one": torch.ones(1, dtype=torch.int64, device=device),
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)
        self.cost = FFNCost(
            hidden_size=layer.hidden_size,
            intermediate_size=layer.intermediate_size,
            extra_elements=clusters.extra_elements,
            element_size=element_size(dtype),
        )
        self.register_state_dict_post_hook(_hide_base_layer)
        self.register_load_state_dict_pre_hook(_show_base_layer)
        down = layer.down.weight
        down.data = down.data.t().contiguous().t()

    def restore(self) -> nn.Module:
        """Put the down projection back as it was and return the original module."""
        down = self._projections[2].weight
        down.data = down.data.contiguous()
        return self.base_layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states [..., H] to the FFN's output [..., H]."""
        num_tokens = hidden_states.shape[:-1].numel()
        if self._runs_dense(num_tokens):
            self.dense_token_count += num_tokens
            return self.base_layer(hidden_states)
        gate, up, down = self._projections
        x = hidden_states.reshape(-1, hidden_states.shape[-1]).to(gate.weight.device)
        if self.backend == "cpu" and self.route == self._predict:
            return self._fused(x).reshape(hidden_states.shape)
        cluster_ids = self.route(x)
        self.cluster_counts.scatter_add_(0, cluster_ids, self._one.expand(num_tokens))
        output = sparse_ffn(
            x,
            gate.weight,
            up.weight,
            down.weight.t(),
            self.active_sets,
            cluster_ids,
            self.activation,
        )
        if self.cluster_bias is not None:
            output += self.cluster_bias[cluster_ids]
        return output.reshape(hidden_states.shape)

    def reset_counts(self) -> None:
        """Set the token counters to zero."""
        self.cluster_counts.zero_()
        self.dense_token_count.zero_()

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        clusters, density = self.active_sets.shape[0], self.set_sizes.float().mean().item()
        density /= self.cost.intermediate_size
        return f"clusters={clusters}, mean_density={density:.3f}, prefill={self.config.prefill}"

    def _runs_dense(self, num_tokens: int) -> bool:
        if self.forced_dense:
            return True
        return self.config.prefill == "dense" and num_tokens > self.config.max_sparse_tokens

    def _fused(self, x: Tensor) -> Tensor:
        gate, up, down = self._projections
        output: Tensor = torch.ops.sparse_runtime.cpu_routed_ffn(
            x,
            gate.weight,
            up.weight,
            down.weight.t(),
            self.active_sets,
            self.router_down,
            self.router_up,
            self.router_bias,
            self.cluster_bias,
            self.cluster_counts,
            self.activation,
        )
        return output

    def _predict(self, x: Tensor) -> Tensor:
        return router_logits(x, self.router_down, self.router_up, self.router_bias).argmax(-1)


def _hide_base_layer(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    inner = f"{prefix}base_layer."
    for key in [key for key in state_dict if key.startswith(inner)]:
        state_dict[prefix + key.removeprefix(inner)] = state_dict.pop(key)


def _show_base_layer(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: object
) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[f"{prefix}base_layer.{key.removeprefix(prefix)}"] = state_dict.pop(key)
