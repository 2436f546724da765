"""Sparse FFNs of every kind, made for the layers of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from sparse_runtime.artifact.layer_clusters import LayerClusters
from sparse_runtime.config import SparseConfig
from sparse_runtime.ffn.model_state import ModelState
from sparse_runtime.ffn.patch import patch, unpatch
from sparse_runtime.ffn.sparse_experts import SparseExperts, SparsePlaneExperts
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.ffn.sparse_planes import SparsePlaneFFN
from sparse_runtime.models.ffn_layer import FFNLayer


def new_ffns(
    layers: Sequence[FFNLayer],
    clusters: Mapping[int, LayerClusters],
    config: SparseConfig,
    state: ModelState,
) -> list[SparseFFN]:
    """Make sparse FFNs, for :func:`sparse_runtime.ffn.patch.patch`.

    Args:
        layers: of one model, in memory.
        clusters: layer index -> clusters, of these at least.
        config: options of ``sparsify``.
        state: what they share.
    """
    return [
        _kind(layer)(layer, clusters[layer.index], config, state, first=layer is layers[0])
        for layer in layers
    ]


@contextmanager
def sparse_ffns(
    layers: Sequence[FFNLayer], clusters: Mapping[int, LayerClusters], config: SparseConfig
) -> Iterator[list[SparseFFN]]:
    """Make some of a dense model's FFNs sparse inside the context.

    Args:
        layers, clusters, config: as of :func:`new_ffns`.
    """
    state = ModelState()
    state.expect_long_calls()
    ffns = new_ffns(layers, clusters, config, state)
    patch(layers, ffns)
    try:
        yield ffns
    finally:
        for layer in layers:
            unpatch(layer.mlp)


def _kind(layer: FFNLayer) -> type[SparseFFN]:
    if layer.experts:
        return SparsePlaneExperts if layer.packed else SparseExperts
    return SparsePlaneFFN if layer.packed else SparseFFN
