"""An artifact's tensors beside a model's weights: copies, on their device, in their dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from torch import Tensor

from sparse_runtime.artifact.layer_clusters import LayerClusters
from sparse_runtime.ffn.rule import DENSE_REASONS
from sparse_runtime.kernels.bitmaps import set_sizes
from sparse_runtime.models.ffn_forms import FFNForm

_FLOATS = (
    "router_down",
    "router_up",
    "router_bias",
    "cluster_bias",
    "correction_down",
    "correction_up",
)
# What recut and reports need, and no call.
_NOT_OF_A_CALL = ("static_set", "centroids", "bias_shift")


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Make tensors that outlive the caller's inference mode, and are not recorded."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def lay_out(weight: Tensor, *, transposed: bool) -> None:
    """Put matrices in memory by columns, or by rows again; its values, shape and kind stay."""
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        data = weight.data
        weight.data = data.mT.contiguous().mT if transposed else data.contiguous()


def own_copy(clusters: LayerClusters) -> LayerClusters:
    """What a call needs of a layer's clusters, copied to the CPU: the artifact's are its owner's."""
    names = [field.name for field in fields(clusters) if field.name not in _NOT_OF_A_CALL]
    with plain_tensors():
        copies = {
            name: tensor.detach().to("cpu", copy=True)
            for name in names
            if isinstance(tensor := getattr(clusters, name), Tensor)
        }
    return replace(clusters, **copies, centroids=None, bias_shift=None)  # type: ignore[arg-type]


def placed(
    clusters: LayerClusters, device: torch.device, dtype: torch.dtype, *, looks: bool
) -> dict[str, Tensor | None]:
    """Tensors of a layer's clusters by name, for weights of a device and dtype.

    Args:
        clusters: of the layer.
        device: of the weights.
        dtype: of the weights; router, bias and correction take it.
        looks: with the band of neurons that looks decide on.
    """
    floats: dict[str, Tensor | None] = {name: getattr(clusters, name) for name in _FLOATS}
    tensors = {
        name: None if tensor is None else tensor.to(device, dtype)
        for name, tensor in floats.items()
    }
    tensors["active_sets"] = clusters.active_sets.to(device)
    tensors["maybe_sets"] = tensors["factors"] = tensors["cluster_weights"] = None
    if looks and clusters.maybe_sets is not None and clusters.factors is not None:
        tensors["maybe_sets"] = clusters.maybe_sets.to(device)
        # The kernels want the factors in float32, whatever the weights are.
        tensors["factors"] = clusters.factors.to(device, torch.float32)
        if clusters.cluster_weights is not None:
            tensors["cluster_weights"] = clusters.cluster_weights.to(device, torch.float32)
    return tensors


def placed_biases(
    form: FFNForm, biases: Sequence[Tensor | None], clusters: LayerClusters
) -> dict[str, Tensor | None]:
    """Biases of an FFN's linear layers by the names of buffers.

    Those before the activation are copied in float32; that of down [H] joins the clusters' own [K, H].
    """
    gate, up = (
        None if bias is None else bias.detach().float().contiguous()
        for bias in form.split_bias(*biases)
    )
    tensors = {"gate_bias": gate, "up_bias": up}
    return tensors if biases[-1] is None else tensors | joined_bias(biases[-1], clusters)


def joined_bias(down: Tensor, clusters: LayerClusters) -> dict[str, Tensor | None]:
    """The buffer ``cluster_bias`` [K, H] of the clusters' own and a down projection's bias [H]."""
    own = clusters.cluster_bias
    together = down.detach() if own is None else own.to(down) + down.detach()
    return {"cluster_bias": together.expand(clusters.num_clusters, -1).contiguous()}


def counters(
    num_clusters: int, stages: int, device: torch.device, before: Mapping[str, Tensor | None]
) -> dict[str, Tensor | None]:
    """Counters of an FFN by name, on a device: those there were, or zeros.

    Args:
        num_clusters: K.
        stages: number of ways in which neurons are read.
        device: of the weights.
        before: counters there were.
    """
    sizes = {
        "cluster_counts": num_clusters,
        "row_counts": stages,
        "dense_counts": len(DENSE_REASONS),
        "audit_cluster_counts": num_clusters,
        "audit_row_counts": stages,
    }
    tensors: dict[str, Tensor | None] = {"programs": None}
    for name, size in sizes.items():
        counts = before.get(name)
        if counts is None:
            counts = torch.zeros(size, dtype=torch.int64)
        tensors[name] = counts.to(device)
    return tensors


def triton_programs(hidden_size: int, device: torch.device) -> Tensor:
    """Zeros that the Triton kernels count finished programs in."""
    from sparse_runtime.kernels.triton.ffn import num_counters

    return torch.zeros(num_counters(hidden_size), dtype=torch.int32, device=device)


def mean_share(sets: Tensor | None, num_neurons: int) -> float:
    """Mean share of the neurons in bitmaps [K, ⌈I/8⌉]; 0 if there are none."""
    return 0.0 if sets is None else set_sizes(sets).float().mean().item() / num_neurons
