"""The module that stands in for a model's FFN: route each token, compute its cluster's neurons."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_runtime.architectures import FFNLayer
from sparse_runtime.artifact.layer_clusters import LayerClusters
from sparse_runtime.bitmaps import set_sizes
from sparse_runtime.config import SparseConfig
from sparse_runtime.cost import FFNCost, element_size
from sparse_runtime.hardware import cpu_name
from sparse_runtime.kernels import resolve_backend, sparse_ffn
from sparse_runtime.kernels.low_bit import quantize_rows
from sparse_runtime.kernels.token_paths import MAX_SPARSE_TOKENS, PathTable
from sparse_runtime.predictors import router_logits
from sparse_runtime.version import __version__

#: The reference backend's bound on sparse calls.
REFERENCE_SPARSE_TOKENS = 16
# Backends whose router, neurons and compensation are one operation.
_FUSED = ("cpu", "triton")


class Padding:
    """Which tokens of a call are padding; set by a hook on the model, read by its FFNs.

    Attributes:
        mask: attention mask [B, T] of the current call, nonzero for real tokens; None if unknown.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def kept(self, num_tokens: int) -> Tensor | None:
        """Indices of the real tokens of a call, int64; None where there is no padding."""
        if self.mask is None or self.mask.numel() != num_tokens or torch.compiler.is_compiling():
            return None
        kept = self.mask.reshape(-1).nonzero().squeeze(-1)
        return None if len(kept) == num_tokens else kept


class SparseFFN(nn.Module):
    """A gated FFN that reads only the neurons of the cluster its router picks.

    Wraps the original module as ``base_layer``. The state dict is that of the original module: the
    clusters and the router are not part of it, and ``base_layer`` does not show in its keys.

    The wrapped down projection is kept transposed in memory ([I, H] rows behind a [H, I] view), so
    that a neuron is one contiguous row in all three matrices; :meth:`restore` puts it back.

    Attributes:
        cluster_counts: tokens routed to each cluster so far [K] int64.
        row_counts: neurons computed and neurons looked at so far, over all tokens [2] int64.
        dense_token_count: tokens that took the dense path so far, int64 scalar tensor.
        backend: kernel backend in use: ``cpu``, ``triton``, ``reference``, or ``dense`` for none.
        forced_dense: run ``base_layer`` whatever the call (see ``sparse_runtime.dense``).
        padding: which tokens of the current call are padding, shared by a model's layers.
        route: hidden states [n, H] -> cluster ids [n] int64; evaluation swaps it for an oracle.
    """

    active_sets: Tensor
    router_down: Tensor | None
    router_up: Tensor
    router_bias: Tensor
    cluster_bias: Tensor | None
    correction_down: Tensor | None
    correction_up: Tensor | None
    maybe_sets: Tensor | None
    low_bit: Tensor | None
    factors: Tensor | None
    cluster_counts: Tensor
    row_counts: Tensor
    dense_token_count: Tensor
    counters: Tensor
    _one: Tensor

    def __init__(self, layer: FFNLayer, clusters: LayerClusters, config: SparseConfig) -> None:
        super().__init__()
        self.base_layer: nn.Module = layer.mlp
        self.layer_index = layer.index
        self.activation = layer.activation
        self.config = config
        self.forced_dense = False
        weight = layer.gate.weight
        self.backend = resolve_backend(
            config.backend, weight.device, weight.dtype, strict=config.strict
        )
        self.padding = Padding()
        self._projections = (layer.gate, layer.up, layer.down)
        self.route: Callable[[Tensor], Tensor] = self._predict

        device, dtype = layer.gate.weight.device, layer.gate.weight.dtype
        clusters = clusters.collapsed(layer.intermediate_size)
        sets = clusters.active_sets.to(device)
        verified = clusters.maybe_sets is not None
        weights = {
            name: None if tensor is None else tensor.to(device=device, dtype=dtype)
            for name, tensor in (
                ("router_down", clusters.router_down),
                ("router_up", clusters.router_up),
                ("router_bias", clusters.router_bias),
                ("cluster_bias", clusters.cluster_bias),
                ("correction_down", clusters.correction_down),
                ("correction_up", clusters.correction_up),
            )
        }
        buffers = {
            "active_sets": sets,
            **weights,
            **_verification(clusters, layer, looks=self.backend != "dense"),
            "cluster_counts": torch.zeros(sets.shape[0], dtype=torch.int64, device=device),
            "row_counts": torch.zeros(2, dtype=torch.int64, device=device),
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
            verified=verified,
        )
        self._default_limit = REFERENCE_SPARSE_TOKENS
        if self.backend == "triton":
            self._use_triton(layer)
        self.register_state_dict_post_hook(_hide_base_layer)
        self.register_load_state_dict_pre_hook(_show_base_layer)
        self._density = _mean_density(sets, layer.intermediate_size)
        self._looked = _mean_density(self.maybe_sets, layer.intermediate_size)
        if self.backend != "dense":
            down = layer.down.weight
            down.data = down.data.t().contiguous().t()

    def _use_triton(self, layer: FFNLayer) -> None:
        from sparse_runtime.kernels.triton_config import config_for
        from sparse_runtime.kernels.triton_ffn import num_counters

        weight = layer.gate.weight
        shape = (layer.hidden_size, layer.intermediate_size)
        self._default_limit = config_for(weight.device, *shape, weight.dtype).max_tokens
        counters = torch.zeros(num_counters(shape[0]), dtype=torch.int32, device=weight.device)
        self.register_buffer("counters", counters, persistent=False)

    def restore(self) -> nn.Module:
        """Put the down projection back as it was and return the original module."""
        down = self._projections[2].weight
        down.data = down.data.contiguous()
        return self.base_layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states [..., H] to the FFN's output [..., H]."""
        hidden_size = self.cost.hidden_size
        num_tokens = hidden_states.numel() // hidden_size
        if self.forced_dense or self.backend == "dense":
            self.dense_token_count += num_tokens
            return self.base_layer(hidden_states)
        x = hidden_states.reshape(num_tokens, hidden_size)
        if self.backend != "cpu":  # for the others, accelerate may have put layers elsewhere
            x = x.to(self.router_up.device)
        kept = self.padding.kept(num_tokens) if num_tokens > 1 else None
        if kept is None:
            return self._run(x).reshape(hidden_states.shape)
        output = torch.zeros_like(x)
        output[kept] = self._run(x[kept])
        return output.reshape(hidden_states.shape)

    def _run(self, x: Tensor) -> Tensor:
        path = self._path(x.shape[0])
        if path == "sparse" and self.backend in _FUSED and self.route == self._predict:
            return self._fused(x)
        if path == "torch":
            self.dense_token_count += x.shape[0]
            return self.base_layer(x)
        if path == "rows":
            self.dense_token_count += x.shape[0]
            return self._all_rows(x)
        cluster_ids = self.route(x)
        self.cluster_counts.scatter_add_(0, cluster_ids, self._one.expand(x.shape[0]))
        gate, up, down = (linear.weight for linear in self._projections)
        output = sparse_ffn(
            x,
            gate,
            up,
            down.t(),
            self.active_sets,
            cluster_ids,
            self.activation,
            maybe_sets=self.maybe_sets,
            low_bit=self.low_bit,
            factors=self.factors,
            row_counts=self.row_counts,
            backend="triton" if self.backend == "triton" else "reference",
        )
        return self.compensated(output, x, cluster_ids)

    def compensated(self, output: Tensor, x: Tensor, cluster_ids: Tensor) -> Tensor:
        """Add, in place, bias and correction for what the neurons of x's clusters leave out.

        Args:
            output: of the clusters' neurons [n, H].
            x: hidden states [n, H].
            cluster_ids: int64 [n].
        """
        if self.cluster_bias is not None:
            output += self.cluster_bias[cluster_ids]
        if self.correction_down is not None and self.correction_up is not None:
            output += F.linear(x, self.correction_down) @ self.correction_up
        return output

    def _path(self, num_tokens: int) -> str:
        """Choose among ``token_paths.PATHS``."""
        if self.config.prefill == "sparse":
            return "sparse"
        limit = self.config.max_sparse_tokens
        if self.backend != "cpu":
            return "sparse" if num_tokens <= (limit or self._default_limit) else "torch"
        if num_tokens <= (limit or 1):
            return "sparse"
        if torch.compiler.is_compiling():
            return "torch" if limit or num_tokens > MAX_SPARSE_TOKENS else "sparse"
        may_be_sparse = limit is None and num_tokens <= MAX_SPARSE_TOKENS
        table = path_table(
            self.cost,
            self.activation,
            self.router_up.dtype,
            (self._density, self._looked) if may_be_sparse else None,
        )
        return table.path(num_tokens, partial(self._candidates, sparse=may_be_sparse))

    def _candidates(self, num_tokens: int, *, sparse: bool) -> dict[str, Callable[[], Tensor]]:
        """Calls of ``num_tokens`` random tokens, spread over the clusters, by path."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(num_tokens, self.cost.hidden_size, generator=generator)
        x = x.to(self.router_up.dtype)
        gate, up, down = (linear.weight for linear in self._projections)
        calls = {"rows": lambda: self._all_rows(x), "torch": lambda: self.base_layer(x)}
        if sparse:
            num_clusters = self.active_sets.shape[0]
            ids = torch.randint(num_clusters, (num_tokens,), generator=generator)
            calls["sparse"] = lambda: torch.ops.sparse_runtime.cpu_sparse_ffn(
                x,
                gate,
                up,
                down.t(),
                self.active_sets,
                ids,
                self.activation,
                self.maybe_sets,
                self.low_bit,
                self.factors,
            )
        return calls

    def _apply(self, *args: Any, **kwargs: Any) -> SparseFFN:
        # A change of the model's dtype is not for the factors, which the kernels want in float32.
        super()._apply(*args, **kwargs)
        if self.factors is not None:
            self.factors = self.factors.float()
        return self

    def reset_counts(self) -> None:
        """Set the token counters to zero."""
        self.cluster_counts.zero_()
        self.row_counts.zero_()
        self.dense_token_count.zero_()

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return (
            f"clusters={self.active_sets.shape[0]}, mean_density={self._density:.3f}, "
            f"looked_at={self._looked:.3f}, "
            f"backend={self.backend}, prefill={self.config.prefill}"
        )

    def _all_rows(self, x: Tensor) -> Tensor:
        gate, up, down = (linear.weight for linear in self._projections)
        output: Tensor = torch.ops.sparse_runtime.cpu_dense_ffn(
            x, gate, up, down.t(), self.activation
        )
        return output

    def _fused(self, x: Tensor) -> Tensor:
        # Straight from the dictionaries: nn.Module's attribute access costs as much as the router.
        buffers = self._buffers
        gate, up, down = (linear._parameters["weight"] for linear in self._projections)
        assert down is not None
        ops = torch.ops.sparse_runtime
        on_cpu = self.backend == "cpu"
        operation = ops.cpu_routed_ffn.default if on_cpu else ops.triton_routed_ffn.default
        output: Tensor = operation(
            x,
            gate,
            up,
            down.t(),
            buffers["active_sets"],
            buffers["router_down"],
            buffers["router_up"],
            buffers["router_bias"],
            buffers["cluster_bias"],
            buffers["cluster_counts"],
            self.activation,
            buffers["maybe_sets"],
            buffers["low_bit"],
            buffers["factors"],
            buffers["row_counts"],
            buffers["correction_down"],
            buffers["correction_up"],
            *(() if on_cpu else (buffers["counters"],)),
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


def _verification(
    clusters: LayerClusters, layer: FFNLayer, *, looks: bool
) -> dict[str, Tensor | None]:
    """What the kernels need to look at neurons first, None without such a band."""
    if clusters.maybe_sets is None or clusters.factors is None or not looks:
        return {"maybe_sets": None, "low_bit": None, "factors": None}
    gate, up = layer.gate.weight.detach(), layer.up.weight.detach()
    return {
        "maybe_sets": clusters.maybe_sets.to(gate.device),
        "low_bit": quantize_rows(gate, up),
        "factors": clusters.factors.to(gate.device, torch.float32),
    }


def _mean_density(sets: Tensor | None, num_neurons: int) -> float:
    return 0.0 if sets is None else set_sizes(sets).float().mean().item() / num_neurons


def path_table(
    cost: FFNCost, activation: str, dtype: torch.dtype, densities: tuple[float, float] | None
) -> PathTable:
    """The measured paths of FFNs of one shape, for the current number of threads.

    ``densities`` are the mean shares of neurons computed and looked at, None where no call may be
    sparse.
    """
    return _path_table(
        cost.hidden_size,
        cost.intermediate_size,
        activation,
        str(dtype),
        None if densities is None else tuple(round(share * 20) / 20 for share in densities),
        torch.get_num_threads(),
    )


@functools.cache
def _path_table(
    hidden_size: int,
    intermediate_size: int,
    activation: str,
    dtype: str,
    densities: tuple[float, ...] | None,
    threads: int,
) -> PathTable:
    shape = [hidden_size, intermediate_size, activation, dtype, densities]
    isa = torch.ops.sparse_runtime.cpu_isa()
    return PathTable([cpu_name(), isa, threads, torch.__version__, __version__, *shape])
