"""An artifact without its clusters: the opponent that they must earn their place against.

Every token has the same candidates, chosen at the same prices from the same statistics, which are
nearly all neurons: what is left is looking, and no router.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparse_runtime.artifact.bands import LayerCentroids
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.layer_clusters import LayerClusters

#: Its name on the command line.
LOOK_ALL = "look-all"


def without_clusters(clusters: ClusterSet) -> ClusterSet:
    """The same artifact with all clusters of a layer in one, to be cut.

    Args:
        clusters: with centroids.
    """
    return replace(
        clusters,
        layers={index: _merged(layer) for index, layer in clusters.layers.items()},
        unread_centroids=None,
    )


def _merged(layer: LayerClusters) -> LayerClusters:
    centroids = layer.centroids
    assert centroids is not None, "cutting without centroids is refused before"

    def mean(values: Tensor) -> Tensor:
        return (centroids.shares @ values.float()).unsqueeze(0)

    def of_neurons(values: Tensor) -> Tensor:
        return centroids.overall(values).unsqueeze(0)

    return replace(
        layer,
        active_sets=layer.active_sets[:1],
        maybe_sets=None if layer.maybe_sets is None else layer.maybe_sets[:1],
        router_down=None,
        router_up=torch.zeros(1, layer.hidden_size),
        router_bias=torch.zeros(1),
        cluster_weights=None,
        cluster_bias=None if layer.cluster_bias is None else mean(layer.cluster_bias),
        bias_shift=None if layer.bias_shift is None else mean(layer.bias_shift),
        centroids=LayerCentroids(
            of_neurons(centroids.mean_squares),
            of_neurons(centroids.mean_magnitudes),
            of_neurons(centroids.mean_activations),
            torch.ones(1),
            centroids.neuron_weights,
            None if centroids.expert_shares is None else mean(centroids.expert_shares),
        ),
    )
