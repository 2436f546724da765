"""The cut with the whole sparse model in view: layers weighed, compensation tuned, bytes checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.recut import recut
from sparse_runtime.clusters.context import BuildContext
from sparse_runtime.clusters.ranks import Ranks
from sparse_runtime.clusters.tuning.distill import (
    Distillation,
    distill,
    held_out_divergence,
    reserved,
)
from sparse_runtime.clusters.tuning.held_out import CutMeasurer, HeldOutText
from sparse_runtime.clusters.tuning.local import shifted, tune_locally
from sparse_runtime.clusters.tuning.loop_weights import loop_weights, scaled
from sparse_runtime.clusters.tuning.student import DenseStates
from sparse_runtime.files import write_json, write_tensors
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.progress import ProgressReporter

#: Tokens that layers are weighed on, and that tell what a cut reads in the sparse model.
LOOP_TOKENS = 4096


def cut_in_loop(context: BuildContext, clusters: ClusterSet) -> tuple[ClusterSet, dict[str, Any]]:
    """Cut an artifact's sets for its budget with the whole sparse model in view.

    Returns:
        The artifact; and figures: ``loop_weights`` (layer index -> weight), ``local_tuning`` and
        ``tuning`` (of :func:`tune`), where these were asked for.
    """
    model, config = context.model, context.config
    figures: dict[str, Any] = {}
    options: dict[str, Any] = {"budget": config.budget, "verify": config.verify}
    count = max(1, LOOP_TOKENS // context.windows.shape[1])
    if config.loop_weights:
        with context.progress.stage("loop_weights"):
            figures["loop_weights"] = _loop_weights(context, recut(model, clusters, **options))
        weights = {int(index): weight for index, weight in figures["loop_weights"].items()}
        clusters = scaled(clusters, weights)
    text = _held_out_text(context)
    first = text.first(count)
    measurer = CutMeasurer(
        model, text, config.verify, context.buffers, context.ranks, context.progress
    )
    first_cuts = replace(measurer, text=first)
    # Compensation fits the cut that it is tuned at.
    clusters = first_cuts.measured_once(clusters)
    if config.tune_tokens:
        with context.progress.stage("tune"):
            clusters, figures["local_tuning"] = _tuned_locally(context, clusters, first_cuts)
    if config.distill:
        with context.progress.stage("distill"):
            clusters, figures["tuning"] = tune(
                model,
                clusters,
                lambda uncut: recut(model, uncut, **options),
                context.fit_windows,
                first.windows,
                Distillation(config.distill, config.correction_rank, seed=config.seed),
                dense_states=_dense_states(context),
                state_file=context.work / "distill.safetensors",
                ranks=context.ranks,
                progress=context.progress,
            )
    with context.progress.stage("measure"):
        clusters = measurer.measured(clusters)
    return recut(model, clusters, **options), figures


def _tuned_locally(
    context: BuildContext, clusters: ClusterSet, measurer: CutMeasurer
) -> tuple[ClusterSet, dict[str, Any]]:
    """The artifact with biases tuned layer by layer if that helps, and a record of it.

    The record: ``kept``; ``held_out_before`` and ``held_out_after``, KL(dense ‖ sparse) in nats per
    token of held-out windows, at equal prices; ``held_out_tokens``; ``tokens``.
    """
    config, text = context.config, measurer.text
    count = max(context.ranks.count, config.tune_tokens // context.windows.shape[1])
    order = torch.randperm(
        len(context.fit_windows), generator=torch.Generator().manual_seed(config.seed)
    )
    windows = context.fit_windows[order[:count].sort().values]
    file = context.work / "shifts.safetensors"
    cut = recut(context.model, clusters, budget=config.budget, verify=config.verify)
    ranks = context.ranks
    if not ranks.by_first(file.exists):
        shifts = tune_locally(
            context.model,
            cut,
            windows,
            buffers=context.buffers(),
            ranks=ranks,
            progress=context.progress,
        )
        tensors = {str(index): shift for index, shift in shifts.items()}
        ranks.by_first(lambda: write_tensors(file, tensors, {}))
    shifts = {int(index): shift for index, shift in load_file(file).items()}
    tuned = shifted(cut, shifts)
    assert clusters.measured is not None
    before = clusters.measured.cuts[0]
    after = measurer.cut(tuned, before.aim)
    counts = torch.bincount(text.domains, minlength=len(text.names))
    tokens = counts[counts > 0].tolist()
    losses = [
        sum(one * n for one, n in zip(cut.kl or (), tokens, strict=True)) / sum(tokens)
        for cut in (before, after)
    ]
    record = {
        "kept": losses[1] < losses[0],
        "held_out_before": losses[0],
        "held_out_after": losses[1],
        "held_out_tokens": text.windows.numel(),
        "tokens": windows.numel(),
    }
    return (tuned if record["kept"] else clusters), record


def _held_out_text(context: BuildContext) -> HeldOutText:
    dense_states, before = _dense_states(context), len(context.fit_windows)
    window = context.windows.shape[1]
    positions = {layer.index: position for position, layer in enumerate(context.layers)}

    def inputs(layer: FFNLayer, number: int) -> Tensor:
        start = (number + before) * window
        return context.states.layer(positions[layer.index], start, start + window)

    return HeldOutText(
        context.held_out_windows,
        context.held_out_domains,
        context.domain_names,
        lambda numbers: dense_states(numbers + before),
        inputs,
    )


def _loop_weights(context: BuildContext, cut: ClusterSet) -> dict[str, float]:
    file = context.work / "loop_weights.json"
    if not context.ranks.by_first(file.exists):
        count = max(1, LOOP_TOKENS // context.windows.shape[1])
        weights = loop_weights(
            context.model,
            cut,
            context.fit_windows[:count],
            dense_states=_dense_states(context),
            buffers=context.buffers(),
            ranks=context.ranks,
            progress=context.progress,
        )
        named = {str(index): weight for index, weight in weights.items()}
        context.ranks.by_first(lambda: write_json(file, named))
    saved: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return saved


def _dense_states(context: BuildContext) -> DenseStates:
    """Last hidden states [n, window, H] of captured windows, by their numbers."""
    states, window = context.states, context.windows.shape[1]

    def read(numbers: Tensor) -> Tensor:
        return torch.stack([states.final(n * window, (n + 1) * window) for n in numbers.tolist()])

    return read


def tune(
    model: Any,
    clusters: ClusterSet,
    cut: Callable[[ClusterSet], ClusterSet],
    windows: Tensor,
    held_out: Tensor,
    config: Distillation,
    *,
    dense_states: DenseStates | None = None,
    state_file: Path | None = None,
    ranks: Ranks | None = None,
    progress: ProgressReporter | None = None,
) -> tuple[ClusterSet, dict[str, Any]]:
    """Distill an artifact's compensation, and keep it only if held-out text is better off.

    Args:
        model, windows, held_out, config, dense_states, state_file, ranks, progress: as of
            :func:`distill`.
        clusters: with centroids, not tuned yet.
        cut: cuts an artifact for the budget to tune at.

    Returns:
        The artifact with the compensation, or as it was: the bytes of a correction are the neurons'
        again. And a record: ``kept``; ``held_out_before`` and ``held_out_after``, KL(dense ‖ sparse)
        in nats per token of held-out windows without and with the best compensation found;
        ``held_out_tokens``; ``best_step`` of ``steps``; ``divergence`` of each step's windows, and
        ``held_out`` divergence along the way, as pairs of step and value.
    """
    start, before = cut(reserved(clusters, config.rank)), None
    if config.rank:
        # A correction's bytes are neurons' without it.
        before = held_out_divergence(
            *(model, cut(clusters), held_out),
            dense_states=dense_states,
            first=len(windows),
            ranks=ranks,
        )
    found, history = distill(
        model,
        start,
        windows,
        held_out,
        config,
        dense_states=dense_states,
        state_file=state_file,
        ranks=ranks,
        progress=progress,
    )
    before = history.held_out[0] if before is None else before
    after = history.held_out[history.best_step]
    kept = after < before
    record = {
        "kept": kept,
        "held_out_before": before,
        "held_out_after": after,
        "held_out_tokens": held_out.numel(),
        "best_step": history.best_step,
        "steps": config.steps,
        "divergence": history.divergence,
        "held_out": [[step, value] for step, value in sorted(history.held_out.items())],
    }
    return (found if kept else clusters), record


def tuning_lines(record: Mapping[str, Any]) -> list[str]:
    """What tuning brought, a line each, from the record of a build."""
    return [
        _tuning_line(how, record[key])
        for key, how in (("local_tuning", "layer by layer"), ("tuning", "distillation"))
        if key in record
    ]


def _tuning_line(how: str, record: Mapping[str, Any]) -> str:
    before, after = record["held_out_before"], record["held_out_after"]
    what = f"KL to the dense model on {record['held_out_tokens']} held-out tokens"
    if "steps" in record:
        where = f"step {record['best_step']} of {record['steps']}"
    else:
        where = f"on {record['tokens']} tokens"
    if record["kept"]:
        return f"tuning, {how}: {what} {before:.4f} → {after:.4f} ({where})"
    return (
        f"tuning, {how}: not kept, as it did not help: {what} {before:.4f} without it, {after:.4f} at "
        f"best ({where})"
    )
