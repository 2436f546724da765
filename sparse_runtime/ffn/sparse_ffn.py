"""The part of an FFN that makes it sparse: route each token, compute its cluster's neurons."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_runtime.artifact.layer_clusters import LayerClusters
from sparse_runtime.config import SparseConfig
from sparse_runtime.cost import FFNCost, element_size
from sparse_runtime.errors import BackendUnavailableError
from sparse_runtime.ffn.expert_parameters import SeenExperts
from sparse_runtime.ffn.guard import by_rows
from sparse_runtime.ffn.intact import WatchedFFN, key_for
from sparse_runtime.ffn.model_state import ModelState
from sparse_runtime.ffn.placement import (
    counters,
    lay_out,
    mean_share,
    own_copy,
    placed,
    placed_biases,
    plain_tensors,
    triton_programs,
)
from sparse_runtime.ffn.projections import (
    Seen,
    drops_values,
    projection_problem,
    projection_tensors,
    weight_by_columns,
)
from sparse_runtime.ffn.rule import NO_DERIVATIVE, TokenRule, token_rule
from sparse_runtime.kernels import dense_ffn, resolve_backend, routed_ffn, sparse_ffn
from sparse_runtime.kernels.linear import fits, is_checkpointed, is_transformed, needs_gradient
from sparse_runtime.kernels.looks import look_records
from sparse_runtime.kernels.operands import ClusterTables, FFNWeights
from sparse_runtime.kernels.reference import add_compensation, routed_ids
from sparse_runtime.models.ffn_layer import FFNLayer, layer_cost

# One at a time: two threads may find the same changed weights.
_ADOPTING = threading.RLock()


class SparseFFN(WatchedFFN):
    """What ``sparsify`` adds to an FFN module, as its child ``sparse_ffn``.

    The FFN stays the module it was, with its projections, names, hooks and state dict; its forward
    calls this one (``sparse_runtime.ffn.patch``). Weights are read from the FFN's projections, and
    every sparse call makes sure that they are still what the kernels take them for; otherwise the FFN
    runs as it stands. Where weights were written to, what was derived from them is made anew.

    The down projection, or a first one with weights [H, I], is kept transposed in memory ([I, H] rows
    behind a view), so that a neuron is one contiguous row in all matrices.

    Attributes:
        layer_index: of the decoder layer.
        form: of the FFN.
        name: of the FFN in the model.
        activation: of the FFN, by the kernels' name.
        config: options of ``sparsify``.
        backend: in use: ``cpu``, ``triton``, ``reference``, or ``dense`` for none.
        rule: what calls do by their number of tokens.
        cost: bytes of the layer.
        density: mean share of the neurons that are computed whatever looks say.
        looked_at: mean share of the neurons that are looked at.
        problem: why the FFN runs as it stands; None if it does not, as far as is known.
        route: hidden states [n, H] -> cluster ids [n] int64, instead of the router; see
            :meth:`swapped`.
    """

    # Ways in which neurons are read: computed, looked at.
    _stages = 2

    def __init__(
        self,
        layer: FFNLayer,
        clusters: LayerClusters,
        config: SparseConfig,
        state: ModelState,
        *,
        first: bool = False,
    ) -> None:
        super().__init__()
        self._owner = (layer.mlp,)  # in a tuple: the FFN is the parent, not a child
        self.form = layer.form
        self.layer_index, self.name, self.activation = layer.index, layer.name, layer.activation
        self.config = config
        self.state = state
        self._first = first
        self._hidden_size = layer.hidden_size
        self._most_sparse_values = 0.0
        self._decoder_layer = (layer.decoder_layer or layer.parent,)
        self._transposed: tuple[Tensor, ...] = ()  # the weight by columns, or none
        self._clusters = own_copy(clusters.collapsed(layer.intermediate_size))
        self.cost = self._own_cost(layer)
        self.density = mean_share(self._clusters.active_sets, layer.intermediate_size)
        self.looked_at = mean_share(self._clusters.maybe_sets, layer.intermediate_size)
        self.route: Callable[[Tensor], Tensor] | None = None
        self.problem: str | None = None
        self._key = -1
        self._seen: Seen | SeenExperts | None = None
        self._operands: Any = None
        self._placed: tuple[torch.device, torch.dtype] | None = None
        self.backend = "dense"
        self.rule = TokenRule(0)
        with plain_tensors():
            self._place(layer.device, layer.dtype)

    # What the call does

    def forward(self, hidden_states: Tensor, *choice: Tensor) -> Tensor:
        """Map hidden states [..., H] to the FFN's output [..., H]."""
        operands = self._operands
        if operands is not None and self._is_plain_decode(hidden_states):
            if self._first:
                self.state.note_call(1, long=False)
            x = hidden_states.reshape(-1, self._hidden_size)
            return self._routed(x, operands, *choice).reshape(hidden_states.shape)
        return self._any_call(hidden_states, *choice)

    def _is_plain_decode(self, hidden_states: Tensor) -> bool:
        """Whether :meth:`_any_call` would find a sparse call and nothing else to do, for less time."""
        seen, placed = self._seen, self._placed
        return (
            seen is not None
            and placed is not None
            and self.route is None
            and not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and not is_transformed()
            and not self.training
            and hidden_states.numel() <= self._most_sparse_values
            and hidden_states.shape[-1] == self._hidden_size
            and hidden_states.dtype == placed[1]
            and hidden_states.device == placed[0]
            and not torch.is_autocast_enabled(placed[0].type)
            and self.state.switch.depth == 0
            and self.state.switch.rows is None
            and seen.is_current()
        )

    def _any_call(self, hidden_states: Tensor, *choice: Tensor) -> Tensor:
        if self.state.switch.rows is not None:
            return by_rows(self, hidden_states, *choice)
        num_tokens = hidden_states.numel() // self.cost.hidden_size
        path, reason = self._path(hidden_states, num_tokens)
        if reason is not None:
            self.count_dense(reason, num_tokens)
        if self._first and not torch.compiler.is_compiling():
            self.state.note_call(num_tokens, long=reason == "long call" and path == "dense")
        if path == "dense":
            output = self.dense(hidden_states, *choice)
            if reason == "long call" and self.state.guard is not None:
                self.state.guard.audit(self, hidden_states, output, choice)
            return output
        x = hidden_states.reshape(num_tokens, self.cost.hidden_size)
        router_up = self._buffers["router_up"]
        assert router_up is not None
        if x.dtype != router_up.dtype:
            x = x.to(router_up.dtype)  # autocast to the weights' dtype: see _path
        output = self.sparse(x, *choice) if path == "sparse" else self.all_rows(x)
        return output.reshape(hidden_states.shape)

    def sparse(self, x: Tensor, *choice: Tensor) -> Tensor:
        """The neurons of each token's cluster: [n, H] of hidden states [n, H] (and their experts)."""
        if self.route is None:
            operands = self._operands
            if operands is None or torch.compiler.is_compiling():
                operands = self._flattened()
            return self._routed(x, operands, *choice)
        return self._by_clusters(x, self.route(x), *choice)

    def uncounted(self, x: Tensor, *choice: Tensor) -> Tensor:
        """As :meth:`sparse` by the router, in counters of its own."""
        return self._routed(x, (*self._flattened()[:-1], self.audit_counters), *choice)

    def _routed(self, x: Tensor, operands: Any, *choice: Tensor) -> Tensor:
        return routed_ffn(x, *operands, backend=self.backend)

    def _by_clusters(self, x: Tensor, ids: Tensor, *choice: Tensor) -> Tensor:
        self.cluster_counts.scatter_add_(0, ids, torch.ones_like(ids))
        backend = "triton" if self.backend == "triton" else "reference"
        output = sparse_ffn(
            x, self.weights, self.tables, ids, row_counts=self.row_counts, backend=backend
        )
        return add_compensation(output, x, ids, self.compensation)

    def all_rows(self, x: Tensor) -> Tensor:
        """All neurons by the CPU kernels: [n, H] of hidden states [n, H]."""
        output = dense_ffn(x, self.weights)
        bias = projection_tensors(self._owner[0], self.form, "bias")[-1]
        return output if bias is None else output + bias

    def dense(self, hidden_states: Tensor, *choice: Tensor) -> Tensor:
        """Run the FFN's own forward: [..., H] of hidden states [..., H]."""
        output: Tensor = self._owner[0].dense_forward(hidden_states, *choice)  # type: ignore[operator]
        return output

    def cluster_ids(self, x: Tensor) -> Tensor:
        """The router's clusters [n] int64 of hidden states [n, H]."""
        return routed_ids(x, self.router)

    def _path(self, hidden_states: Tensor, num_tokens: int) -> tuple[str, str | None]:
        """``sparse``, ``rows`` or ``dense``, and the reason why a call is not sparse."""
        if self.state.switch.depth > 0:
            return "dense", self.state.switch.reason
        if self.backend == "dense":
            return "dense", "no backend" if self.problem is None else "patched"
        if hidden_states.shape[-1] != self._hidden_size:
            return "dense", "patched"  # whose error says what is wrong
        path = self.rule.path(num_tokens)
        if path == "dense":
            return "dense", "long call"
        hindrance = self.hindrance(hidden_states)
        if hindrance is not None:
            return "dense", hindrance
        return path, None if path == "sparse" else "long call"

    def hindrance(self, hidden_states: Tensor) -> str | None:
        """The reason why hidden states [..., H] cannot be run sparse now; None if they can."""
        if not self._is_intact():
            return "patched"
        weights = self._own_weights()
        if needs_gradient(hidden_states, *weights) or is_checkpointed(self._decoder_layer[0]):
            self.state.warn_once("gradients", NO_DERIVATIVE)
            return "gradients"
        if drops_values(self._owner[0], self.form):
            return "dropout"
        router_up = self._buffers["router_up"]
        assert router_up is not None
        # It has the weights' dtype and device.
        return None if fits(hidden_states, router_up) else "autocast"

    # What it works on

    @property
    def owner(self) -> nn.Module:
        """The FFN, or the larger module that it is written out in."""
        return self._owner[0]

    def _own_weights(self) -> tuple[Tensor, ...]:
        tensors = projection_tensors(self._owner[0], self.form, "weight", "bias")
        return tuple(tensor for tensor in tensors if tensor is not None)

    def _projection_weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gate, up and down; the first two may be views, and up None."""
        weights = projection_tensors(self._owner[0], self.form, "weight")
        return self.form.split(*weights)  # type: ignore[arg-type]

    @property
    def weights(self) -> FFNWeights:
        """The projections' weights, and what they are looked at by."""
        gate, up, down = self._projection_weights()
        b = self._buffers
        rest = self.activation, b["look"], b["gate_bias"], b["up_bias"]
        return FFNWeights(gate, up, down.t(), *rest)

    def _own_cost(self, layer: FFNLayer) -> FFNCost:
        verified = self._clusters.maybe_sets is not None
        return layer_cost(layer, self._clusters.extra_elements, verified=verified)

    def _flattened(self) -> Any:
        return self.weights, self.tables, self.router, self.compensation, self.counters

    @contextmanager
    def swapped(
        self,
        *,
        route: Callable[[Tensor], Tensor] | None = None,
        tables: ClusterTables | None = None,
    ) -> Iterator[None]:
        """Route by another function, or use other sets, inside the context; for evaluation.

        The swap is of the module, not of a thread: nobody else should use it meanwhile.

        Args:
            route: hidden states [n, H] -> cluster ids [n] int64.
            tables: sets of as many clusters.
        """
        names = ("active_sets", "maybe_sets", "factors", "cluster_weights")
        before = self.route, [self._buffers[name] for name in names]
        try:
            # Without operands every call goes the general way, which looks for both.
            self.route, self._operands = route, None
            if tables is not None:
                self._buffers.update({name: getattr(tables, name) for name in names})
            yield
        finally:
            self.route = before[0]
            self._buffers.update(zip(names, before[1], strict=True))
            self._operands = None if self._seen is None else self._flattened()

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        clusters = self._clusters.active_sets.shape[0]
        problem = self.problem or (self._seen.change() if self._seen else None)
        stands = f", runs as it stands: {problem}" if problem else ""
        return (
            f"clusters={clusters}, mean_density={self.density:.3f}, looked_at={self.looked_at:.3f}, "
            f"backend={self.backend}, {self.rule}{stands}"
        )

    # What it is derived from

    def adopt(self) -> Seen | SeenExperts | None:
        """Take the projections as they are now: place tables beside them, make copies anew.

        Where the kernels cannot stand in for them, the FFN runs as it stands from here on.
        """
        with _ADOPTING, plain_tensors():
            if self._seen is not None and not self._seen.is_stale():
                return self._seen  # another thread was first
            self.forget()
            self._key = key_for(self, self._key)
            sizes = self.cost.intermediate_size, self.cost.hidden_size
            self.problem = projection_problem(self._owner[0], self.form, sizes)
            if self.problem is not None:
                return None
            by_columns = weight_by_columns(self._owner[0], self.form)
            if all(weight is not by_columns for weight in self._transposed):
                self.release()  # it has been replaced, and goes back as it was
            if not self._try_to_place(by_columns.device, by_columns.dtype):
                self.release()
                self._buffers["look"] = None
                return None
            lay_out(by_columns, transposed=True)
            self._transposed = (by_columns,)
            self._derive()
            seen = Seen.of(self._owner[0], self.form, self)
            self._operands = self._flattened()
            self._seen = seen
            return seen

    def _try_to_place(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a backend can run where the weights are by now."""
        try:
            self._place(device, dtype)
        except BackendUnavailableError as error:
            if self.config.strict:
                raise
            self.backend, self.problem, self._placed = "dense", str(error), None
        return self.backend != "dense"

    def has_transposed(self, tensor: Tensor) -> bool:
        """Whether a tensor is the weight that lies in memory by columns now."""
        return not tensor.is_contiguous() and any(
            tensor.data_ptr() == weight.data_ptr() for weight in self._transposed
        )

    def release(self) -> None:
        """Put that weight back as it was, whatever module holds it by now."""
        for weight in self._transposed:
            lay_out(weight, transposed=False)
        self._transposed = ()

    def _place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Put tables and counters beside weights of a device and dtype, and choose the backend."""
        clusters, config = self._clusters, self.config
        if self._placed == (device, dtype):
            return
        self.backend = resolve_backend(
            config.backend,
            device,
            dtype,
            strict=config.strict,
            warn=partial(self.state.warn_once, "no backend"),
        )
        self.cost = replace(self.cost, element_size=element_size(dtype))
        looks = clusters.maybe_sets is not None and self.backend != "dense"
        tensors = placed(clusters, device, dtype, looks=looks)
        tensors |= counters(clusters.num_clusters, self._stages, device, self._buffers)
        tensors |= {"look": None, "gate_bias": None, "up_bias": None}
        bound = config.max_sparse_tokens
        if self.backend == "triton":
            from sparse_runtime.kernels.triton.config import config_for

            shape = self.cost.hidden_size, self.cost.intermediate_size
            bound = bound or config_for(device, *shape, dtype).max_tokens
            tensors["programs"] = triton_programs(shape[0], device)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self._placed = (device, dtype)
        self.rule = token_rule(
            self.backend, sparse_tokens=bound, every_call=config.prefill == "sparse"
        )
        most = math.inf if self.rule.sparse is None else self.rule.sparse
        self._most_sparse_values = most * self._hidden_size

    def _derive(self) -> None:
        """Copy biases, and make look records, if clusters leave neurons to a look."""
        biases = projection_tensors(self._owner[0], self.form, "bias")
        self._buffers |= placed_biases(self.form, biases, self._clusters)
        if self._buffers["maybe_sets"] is None:
            return
        gate, up, _ = self._projection_weights()
        records = look_records(gate.detach(), None if up is None else up.detach())
        before = self._buffers["look"]
        if before is not None and not torch.equal(before, records):
            self.state.warn_once(
                "changed weights",
                f"weights of {self.name} have changed since sparsify; what is looked at was made "
                "anew. The clusters are still those of the weights before: build them again if the "
                "change is more than a small one",
            )
        self._buffers["look"] = records

    def __getstate__(self) -> dict[str, Any]:
        # A copy looks at its own projections.
        return {**self.__dict__, "_seen": None, "_operands": None}

    def _apply(self, *args: Any, **kwargs: Any) -> SparseFFN:
        # Tables follow the weights (adopt, called by the FFN's own _apply), in their own dtypes.
        return self
