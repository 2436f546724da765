"""What a sparse student reads of an FFN: its matrices as they are seen, and which neurons count."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparse_runtime.artifact.layer_clusters import LayerClusters
from sparse_runtime.clusters.importance import chunk_rows, chunk_slices
from sparse_runtime.files import write_tensors
from sparse_runtime.kernels import router_logits
from sparse_runtime.kernels.bitmaps import unpack_bits
from sparse_runtime.kernels.looks import look_records
from sparse_runtime.kernels.planes import LOOK_FORMAT, unpack_look
from sparse_runtime.kernels.reference import activations
from sparse_runtime.models.ffn_layer import FFNLayer

# Where look records are kept, if anywhere.
_KEPT: ContextVar[Path | None] = ContextVar("_KEPT", default=None)


@contextmanager
def kept_looks(folder: Path) -> Iterator[None]:
    """Round a layer's look records once inside the context: they go to files in ``folder``.

    Rounding takes a layer of Mistral's size two seconds, and every sweep needs them anew.
    """
    folder.mkdir(exist_ok=True)
    token = _KEPT.set(folder)
    try:
        yield
    finally:
        _KEPT.reset(token)


def _look_records(layer: FFNLayer, gate: Tensor, up: Tensor | None) -> Tensor:
    folder = _KEPT.get()
    if folder is None:
        return look_records(gate, up)
    file = folder / f"{layer.index}.safetensors"
    if not file.exists():
        write_tensors(file, {"records": look_records(gate, up).cpu()}, {})
    return load_file(file, device=str(layer.device))["records"]


@dataclass(frozen=True)
class Rows:
    """A layer's weights, or the full values of its planes, and their base values if these differ.

    Attributes:
        gate, up, down_t: [I, H], in the model's dtype; up may be None.
        activation: by the kernels' name.
        biases: of gate and up [I], or None.
        base: by base planes; None where nothing is refined.
        look: by look records, without down; None where nothing float is looked at.
    """

    gate: Tensor
    up: Tensor | None
    down_t: Tensor
    activation: str
    biases: tuple[Tensor | None, Tensor | None]
    base: Rows | None = None
    look: Rows | None = None

    @classmethod
    def of(cls, layer: FFNLayer, *, looked_at: bool) -> Rows:
        """A layer's, in memory; with what float weights are looked at by if they are ``looked_at``."""

        def rows(gate: Tensor, up: Tensor | None, down_t: Tensor) -> Rows:
            up = None if up is None else up.to(layer.dtype)
            weights = gate.to(layer.dtype), up, down_t.to(layer.dtype)
            return cls(*weights, layer.activation, layer.biases)

        gate, up, down_t = layer.rows()
        whole = rows(gate, up, down_t)
        if layer.format is not None and layer.format.residual > 0:
            return replace(whole, base=rows(*layer.rows(base=True)))
        if layer.packed or not looked_at:
            return whole
        records = _look_records(layer, gate, up)
        gates, ups = [], []
        for some in chunk_slices(len(records), chunk_rows(layer.hidden_size, layer.device)):
            # In float32 a few rows at a time.
            of_gate, of_up = unpack_look(records[some], LOOK_FORMAT, layer.hidden_size)
            gates.append(of_gate.to(layer.dtype))
            ups += [] if of_up is None else [of_up.to(layer.dtype)]
        look = rows(torch.cat(gates), torch.cat(ups) if ups else None, whole.down_t)
        return replace(whole, look=look)

    def some(self, neurons: slice) -> Rows:
        """Of some of the neurons; views."""
        if neurons == slice(None):
            return self
        return replace(
            self,
            gate=self.gate[neurons],
            up=None if self.up is None else self.up[neurons],
            down_t=self.down_t[neurons],
            base=None if self.base is None else self.base.some(neurons),
            look=None if self.look is None else self.look.some(neurons),
        )

    def activations(self, x: Tensor) -> Tensor:
        """h [n, I] of hidden states [n, H]."""
        return activations(x, self.gate, self.up, self.activation, *self.biases)


class Masks:
    """A layer's clusters, unpacked on its device."""

    def __init__(self, clusters: LayerClusters, layer: FFNLayer) -> None:
        neurons = layer.intermediate_size
        weight = torch.empty(0, device=layer.device, dtype=layer.dtype)
        self._base_error = clusters.base_error or 0.0

        def ready(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(weight)

        self._down, self._up = ready(clusters.router_down), clusters.router_up.to(weight)
        self._bias = clusters.router_bias.to(weight)
        self._sure = unpack_bits(clusters.active_sets.to(weight.device), neurons)
        self._maybe, self._factors = None, None
        self._tau = math.inf if clusters.tau is None else clusters.tau
        self._packed = layer.packed
        if clusters.maybe_sets is not None and clusters.factors is not None:
            self._maybe = unpack_bits(clusters.maybe_sets.to(weight.device), neurons)
            self._factors = clusters.factors.to(weight.device)
        self._cluster_weights = torch.ones(clusters.num_clusters, device=weight.device)
        if clusters.cluster_weights is not None:
            self._cluster_weights = clusters.cluster_weights.to(weight.device).float()
        self._neuron_weights: Tensor | None = None
        if clusters.centroids is not None:
            self._neuron_weights = clusters.centroids.neuron_weights.to(weight.device).float()
        self.everything = bool(self._sure.all())
        self.cluster_bias: Tensor | float = 0.0
        if clusters.cluster_bias is not None:
            self.cluster_bias = clusters.cluster_bias.to(weight.device).float()

    def route(self, x: Tensor) -> Tensor:
        """Cluster ids [n] of hidden states [n, H]."""
        return router_logits(x, self._down, self._up, self._bias).argmax(-1)

    @property
    def looks(self) -> bool:
        """Whether some neurons are left to a look."""
        return self._maybe is not None and self._factors is not None

    def chosen(self, ids: Tensor, h: Tensor, neurons: slice) -> tuple[Tensor, Tensor | None]:
        """Neurons that are computed and looked at, bool [n, i], None of the latter if there are none.

        Args:
            ids: clusters [n] int64.
            h: activations of some neurons [n, i], as looks see them.
            neurons: which of them.
        """
        sure = self._sure[:, neurons][ids]
        if self._maybe is None or self._factors is None:
            return sure, sure if self._packed else None
        maybe = self._maybe[:, neurons][ids] & ~sure
        computed = sure | (maybe & ~(self._evidence(ids, h, neurons) <= 1))
        return computed, sure | maybe if self._packed else maybe

    def refined(self, chosen: Tensor, ids: Tensor, h: Tensor, neurons: slice) -> Tensor:
        """Chosen neurons that are computed by full values, bool [n, i]; all of float weights."""
        if self._factors is None or not self._packed:
            return chosen
        return chosen & (self._evidence(ids, h, neurons) > self._tau)

    def _evidence(self, ids: Tensor, h: Tensor, neurons: slice) -> Tensor:
        assert self._factors is not None
        return h.abs() * (self._factors[neurons] * self._cluster_weights[ids].unsqueeze(-1))

    def left_out(
        self, chosen: Tensor, refined: Tensor, ids: Tensor, h: Tensor, neurons: slice
    ) -> float:
        """Σ e² of all tokens over the neurons that are not chosen, and ρ²·e² of the unrefined."""
        assert self._neuron_weights is not None, "left_out needs centroids"
        weights = self._neuron_weights[neurons] * self._cluster_weights[ids].unsqueeze(-1)
        squares = (h.float() * weights).square()
        lost = torch.where(chosen, squares * self._base_error, squares)
        return lost.masked_fill_(refined & chosen, 0).sum().item()
