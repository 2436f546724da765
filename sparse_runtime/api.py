"""``sparsify`` and its three exits: ``unsparsify``, ``dense`` and the counters."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparse_runtime.architectures import FFNLayer, find_ffn_layers
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.recut import recut
from sparse_runtime.config import SparseConfig
from sparse_runtime.cost import CostReport, count_cost
from sparse_runtime.errors import AlreadySparseError, NothingMatchedError, NotSparseError
from sparse_runtime.fast_linear import fast_linear, slow_linear
from sparse_runtime.sparse_ffn import Padding, SparseFFN

ModelT = TypeVar("ModelT", bound=nn.Module)


def sparsify(
    model: ModelT,
    clusters: ClusterSet | str | os.PathLike[str],
    *,
    config: SparseConfig | None = None,
    **options: Any,
) -> ModelT:
    """Make a model's FFNs read only the neurons that each token's cluster needs, in place.

    Either all layers of the artifact are patched or, on error, none.

    Args:
        model: a causal language model whose type is in the architecture table.
        clusters: the artifact, or the folder or Hub id it is loaded from.
        config: run-time options; the defaults route decode steps and leave prefill dense.
        options: fields of :class:`SparseConfig` by name, in place of those of ``config``:
            ``sparsify(model, clusters, budget=0.4)`` cuts the sets for another cost share.

    Returns:
        The same model.

    Raises:
        ConfigError: an option is unknown or out of range, or the sets cannot be cut for it.
        AlreadySparseError: the model is sparse already.
        UnsupportedArchitectureError: the model type, or one of its FFNs, is not supported.
        NothingMatchedError: no layer of the artifact is in the model.
        FingerprintMismatchError: the artifact was built for other weights.
        ArtifactError: the artifact cannot be read.
    """
    config = (config or SparseConfig()).with_options(options)
    if _sparse_modules(model):
        raise AlreadySparseError(
            "the model is sparse already; call unsparsify(model) before another sparsify"
        )
    layers = find_ffn_layers(model)
    cuts = config.budget is not None or config.verify is not None or bool(config.layer_budgets)
    if not isinstance(clusters, ClusterSet):
        clusters = ClusterSet.from_pretrained(clusters, centroids=cuts)
    if config.check_fingerprint:
        clusters.check_model(model)
    if cuts:
        clusters = recut(
            model,
            clusters,
            budget=config.budget,
            verify=config.verify,
            layer_budgets=config.layer_budgets,
        )
    matched = [layer for layer in layers if layer.index in clusters.layers]
    matched = _without_offloaded(matched)
    if not matched:
        raise NothingMatchedError(
            f"no layer was patched: the artifact holds layers {sorted(clusters.layers)}, the model "
            f"has {[layer.index for layer in layers]}; build clusters for this model"
        )
    sparse = [(layer, SparseFFN(layer, clusters.layers[layer.index], config)) for layer in matched]
    padding = Padding()
    for layer, module in sparse:
        module.train(layer.mlp.training)
        module.padding = padding
        setattr(layer.parent, layer.attribute, module)
    model.register_forward_pre_hook(_NotePadding(padding), with_kwargs=True)
    if config.fast_linear:
        fast_linear(model)
    return model


def unsparsify(model: ModelT) -> ModelT:
    """Undo ``sparsify`` in place: modules, weights and outputs are bit for bit what they were.

    Raises:
        NotSparseError: the model holds no sparse FFN.
    """
    for name, module in _require_sparse(model):
        parent_name, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent_name), attribute, module.restore())
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _NotePadding):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    return slow_linear(model)


@contextmanager
def dense(model: ModelT) -> Iterator[ModelT]:
    """Run the original FFNs inside the context, for comparison; sparse again after it.

    Raises:
        NotSparseError: the model holds no sparse FFN.
    """
    modules = [module for _, module in _require_sparse(model)]
    before = [module.forced_dense for module in modules]
    try:
        for module in modules:
            module.forced_dense = True
        yield model
    finally:
        for module, value in zip(modules, before, strict=True):
            module.forced_dense = value


def cost_report(model: nn.Module) -> CostReport:
    """Count the FFN bytes that a sparse model has read since the last :func:`reset_cost`.

    Raises:
        NotSparseError: the model holds no sparse FFN.
    """
    return count_cost([module for _, module in _require_sparse(model)])


def reset_cost(model: nn.Module) -> None:
    """Set the byte and token counters of a sparse model to zero.

    Raises:
        NotSparseError: the model holds no sparse FFN.
    """
    for _, module in _require_sparse(model):
        module.reset_counts()


def sparse_modules(model: nn.Module) -> list[SparseFFN]:
    """Return the sparse FFNs of a model, in layer order.

    Raises:
        NotSparseError: the model holds no sparse FFN.
    """
    return [module for _, module in _require_sparse(model)]


class _NotePadding:
    """Forward pre-hook of the model: padding tokens of the coming call, for the FFNs to skip."""

    def __init__(self, padding: Padding) -> None:
        self._padding = padding

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self._padding.mask = None
        tokens = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        mask = kwargs.get("attention_mask")
        if not (isinstance(mask, Tensor) and isinstance(tokens, Tensor)):
            return
        # On a GPU, asking whether there is padding would wait for the device.
        if mask.device.type == "cpu" and mask.dim() == 2 and tokens.shape[1] <= mask.shape[1]:
            self._padding.mask = mask[:, -tokens.shape[1] :]


def _sparse_modules(model: nn.Module) -> list[tuple[str, SparseFFN]]:
    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, SparseFFN)
    ]


def _require_sparse(model: nn.Module) -> list[tuple[str, SparseFFN]]:
    modules = _sparse_modules(model)
    if not modules:
        raise NotSparseError(
            f"this {type(model).__name__} is dense: it holds no SparseFFN; call "
            "sparsify(model, clusters) first"
        )
    return modules


def _without_offloaded(layers: list[FFNLayer]) -> list[FFNLayer]:
    offloaded = [layer.name for layer in layers if layer.gate.weight.device.type == "meta"]
    if offloaded:
        warnings.warn(
            f"{len(offloaded)} of {len(layers)} FFNs stay dense because accelerate offloads their "
            f"weights ({offloaded[0]}, …): moving whole matrices costs more than skipping rows "
            "saves. Give the model more device memory to run them sparsely",
            stacklevel=3,
        )
    return [layer for layer in layers if layer.name not in offloaded]
