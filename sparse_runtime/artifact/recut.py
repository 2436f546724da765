"""``recut``: active sets for another budget, from an artifact's centroids, without a rebuild."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparse_runtime.artifact.bands import (
    Bands,
    LayerCentroids,
    StageCosts,
    all_neurons,
    cut_bands,
)
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.layer_clusters import LayerClusters
from sparse_runtime.config import check_cut
from sparse_runtime.errors import ConfigError
from sparse_runtime.kernels.bitmaps import pack_bits
from sparse_runtime.models.ffn_layer import FFNLayer, layer_cost
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.onloading import onloaded

# Neurons times clusters of a layer that the search for λ looks at; the layer itself is cut exactly.
_SEARCH_VALUES = 1 << 17
# Of the range of ln λ, of 50: to 3e-6.
_HALVINGS = 24
# Share of Σ e² below which compensation fades no further, so that other budgets can be cut again.
_LEAST_LEFT_OUT = 1e-4
# Share of e² lost by base planes that no build has measured: 4-bit ones of the demo's late layers.
_BASE_ERROR = 0.05


def recut(
    model: nn.Module,
    clusters: ClusterSet,
    *,
    budget: float | None = None,
    verify: bool | None = None,
    layer_budgets: Mapping[int, float] | None = None,
) -> ClusterSet:
    """Cut an artifact's active sets again for another budget.

    One price of a computed neuron serves all layers and clusters (see ``artifact.bands``). A
    layer that would save less than it loses gets sets of all neurons, which run without a router.

    Args:
        model: the model that the artifact was built for.
        clusters: with the layers' centroids.
        budget: cost share of all layers together, in (0, 1], bits per FFN weight and token ÷ 16; the
            artifact's own if None.
        verify: with or without a band of neurons that looks decide on; as the artifact is
            if None.
        layer_budgets: layer index -> cost share of its own (1: dense). The other layers share what
            these leave of ``budget``; if there are none, their mean is the budget.

    Returns:
        A new artifact, which shares routers and centroids with the old one.

    Raises:
        ConfigError: the artifact has no centroids, a layer is not in it, a value is of the wrong
            kind or out of range, or the budget cannot be met or has no layer to share it.
        FingerprintMismatchError: the model has other sizes than the artifact's.
    """
    check_cut(budget, verify, layer_budgets)
    clusters.check_model(model, weights=False)
    own = dict(layer_budgets or {})
    _check(clusters, own)
    names_all = own.keys() >= clusters.layers.keys()
    if names_all and budget is not None:
        raise ConfigError(
            f"budget is {budget}, but layer_budgets names every layer and leaves nothing to share; "
            "leave budget out, or some layer"
        )
    parts = _parts(model, clusters, clusters.verified if verify is None else verify)
    if names_all:
        whole = sum(parts[index].dense_bytes for index in own)
        budget = sum(parts[index].dense_bytes * share for index, share in own.items()) / whole
    budget = clusters.budget if budget is None else budget
    common = [part for index, part in parts.items() if index not in own]
    aim = budget
    if clusters.measured is not None:
        aim = clusters.measured.aim_for(budget, _range(list(parts.values()))[1])
    rest = _rest(parts, own, aim) if common else 0.0
    price = _price(common, rest) if common else 0.0
    layers = {
        index: part.cut(_price([part], own[index]) if index in own else price)
        for index, part in parts.items()
    }
    measured = clusters.measured
    if own and measured is not None:
        measured = measured.without_audits()  # of layers that are cut alike
    return replace(clusters, layers=layers, budget=float(budget), measured=measured)


def _rest(parts: Mapping[int, _Part], own: Mapping[int, float], aim: float) -> float:
    """What is left of a cost share for the layers that have none of their own."""
    whole = sum(part.dense_bytes for part in parts.values())
    taken = sum(parts[index].dense_bytes * share for index, share in own.items())
    left = sum(part.dense_bytes for index, part in parts.items() if index not in own)
    return (aim * whole - taken) / left


def share_range(model: nn.Module, clusters: ClusterSet, *, verify: bool) -> tuple[float, float]:
    """Cost shares of all layers together with no neuron computed, and with all, which need no router.

    Args:
        model: the model that the artifact was built for.
        clusters: with the layers' centroids.
        verify: with or without a band of neurons that looks decide on.
    """
    return _range(list(_parts(model, clusters, verify).values()))


def _range(parts: Sequence[_Part]) -> tuple[float, float]:
    dense_bytes = sum(part.dense_bytes for part in parts)
    least = sum(part.dense_bytes * part.least_share for part in parts)
    return least / dense_bytes, sum(part.whole_bytes for part in parts) / dense_bytes


def price_for(model: nn.Module, clusters: ClusterSet, budget: float, *, verify: bool) -> float:
    """λ, the estimated loss that computing a neuron must save, at which a budget is met.

    Args:
        model: the model that the artifact was built for.
        clusters: with the layers' centroids; layers that are not in it play no part.
        budget: cost share of its layers together.
        verify: with or without a band of neurons that looks decide on.

    Raises:
        ConfigError: the budget cannot be met.
    """
    return _price(list(_parts(model, clusters, verify).values()), budget)


def _parts(model: nn.Module, clusters: ClusterSet, verify: bool) -> dict[int, _Part]:
    return {
        layer.index: _Part(layer, clusters.layers[layer.index], verify)
        for layer in find_ffn_layers(model, packed=True)
        if layer.index in clusters.layers
    }


def _check(clusters: ClusterSet, own: Mapping[int, float]) -> None:
    for index in own:
        if index not in clusters.layers:
            raise ConfigError(
                f"layer_budgets names layer {index}, which the artifact does not hold; expected some "
                f"of {sorted(clusters.layers)}"
            )
    missing = [index for index, layer in clusters.layers.items() if layer.centroids is None]
    if missing:
        raise ConfigError(
            "sets cannot be cut for another budget: the artifact was loaded without centroids. Use "
            "ClusterSet.from_pretrained(…, centroids=True); if its folder has no "
            "centroids.safetensors, build it again with save_centroids=True"
        )


class _Part:
    """One layer in the search for the price."""

    def __init__(self, layer: FFNLayer, clusters: LayerClusters, verify: bool) -> None:
        assert clusters.centroids is not None
        self._layer = layer
        self._clusters = clusters
        whole = clusters.centroids
        self._cost = layer_cost(layer, clusters.extra_elements, verified=verify)
        error = clusters.base_error if layer.bits == clusters.weights else None
        error = _BASE_ERROR if error is None else error
        self._stages = StageCosts.of(self._cost, error, verify=verify)
        step = -(-whole.mean_squares.numel() // _SEARCH_VALUES)
        self._sample = whole.every(step).weighted(clusters.cluster_weights)

    @property
    def largest_loss(self) -> float:
        """The largest mean e² of the layer."""
        return self._centroids.mean_squares.max().item()

    @property
    def _centroids(self) -> LayerCentroids:
        """Weighted anew each time: copies for all layers would be a gigabyte of a large model's."""
        assert self._clusters.centroids is not None
        return self._clusters.centroids.weighted(self._clusters.cluster_weights)

    @property
    def dense_bytes(self) -> int:
        """What the layer reads for a dense token."""
        return self._cost.dense_bytes

    @property
    def whole_bytes(self) -> int:
        """What all neurons read, which need no router."""
        return self._cost.whole_bytes

    @property
    def _whole_share(self) -> float:
        """Cost share of all neurons, which need no router."""
        return self.whole_bytes / self.dense_bytes

    @property
    def least_share(self) -> float:
        """Cost share with no neuron at all."""
        return self._cost.share(0)

    def expected_share(self, price: float) -> float:
        """Expected cost share at a price, from a sample of the neurons."""
        return self._share(cut_bands(self._sample, price, self._stages), price)

    def _share(self, bands: Bands, price: float) -> float:
        """Expected cost share, that of all neurons where these are worth their price."""
        scale = self._layer.intermediate_size / bands.sure.shape[1]
        amounts = (bands.computed, bands.looked, bands.refined)
        if self._cost.looks_first and bands.maybe is None:  # read whole
            amounts = (bands.computed, bands.computed, bands.computed)
        share = self._cost.share(*(amount * scale for amount in amounts))
        whole = self._whole_share
        return share if bands.loss * scale < price * self._cost.neurons * (whole - share) else whole

    def cut(self, price: float) -> LayerClusters:
        """The layer's clusters with the sets of a price."""
        centroids = self._centroids
        bands = cut_bands(centroids, price, self._stages)
        if self._share(bands, price) == self._whole_share:
            bands = all_neurons(centroids)
        shift, correction, left_out = self._compensation(bands)
        bias = None
        if self._clusters.cluster_bias is not None:
            with onloaded(self._layer.holder):
                down = self._layer.down_rows()
                bias = (bands.left_out.to(down) @ down).float().cpu()
            if shift is not None and bands.share_left_out > 0:
                bias += shift
            bias = bias.to(torch.bfloat16)
        factors = tau = None
        if bands.maybe is not None:
            threshold = price * self._stages.count
            factors = centroids.neuron_weights.float() / math.sqrt(threshold)
            tau = self._stages.tau if self._stages.looks_first else None
        return replace(
            self._clusters,
            active_sets=pack_bits(bands.sure),
            static_set=pack_bits(centroids.static_set(bands.computed)),
            cluster_bias=bias,
            correction_up=correction,
            bias_shift=shift,
            left_out=left_out,
            maybe_sets=None if bands.maybe is None else pack_bits(bands.maybe),
            factors=factors,
            tau=tau,
        )

    def _compensation(self, bands: Bands) -> tuple[Tensor | None, Tensor | None, float | None]:
        """Shift [K, H] and C of the correction [c, H] for these bands, and the share left out.

        Both make good what is left out, and go as its root mean square does: to nothing, as a budget
        goes to one.
        """
        clusters, left_out = self._clusters, min(1.0, max(bands.share_left_out, _LEAST_LEFT_OUT))
        shift, correction = clusters.bias_shift, clusters.correction_up
        if shift is None or clusters.left_out is None:
            # Not tuned, or in an artifact that does not say at which cut.
            return shift, correction, left_out if shift is None else None
        fade = math.sqrt(left_out / clusters.left_out)
        return (
            shift.float() * fade,
            None if correction is None else correction.float() * fade,
            left_out,
        )


def _price(parts: Sequence[_Part], share: float) -> float:
    """The least price at which the layers' expected cost share together is at most ``share``."""
    whole = sum(part.dense_bytes for part in parts)
    least, _ = _range(parts)
    if share <= least:
        raise ConfigError(
            f"the budget leaves {share:.3f} of the FFN for each layer, but router, bias and bitmaps "
            f"alone read {least:.3f}; expected a larger budget, or an artifact with fewer clusters or "
            "a smaller router rank"
        )
    # Layers that output nothing have no loss; 1e-30 is below any that counts. Looking at a neuron in
    # planes takes a tenth of a float neuron's bytes at least: at e⁴ times the largest loss none pays.
    high = math.log(max(1e-30, *(part.largest_loss for part in parts))) + 4
    low = high - 50
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        price = math.exp(middle)
        read = sum(part.dense_bytes * part.expected_share(price) for part in parts)
        if read > share * whole:
            low = middle
        else:
            high = middle
    return math.exp(high)
