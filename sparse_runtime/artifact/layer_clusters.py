"""Clusters and router of one layer, in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.artifact.bands import LayerCentroids
from sparse_runtime.artifact.format import LAYER_VALUES, TENSORS, TensorKey
from sparse_runtime.cost import router_parameter_count
from sparse_runtime.kernels.bitmaps import set_sizes


@dataclass(repr=False)
class LayerClusters:
    """Clusters and router of one layer.

    Attributes:
        active_sets: neurons computed for each cluster, bitmaps [K, ⌈I/8⌉] uint8.
        static_set: the best one set for all tokens, of the clusters' mean size, bitmap [⌈I/8⌉]
            uint8; what a router must beat.
        router_down: first matrix of a low-rank router [r, H], or None for a linear router.
        router_up: [K, r], or [K, H] for a linear router.
        router_bias: [K].
        cluster_bias: added to the output of a cluster's tokens, the mean of what their sets leave out
            [K, H], or None.
        correction_down: with ``correction_up``, both [c, H], adds correction_upᵀ·(correction_down·x) to
            the output; None without a correction.
        correction_up: see ``correction_down``.
        bias_shift: part of ``cluster_bias`` that distillation found [K, H]; None if it was not
            distilled, or loaded without centroids.
        left_out: share of the importance Σ e² that the sets are expected to leave out, which
            ``bias_shift`` and ``correction_up`` go with when sets are cut for another budget; None
            where sets were not cut at a price.
        maybe_sets: neurons of each cluster that looks decide on, bitmaps [K, ⌈I/8⌉] uint8, or
            None.
        factors: such a neuron is computed where |h̃|·factor > 1, with h̃ from its look record
            [I]; None without ``maybe_sets``.
        cluster_weights: what e counts in a cluster's tokens, so many times which factors are for them
            [K]; None: all alike.
        tau: over planes, such a neuron is refined where |h̃|·factor > τ; None where sets were cut for
            float weights.
        weights: bits of the planes that the clusters were built for; None for float weights.
        base_error: of these planes, the share of e² that is lost where neurons are counted by their
            base planes.
        experts: E, of a mixture of experts, whose neurons are one expert's after the other's; None of a
            single FFN.
        centroids: what other sets can be cut from (:func:`sparse_runtime.recut`), or None.
    """

    active_sets: Tensor
    static_set: Tensor
    router_up: Tensor
    router_bias: Tensor
    router_down: Tensor | None = None
    cluster_bias: Tensor | None = None
    correction_down: Tensor | None = None
    correction_up: Tensor | None = None
    bias_shift: Tensor | None = None
    left_out: float | None = None
    maybe_sets: Tensor | None = None
    factors: Tensor | None = None
    cluster_weights: Tensor | None = None
    tau: float | None = None
    weights: int | None = None
    base_error: float | None = None
    experts: int | None = None
    centroids: LayerCentroids | None = None

    def __repr__(self) -> str:
        router = "linear router" if self.router_rank is None else f"router rank {self.router_rank}"
        parts = [f"{self.num_clusters} clusters", router]
        if self.correction_rank:
            parts.append(f"correction rank {self.correction_rank}")
        optional = ("cluster_bias", "maybe_sets", "centroids")
        parts += [name for name in optional if getattr(self, name) is not None]
        return f"LayerClusters({', '.join(parts)})"

    @property
    def num_clusters(self) -> int:
        """K."""
        return self.active_sets.shape[0]

    @property
    def router_rank(self) -> int | None:
        """r of a low-rank router, None for a linear one."""
        return None if self.router_down is None else self.router_down.shape[0]

    @property
    def correction_rank(self) -> int:
        """c of the low-rank correction, 0 if there is none."""
        return 0 if self.correction_down is None else self.correction_down.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return (self.router_up if self.router_down is None else self.router_down).shape[1]

    @property
    def extra_elements(self) -> int:
        """Elements read per token besides the neurons: router, one bias vector and correction."""
        router = router_parameter_count(self.hidden_size, self.num_clusters, self.router_rank)
        vectors = 2 * self.correction_rank + (self.cluster_bias is not None)
        return router + vectors * self.hidden_size

    def collapsed(self, num_neurons: int) -> LayerClusters:
        """One cluster and nearly nothing beside it, if every set holds all neurons; else itself."""
        if not bool((set_sizes(self.active_sets) == num_neurons).all()):
            return self
        return LayerClusters(
            active_sets=self.active_sets[:1],
            static_set=self.static_set,
            router_up=torch.zeros(1, self.hidden_size),
            router_bias=torch.zeros(1),
            experts=self.experts,
        )


def layer_tensors(layer: LayerClusters) -> Iterator[tuple[TensorKey, Tensor]]:
    """The tensors that a layer has, each with its row of the table."""
    for key in TENSORS:
        owner, _, name = key.attribute.rpartition(".")
        holder = getattr(layer, owner) if owner else layer
        tensor = None if holder is None else getattr(holder, name)
        if tensor is not None:
            yield key, tensor


def layer_from_tensors(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> LayerClusters:
    """A layer out of the checked tensors of an artifact's files, and its entry of ``layers``."""
    index = entry["index"]
    own: dict[str, Any] = {}
    of_centroids: dict[str, Tensor] = {}
    for key in TENSORS:
        tensor = tensors.get(f"layers.{index}.{key.name}")
        if tensor is not None:
            owner, _, name = key.attribute.rpartition(".")
            (of_centroids if owner else own)[name] = tensor
    centroids = LayerCentroids(**of_centroids) if of_centroids else None
    values: dict[str, Any] = {name: entry.get(name) for name in LAYER_VALUES}
    return LayerClusters(**own, **values, centroids=centroids)
