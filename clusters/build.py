"""``build_clusters``: from a model and text to an artifact.

text → windows → hidden states of every layer (one pass, on disk) → per layer: importance, clusters,
router → ClusterSet. Each stage's result stays in the working folder ``OUTPUT/.build`` until the
artifact is written, so an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparse_runtime.api import sparse_modules, sparsify, unsparsify
from sparse_runtime.architectures import FFNLayer, find_ffn_layers
from sparse_runtime.atomic import write_json, write_tensors
from sparse_runtime.cluster_set import WORK_FOLDER, ClusterSet, check_output_folder
from sparse_runtime.clusters.awc import Clustering, top_sets
from sparse_runtime.clusters.binary_patterns import PackedPatterns
from sparse_runtime.clusters.capture import HiddenStates, capture_hidden_states
from sparse_runtime.clusters.config import BuildConfig
from sparse_runtime.clusters.data import (
    CalibrationText,
    DataSource,
    calibration_windows,
    parse_source,
)
from sparse_runtime.clusters.tuning.distill import Distillation, distill, reserved
from sparse_runtime.clusters.fisher import fisher_weights
from sparse_runtime.clusters.importance import importance_scorer
from sparse_runtime.clusters.layer_build import (
    FittedLayer,
    LayerData,
    estimated_loss,
    fit_clusters,
    fit_layer,
    fit_paper_clusters,
    follow_router,
    held_out_scores,
    layer_cost,
    load_fitted,
    load_layer,
    packed_patterns,
    priced_loss,
    save_fitted,
    set_size_for,
    uncut_layer,
)
from sparse_runtime.clusters.tuning.loop_weights import loop_weights, scaled
from sparse_runtime.clusters.seeding import layer_generator
from sparse_runtime.cost import count_cost
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.fingerprint import model_fingerprint
from sparse_runtime.progress import ProgressReporter, SilentProgress
from sparse_runtime.recut import price_for, recut

#: Routers that ``router="auto"`` compares: ranks, and None for the linear one.
ROUTER_CANDIDATES: tuple[int | None, ...] = (None, 128, 64, 32, 16)

#: Tokens that layers are weighed on, and that tell what a cut reads in the sparse model.
LOOP_TOKENS = 4096
# Tokens that routers are compared on.
_PROBE_TOKENS = 16_384
# Bound on what is found in the loop to be read beyond the budget.
_MOST_EXCESS = 0.05


def build_clusters(
    model: Any,
    tokenizer: Any,
    data: Sequence[str | DataSource],
    config: BuildConfig | None = None,
    *,
    output: str | Path | None = None,
    model_name: str = "",
    progress: ProgressReporter | None = None,
) -> ClusterSet:
    """Build clusters and routers for a model from calibration text.

    Args:
        model: a dense causal language model whose type is in the architecture table.
        tokenizer: its tokenizer.
        data: text sources, as on the command line (``"notes.txt"``, ``"c4,weight=0.5"``).
        config: settings.
        output: folder to write the artifact to; without it nothing is kept on disk, and an
            interrupted build starts over.
        model_name: recorded in the artifact.
        progress: draws bars.

    Returns:
        The artifact, written to ``output`` already if that was given.

    Raises:
        ConfigError: settings that cannot work together.
        DataError: a source that cannot be read, or too little text.
        OutputFolderError: ``output`` holds something else, or could not be written.
        UnsupportedArchitectureError, NothingMatchedError: see ``find_ffn_layers``.
    """
    config = config or BuildConfig()
    progress = progress or SilentProgress()
    layers = find_ffn_layers(model)
    text = calibration_windows(
        [parse_source(source) if isinstance(source, str) else source for source in data],
        tokenizer,
        max_tokens=config.max_tokens,
        window=config.window,
        split="train",
        seed=config.seed,
        model=model,
    )
    num_fit = num_fit_tokens(text, config)
    build = {"model": model_name, "config": config.record(), "data": text.record}
    if output is None:
        with TemporaryDirectory() as work:
            return _build(model, layers, text, num_fit, config, build, Path(work), progress)
    folder = Path(output)
    check_output_folder(folder)
    work_folder = folder / WORK_FOLDER
    work_folder.mkdir(parents=True, exist_ok=True)
    clusters = _build(model, layers, text, num_fit, config, build, work_folder, progress)
    clusters.save_pretrained(folder)
    shutil.rmtree(work_folder)
    return clusters


def num_fit_tokens(text: CalibrationText, config: BuildConfig) -> int:
    """Tokens of the windows that are fitted on; the windows after them are held out."""
    num_windows, window = text.windows.shape
    held_out = max(1, round(num_windows * config.held_out_share))
    if num_windows < 2:
        raise DataError(
            f"the calibration text gives {num_windows} window of {window} tokens; expected 2 or "
            "more, as one is held out. Give more text, raise max_tokens or lower the window"
        )
    num_fit = (num_windows - held_out) * window
    if config.num_clusters > num_fit:
        raise DataError(
            f"{config.num_clusters} clusters were asked for, but only {num_fit} calibration tokens "
            f"are there to fit them ({held_out * window} more are held out); give more text, raise "
            "max_tokens or lower the number of clusters"
        )
    return num_fit


def _build(
    model: Any,
    layers: list[FFNLayer],
    text: CalibrationText,
    num_fit: int,
    config: BuildConfig,
    build: dict[str, Any],
    work: Path,
    progress: ProgressReporter,
) -> ClusterSet:
    fingerprint = model_fingerprint(model)
    _claim(work, {"fingerprint": fingerprint, **build})
    started = time.perf_counter()
    states = capture_hidden_states(
        model,
        text.windows,
        work / "states",
        memory_mib=config.memory_mib,
        progress=progress,
    )
    seconds = {"capture": time.perf_counter() - started}
    fisher = _fisher(model, text.windows, num_fit, config, work, progress)
    seconds["fisher"] = time.perf_counter() - started - seconds["capture"]
    context = _Context(model, states, layers, fisher, config, num_fit, work, progress)
    rank = _choose_router(context)
    pooled = _pooled_clusters(context, rank)
    fitted = []
    with progress.task("layers", len(layers)) as advance:
        for position, layer in enumerate(layers):
            file = work / f"layer_{layer.index}.safetensors"
            if not file.exists():
                with context.layer(position) as data:
                    generator = layer_generator(config.seed, layer.index)
                    weights = context.fisher_of(position)
                    save_fitted(
                        file, fit_layer(data, layer, config, rank, weights, generator, pooled)
                    )
            fitted.append(load_fitted(file))
            advance(1)
    clusters = ClusterSet(
        layers={
            layer.index: uncut_layer(layer, config, one)
            for layer, one in zip(layers, fitted, strict=True)
        },
        fingerprint=fingerprint,
        budget=config.budget,
    )
    if config.cuts:
        clusters, figures_in_loop = _cut_in_loop(context, text.windows, clusters, seconds)
        build = {**build, **figures_in_loop}
    with progress.task("scores", len(layers)) as advance:
        for position, layer in enumerate(layers):
            held_out = states.layer(position, num_fit)
            fitted[position].figures["held_out"] = held_out_scores(
                held_out, layer, clusters.layers[layer.index], fitted[position].router
            )
            advance(1)
    if not config.save_centroids:
        for layer_clusters in clusters.layers.values():
            layer_clusters.centroids = None
    figures = [layer.figures for layer in fitted]
    for stage in ("clustering", "router"):
        seconds[stage] = sum(entry["seconds"][stage] for entry in figures)
    clusters.build = {**build, "router_rank": rank, "seconds": seconds, "layers": figures}
    return clusters


def _cut_in_loop(
    context: _Context,
    windows: Tensor,
    clusters: ClusterSet,
    seconds: dict[str, float],
) -> tuple[ClusterSet, dict[str, Any]]:
    """Cut the sets with the whole sparse model in view.

    Layers are weighed, the compensation distilled, and the cost share checked on held-out text.
    """
    model, config = context.model, context.config
    work, progress = context.work, context.progress
    windows, held_out = windows.tensor_split([context.num_fit // windows.shape[1]])
    count = max(1, LOOP_TOKENS // windows.shape[1])
    figures: dict[str, Any] = {}
    options: dict[str, Any] = {"budget": config.budget, "verify": config.verify}
    dense_states = partial(_dense_states, context.states, windows.shape[1])
    differentiable = context.fisher is not None or not config.needs_fisher
    if config.loop_weights and differentiable:
        started = time.perf_counter()
        file = work / "loop_weights.json"
        if not file.exists():
            cut = recut(model, clusters, **options)
            weights = loop_weights(
                model, cut, windows[:count], dense_states=dense_states, progress=progress
            )
            write_json(file, {str(index): weight for index, weight in weights.items()})
        saved = json.loads(file.read_text(encoding="utf-8"))
        figures["loop_weights"] = saved
        clusters = scaled(clusters, {int(index): weight for index, weight in saved.items()})
        seconds["loop_weights"] = time.perf_counter() - started
    if config.distills and differentiable:
        started = time.perf_counter()
        settings = Distillation(config.distill, config.correction_rank, seed=config.seed)
        cut = recut(model, reserved(clusters, settings.rank), **options)
        clusters, figures["divergence"] = distill(
            model,
            cut,
            windows,
            settings,
            dense_states=dense_states,
            state_file=work / "distill.safetensors",
            progress=progress,
        )
        seconds["distill"] = time.perf_counter() - started
    share = cost_share_in_loop(model, recut(model, clusters, **options), held_out[:count])
    clusters = replace(
        clusters, excess=min(max(share - config.budget, -_MOST_EXCESS), _MOST_EXCESS)
    )
    return recut(model, clusters, **options), figures


def _dense_states(states: HiddenStates, window: int, numbers: Tensor) -> Tensor:
    """Last hidden states [n, window, H] of captured windows."""
    return torch.stack([states.final(n * window, (n + 1) * window) for n in numbers.tolist()])


def cost_share_in_loop(model: Any, clusters: ClusterSet, windows: Tensor) -> float:
    """Cost share of text with every token sparse, as of bfloat16 weights.

    Args:
        model: a dense causal language model; dense again when this returns.
        clusters: cut for a budget.
        windows: token ids [W, window] int64 that nothing was fitted on.
    """
    sparsify(model, clusters, backend="reference", prefill="sparse")
    try:
        decoder = model.get_decoder()
        with torch.inference_mode():
            for window in windows.split(1):
                decoder(input_ids=window.to(model.device), use_cache=False)
        return count_cost(sparse_modules(model), element_size=2).cost_share
    finally:
        unsparsify(model)


@dataclass(frozen=True)
class _Context:
    """What the stages after the capture share."""

    model: Any
    states: HiddenStates
    layers: list[FFNLayer]
    fisher: list[Tensor] | None
    config: BuildConfig
    num_fit: int
    work: Path
    progress: ProgressReporter

    def fisher_of(self, position: int) -> Tensor | None:
        """Fisher weights of a layer [I], if the build has them."""
        return None if self.fisher is None else self.fisher[position]

    @contextmanager
    def layer(self, position: int) -> Iterator[LayerData]:
        """A layer's tokens, freed when the context ends."""
        data, matrix = load_layer(
            self.states,
            position,
            self.layers[position],
            self.config,
            num_fit=self.num_fit,
            work=self.work,
            fisher=self.fisher_of(position),
        )
        try:
            yield data
        finally:
            matrix.close()
            data.free()  # callers keep the name while the next layer loads


def _fisher(
    model: Any,
    windows: Tensor,
    num_fit: int,
    config: BuildConfig,
    work: Path,
    progress: ProgressReporter,
) -> list[Tensor] | None:
    if not config.needs_fisher:
        return None
    file = work / "fisher.safetensors"
    if not file.exists():
        window = windows.shape[1]
        count = max(1, min(num_fit, config.fisher_tokens) // window)
        try:
            weights = fisher_weights(model, windows[:count], progress=progress)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(
                f"importance 'fisher' falls back to 'norm', and layers are not weighed and nothing is "
                f"distilled, which costs quality: the backward pass over the model cannot run here "
                f"({reason}). Give the model more memory, or choose importance='norm', "
                "loop_weights=False and distill=0 to silence this",
                stacklevel=2,
            )
            return None
        write_tensors(file, {str(i): tensor for i, tensor in enumerate(weights)}, {})
    saved = load_file(file)
    return [saved[str(position)] for position in range(len(saved))]


def _claim(work: Path, key: dict[str, Any]) -> None:
    """Keep a working folder of the same build, empty that of any other."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    key_file = work / "key.json"
    if key_file.exists() and json.loads(key_file.read_text(encoding="utf-8")) == digest:
        return
    for entry in work.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    write_json(key_file, digest)


def _choose_router(context: _Context) -> int | None:
    """Rank of the router (None: linear) that loses least for its bytes, on three layers.

    Judged by the estimated loss, not by the coverage that the router is trained on: that forgives
    what perplexity does not (docs/LOG.md).
    """
    config, layers = context.config, context.layers
    if config.router != "auto":
        return None if config.router == "linear" else int(config.router)
    file = context.work / "router.json"
    if file.exists():
        rank: int | None = json.loads(file.read_text(encoding="utf-8"))
        return rank
    candidates = [rank for rank in ROUTER_CANDIDATES if _fits(layers[0], config, rank)]
    if not candidates:
        set_size_for(layers[0], config, ROUTER_CANDIDATES[-1])  # raises, with the figures
    probes = sorted({0, len(layers) // 4, 3 * len(layers) // 4})
    fits: dict[tuple[int, int | None], FittedLayer] = {}
    held_out: dict[int, Tensor] = {}
    with context.progress.task("choose router", len(probes) * len(candidates)) as advance:
        for position in probes:
            layer, fisher = layers[position], context.fisher_of(position)
            with context.layer(position) as whole:
                data = whole.at_most(_PROBE_TOKENS)
            # One clustering for all candidates; the sets' size follows the router's.
            generator = layer_generator(config.seed, layer.index)
            size = set_size_for(layer, config, candidates[0])
            clustering = fit_clusters(data, config, size, generator)
            for rank in candidates:
                size = set_size_for(layer, config, rank)
                start = replace(clustering, active_sets=top_sets(clustering.centroids, size))
                fits[position, rank] = follow_router(
                    data, layer, start, config, rank, fisher, generator
                )
                advance(1)
            held_out[position] = data.hidden_states[data.held_out]
    loss = dict.fromkeys(candidates, 0.0)
    price = _probe_price(context, {p: fits[p, candidates[0]] for p in probes})
    for (position, rank), fitted in fits.items():
        layer, states = layers[position], held_out[position]
        if price is None:
            scorer = importance_scorer(layer, context.fisher_of(position))
            loss[rank] += estimated_loss(states, scorer, fitted.router, fitted.sets)
        else:
            cost = replace(layer_cost(layer, config, rank), verified=config.verify)
            loss[rank] += priced_loss(states, fitted, layer, cost, price)
    best = min(candidates, key=lambda rank: loss[rank])
    write_json(file, best)
    return best


def _probe_price(context: _Context, fits: dict[int, FittedLayer]) -> float | None:
    """Price of a neuron by a few layers, given by position; None where sets are not cut at one."""
    config, layers = context.config, context.layers
    if not config.cuts:
        return None
    uncut = {layers[p].index: uncut_layer(layers[p], config, fitted) for p, fitted in fits.items()}
    clusters = ClusterSet(uncut, {}, config.budget)
    return price_for(context.model, clusters, config.budget, verify=config.verify)


def _fits(layer: FFNLayer, config: BuildConfig, rank: int | None) -> bool:
    try:
        set_size_for(layer, config, rank)
    except ConfigError:
        return False
    return rank is None or rank < min(layer.hidden_size, config.num_clusters)


def _pooled_clusters(context: _Context, rank: int | None) -> Clustering | None:
    """The paper's one table for all layers, fitted on the patterns of all; None if not pooled."""
    config, layers = context.config, context.layers
    if not (config.method == "awc-paper" and config.paper_pooled):
        return None
    parts = []
    with context.progress.task("patterns", len(layers)) as advance:
        for position in range(len(layers)):
            with context.layer(position) as data:
                parts.append(packed_patterns(data.importance[data.fit]))
            advance(1)
    density = set_size_for(layers[0], config, rank) / layers[0].intermediate_size
    # One stream beyond those of the layers.
    generator = layer_generator(config.seed, len(layers))
    return fit_paper_clusters(PackedPatterns.concat(parts), config, density, generator)
