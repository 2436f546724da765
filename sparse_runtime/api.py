"""``sparsify`` and its three exits: ``unsparsify``, ``dense`` and the counters."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from sparse_runtime.artifact.build_record import within
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.recut import recut
from sparse_runtime.config import SparseConfig
from sparse_runtime.cost import CostReport
from sparse_runtime.errors import (
    AlreadySparseError,
    ConfigError,
    NothingMatchedError,
    NotSparseError,
    UnsupportedArchitectureError,
)
from sparse_runtime.ffn.counts import count_cost
from sparse_runtime.ffn.fast_linear import restore, slow_linears, swap
from sparse_runtime.ffn.guard import Guard
from sparse_runtime.ffn.model_state import ModelState
from sparse_runtime.ffn.patch import owners, patch, sparse_ffn_of, unpatch
from sparse_runtime.ffn.sparse_experts import SparseExperts, SparsePlaneExperts
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.ffn.sparse_planes import SparsePlaneFFN
from sparse_runtime.kernels import resolve_backend
from sparse_runtime.kernels.linear import runs_own_forward
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import decoder_of, find_ffn_layers

if TYPE_CHECKING:
    from sparse_runtime.ffn.plane_restoring import Packing

ModelT = TypeVar("ModelT", bound=nn.Module)


def sparsify(
    model: ModelT,
    clusters: ClusterSet | str | os.PathLike[str],
    *,
    config: SparseConfig | None = None,
    revision: str | None = None,
    **options: Any,
) -> ModelT:
    """Make a model's FFNs read only the neurons that each token's cluster needs, in place.

    Either all layers of the artifact are patched or, on error, none.

    Args:
        model: a causal language model (docs/models.md lists the types whose FFNs are found).
        clusters: the artifact, or the folder or Hub id it is loaded from.
        config: run-time options; the defaults route decode steps and leave prefill dense.
        revision: branch, tag or commit of the Hub repository that ``clusters`` names.
        options: fields of :class:`SparseConfig` by name, in place of those of ``config``:
            ``sparsify(model, clusters, budget=0.4)`` cuts the sets for another cost share.

    Returns:
        The same model.

    Raises:
        ConfigError: an option is unknown or out of range, or the sets cannot be cut for it.
        AlreadySparseError: the model is sparse already.
        UnsupportedArchitectureError: the model type, or one of its FFNs, is not supported.
        NothingMatchedError: a layer of the artifact is not in the model, none can be patched, or
            ``fast_linear`` finds no linear layer.
        FingerprintMismatchError: the artifact was built for other weights.
        ArtifactError: the artifact cannot be read.
    """
    if config is not None and not isinstance(config, SparseConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; expected a SparseConfig, or its fields by name: "
            "sparsify(model, clusters, budget=0.4)"
        )
    config = (config or SparseConfig()).with_options(options)
    if any(owners(model)):
        raise AlreadySparseError(
            "the model is sparse already; call unsparsify(model) before another sparsify"
        )
    layers = find_ffn_layers(model, packed=True, int8=config.weights is not None)
    with torch.inference_mode(False), torch.no_grad():  # what is made here outlives the caller's
        artifact = _artifact(model, clusters, config, revision)
        matched = _matched(layers, artifact)
        state = ModelState()
        if config.weights is not None or config.linear_weights is not None:
            for layer in matched:  # an error must not come once weights are packed
                resolve_backend(
                    *(config.backend, layer.device, layer.dtype),
                    strict=config.strict,
                    warn=lambda _: None,
                )
            state.packing = _pack(model, config)
            layers = find_ffn_layers(model, packed=True)
            kept = {layer.index for layer in matched}
            matched = [layer for layer in layers if layer.index in kept]
        _note_other_bits(artifact, matched)
        ffns = [
            _kind(layer)(
                layer, artifact.layers[layer.index], config, state, first=layer is matched[0]
            )
            for layer in matched
        ]
        linears = []
        if config.fast_linear:
            linears = slow_linears(model, [part for layer in layers for part in layer.parts])
        patch(matched, ffns)
        swap(linears)
        _attach_guard(model, artifact, config, state, matched)
        state.fast_linears += linears
    return model


def _attach_guard(
    model: nn.Module,
    clusters: ClusterSet,
    config: SparseConfig,
    state: ModelState,
    layers: Iterable[FFNLayer],
) -> None:
    """Audit prompts where the artifact says what to expect of these weights and sets."""
    if not config.guard or config.prefill == "sparse" or clusters.measured is None:
        return
    bits = {layer.index: layer.bits for layer in layers}
    levels = clusters.measured.audit_for(clusters.budget, verified=clusters.verified)
    if levels is None or any(
        index not in bits or bits[index] != clusters.layers[index].weights
        for index in levels.errors
    ):
        return
    try:
        decoder = decoder_of(model)
    except (AttributeError, UnsupportedArchitectureError):  # a model without a decoder to follow
        return
    state.guard = Guard(levels, state)
    state.guard.attach(decoder)


def _kind(layer: FFNLayer) -> type[SparseFFN]:
    if layer.experts:
        return SparsePlaneExperts if layer.packed else SparseExperts
    return SparsePlaneFFN if layer.packed else SparseFFN


def _pack(model: nn.Module, config: SparseConfig) -> Packing | None:
    """Pack what a model does not have in the config's bits yet; None if that is nothing."""
    # transformers' quantizers, which it extends, are imported for those who ask for it only.
    from sparse_runtime.ffn.plane_packing import pack_model
    from sparse_runtime.ffn.plane_restoring import Packing, still_to_pack

    bits, linears = still_to_pack(model, config.weights, config.linear_weights)
    if bits is None and linears is None:
        if config.keep_float:
            raise UnsupportedArchitectureError(
                "keep_float is True, but the model came packed in these bits, with no float weights to "
                "keep; leave keep_float out, or load the float checkpoint"
            )
        return None
    packing = Packing.of(model, keep_float=config.keep_float)
    pack_model(model, bits, linears=linears, packing=packing)
    return packing


def _artifact(
    model: nn.Module,
    clusters: ClusterSet | str | os.PathLike[str],
    config: SparseConfig,
    revision: str | None,
) -> ClusterSet:
    """The artifact, checked against the model and cut as the options say."""
    if not isinstance(clusters, ClusterSet):
        clusters = ClusterSet.from_pretrained(clusters, revision=revision, centroids=config.cuts)
    elif revision is not None:
        raise ConfigError(
            "revision is given, but clusters is no Hub id; expected one without the other"
        )
    clusters.check_model(model, weights=config.check_fingerprint)
    if not config.cuts:
        return clusters
    budget = config.budget
    if config.max_loss is not None:
        budget = clusters.budget_for(config.max_loss, config.max_loss_domain).budget
    return recut(
        model,
        clusters,
        budget=budget,
        verify=config.verify,
        layer_budgets=config.layer_budgets,
    )


def _matched(layers: list[FFNLayer], clusters: ClusterSet) -> list[FFNLayer]:
    """The layers to patch: those of the artifact that can be."""
    found, held = [layer.index for layer in layers], sorted(clusters.layers)
    if len(held) < len(found):
        left = sorted(set(found) - set(held))
        warnings.warn(
            f"layers {left} stay dense: the artifact holds only layers {held} of the model's "
            f"{len(found)}",
            stacklevel=3,
        )
    matched = [layer for layer in layers if layer.index in clusters.layers]
    problems = {layer.name: _obstacle(layer) for layer in matched}
    kept = [layer for layer in matched if problems[layer.name] is None]
    if len(kept) < len(matched):
        name, problem = next(item for item in problems.items() if item[1] is not None)
        text = (
            f"{len(matched) - len(kept)} of {len(matched)} FFNs stay dense ({name}, …): {problem}"
        )
        if not kept:
            raise NothingMatchedError(f"no layer was patched: {text}")
        warnings.warn(text, stacklevel=3)
    return kept


def _note_other_bits(clusters: ClusterSet, layers: Iterable[FFNLayer]) -> None:
    """Say so where clusters were tuned for other bits than the weights have."""
    tuned = within(clusters.build, "config", "weights")
    formats: list[Any] = [layer.mlp.format for layer in layers if layer.packed]
    other = next((form.bits for form in formats if form.bits != tuned), None)
    if isinstance(tuned, int) and other is not None:
        warnings.warn(
            f"the clusters were tuned for weights of {tuned} bits, and the FFNs have {other}; "
            "judge them with `sparse-runtime eval`, or build them for these weights",
            stacklevel=3,
        )


def _obstacle(layer: FFNLayer) -> str | None:
    """Why an FFN cannot be patched; None if it can."""
    if any(weight.device.type == "meta" for weight in layer.weights):
        return (
            "accelerate offloads their weights, and moving whole matrices costs more than skipping "
            "rows saves. Give the model more device memory to run them sparsely"
        )
    if not runs_own_forward(layer.mlp):
        return (
            "their forward has been replaced on the module itself, by accelerate's hooks or by hand, "
            "so that it would never ask for clusters. Undo that, and call sparsify first"
        )
    return None


def unsparsify(model: ModelT) -> ModelT:
    """Undo ``sparsify`` in place: modules, weights and outputs are bit for bit what they were.

    Weights that ``sparsify`` packed in planes (``weights``, ``linear_weights``) are so only with
    ``keep_float``. Without it they become floats of the packed values, with a warning; what they were
    before is in the checkpoint.

    Raises:
        NotSparseError: the model holds no sparse FFN.
    """
    modules = _require_sparse(model)
    states = _states(modules)
    for state in states:
        restore(state.fast_linears)
    for guard in _guards(modules):
        guard.detach()
    with torch.inference_mode(False), torch.no_grad():
        for owner in list(owners(model)):
            unpatch(owner)
        packings = [state.packing for state in states if state.packing is not None]
        for packing in packings:
            packing.undo(model)
    if any(packing.floats is None for packing in packings):
        warnings.warn(
            "the weights are floats of the packed values now; load the model again for the "
            "checkpoint's own, or sparsify with keep_float=True",
            stacklevel=2,
        )
    return model


@contextmanager
def dense(model: ModelT) -> Iterator[ModelT]:
    """Run the original FFNs inside the context, for comparison; sparse again after it.

    Only calls of the thread that enters the context are dense. Contexts may be nested and end in any
    order.

    Raises:
        NotSparseError: the model holds no sparse FFN.
    """
    with ExitStack() as stack:
        for state in _states(_require_sparse(model)):
            stack.enter_context(state.switch.on())
        yield model


def cost_report(model: nn.Module) -> CostReport:
    """Count the FFN bytes that a sparse model has read since the last :func:`reset_cost`.

    Raises:
        NotSparseError: the model holds no sparse FFN.
    """
    modules = _require_sparse(model)
    guards = _guards(modules)
    return replace(
        count_cost(modules),
        audited_prompts=sum(guard.audited for guard in guards),
        guarded_prompts=sum(guard.dense for guard in guards),
    )


def reset_cost(model: nn.Module) -> None:
    """Set the byte and token counters of a sparse model to zero.

    Raises:
        NotSparseError: the model holds no sparse FFN.
    """
    modules = _require_sparse(model)
    for module in modules:
        module.reset_counts()
    for guard in _guards(modules):
        guard.reset()


def sparse_modules(model: nn.Module) -> list[SparseFFN]:
    """Return the sparse FFNs of a model, in layer order.

    Raises:
        NotSparseError: the model holds no sparse FFN.
    """
    return _require_sparse(model)


def _guards(modules: Iterable[SparseFFN]) -> list[Guard]:
    return [state.guard for state in _states(modules) if state.guard is not None]


def _states(modules: Iterable[SparseFFN]) -> list[ModelState]:
    """What the FFNs share: of one model one, and one more for each layer that was copied apart."""
    return list({id(module.state): module.state for module in modules}.values())


def _require_sparse(model: nn.Module) -> list[SparseFFN]:
    modules = [sparse_ffn_of(owner) for owner in owners(model)]
    if not modules:
        raise NotSparseError(
            f"this {type(model).__name__} is dense: it holds no SparseFFN; call "
            "sparsify(model, clusters) first"
        )
    return modules
