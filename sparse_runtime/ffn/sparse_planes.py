"""The part of an FFN in planes that makes it sparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparse_runtime.ffn.intact import key_for
from sparse_runtime.ffn.placement import joined_bias, mean_share, plain_tensors
from sparse_runtime.ffn.plane_modules import PlaneFFN
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.kernels.linear import has_global_hooks, version_of
from sparse_runtime.kernels.operands import ClusterTables, Stages
from sparse_runtime.kernels.plane_op import routed_plane_ffn
from sparse_runtime.kernels.planes import NeuronPlanes

# Of sets that were cut for float weights.
_TAU = 2.0


@dataclass(frozen=True, eq=False)
class SeenPlanes:
    """The streams and biases that operands were made of. Nothing is derived from the streams' bytes.

    Attributes:
        owner: the FFN.
        streams: its tensors.
        biases: by name, and with the version that operands have copies of.
    """

    owner: PlaneFFN
    streams: tuple[Tensor | None, ...]
    biases: tuple[tuple[str, Tensor, int | None], ...]

    @classmethod
    def of(cls, owner: PlaneFFN) -> SeenPlanes:
        """As they are now."""
        own = owner._parameters
        biases = ((name, bias, version_of(bias)) for name, bias in owner.own_biases().items())
        return cls(owner, (own["look"], own["count"], own["refine"]), tuple(biases))

    def is_current(self) -> bool:
        """Whether the operands are still the FFN's."""
        return not self.is_stale() and not has_global_hooks()

    def is_stale(self) -> bool:
        """Whether there are other tensors, or biases were written to, by now."""
        own = self.owner._parameters
        look, count, refine = self.streams
        if own["look"] is not look or own["count"] is not count or own["refine"] is not refine:
            return True
        for name, bias, version in self.biases:
            if own[name] is not bias or (version is not None and bias._version != version):
                return True
        return False

    def change(self) -> str | None:
        """Why the kernels may not stand in for the FFN."""
        return "hooks are registered for all modules" if has_global_hooks() else None


class SparsePlaneFFN(SparseFFN):
    """What ``sparsify`` adds to an FFN whose weights are in planes, as its child ``sparse_ffn``.

    Both bands of the artifact's sets are candidates: every one of them is looked at, and counted and
    refined as far as the artifact's factors say. Without factors candidates are refined whole.

    Attributes:
        looked_at: mean share of the neurons that are candidates.
        density: 0: no neuron is computed without a look.
    """

    _stages = 3

    # What it works on

    @property
    def _owner_ffn(self) -> PlaneFFN:
        owner = self._owner[0]
        assert isinstance(owner, PlaneFFN)
        return owner

    @property
    def planes(self) -> NeuronPlanes:
        """The weights."""
        return self._owner_ffn.planes

    @property
    def stages(self) -> Stages | None:
        """How far neurons are read."""
        factors = self._buffers["factors"]
        if factors is None:
            return None
        given = (self.config.tau, self._clusters.tau, _TAU)
        tau = next(value for value in given if value is not None)
        return Stages(factors, tau, self.config.ramp)

    @property
    def tables(self) -> ClusterTables:
        """The candidates: both bands of the artifact's sets."""
        b = self._buffers
        sure, maybe = b["active_sets"], b["maybe_sets"]
        assert sure is not None
        candidates = sure if maybe is None else sure | maybe
        return ClusterTables(candidates, None, b["factors"], b["cluster_weights"])

    def _own_weights(self) -> tuple[Tensor, ...]:
        return ()

    def _flattened(self) -> Any:
        return (
            self.planes,
            self.tables,
            self.stages,
            self.router,
            self.compensation,
            self.counters,
        )

    # What a call does

    def _routed(self, x: Tensor, operands: Any, *choice: Tensor) -> Tensor:
        return routed_plane_ffn(x, *operands, backend=self.backend)

    def _by_clusters(self, x: Tensor, ids: Tensor, *choice: Tensor) -> Tensor:
        return routed_plane_ffn(x, *self._flattened(), backend=self.backend, cluster_ids=ids)

    def all_rows(self, x: Tensor) -> Tensor:
        """All neurons with all bits: [n, H] of hidden states [n, H]."""
        return self._owner_ffn.all_rows(x, self.backend)

    def dense(self, hidden_states: Tensor, *choice: Tensor) -> Tensor:
        """All neurons with all bits, by the backend in use: [..., H] of hidden states [..., H]."""
        backend = "auto" if self.backend == "dense" else self.backend
        return self._owner_ffn.all_neurons(hidden_states, backend, *choice)

    # What it is derived from

    def adopt(self) -> Any:
        """Place tables beside the streams."""
        with plain_tensors():
            self.forget()
            self._key = key_for(self, self._key)
            owner = self._owner_ffn
            self.problem = None
            if not self._try_to_place(owner.look.device, owner.dtype):
                return None
            self._derive()
            self._operands = self._flattened()
            self._seen = SeenPlanes.of(owner)  # type: ignore[assignment]
            return self._seen

    def _derive(self) -> None:
        b = self._buffers
        owner = self._owner_ffn
        if owner.down_bias is not None:
            b |= joined_bias(owner.down_bias.to(owner.dtype), self._clusters)
        b["active_sets"], b["maybe_sets"] = self.tables.active_sets, None
        self.looked_at = mean_share(b["active_sets"], self.cost.intermediate_size)
        self.density = 0.0
