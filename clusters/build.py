"""``build_clusters``: from a model and text to an artifact.

text → windows → hidden states of every layer (one pass, on disk) → per layer: importance, clusters,
router → the cut in the loop → ClusterSet. Each stage's result stays in the working folder
``OUTPUT/.build`` until the artifact is written, so an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.folders import check_output_folder
from sparse_runtime.artifact.format import WORK_FOLDER
from sparse_runtime.clusters.awc import Clustering
from sparse_runtime.clusters.buffers import Buffers
from sparse_runtime.clusters.build_checks import (
    check_in_memory,
    check_ranks,
    num_fit_tokens,
    settings_for,
)
from sparse_runtime.clusters.capture import capture_hidden_states
from sparse_runtime.clusters.config import BuildConfig, BuildSettings
from sparse_runtime.clusters.context import BuildContext
from sparse_runtime.clusters.estimate import BuildEstimate
from sparse_runtime.clusters.fisher import LayerFisher, NoBackwardPassError, fisher_weights
from sparse_runtime.clusters.layer_build import (
    FittedLayer,
    cluster_weights,
    fit_layer,
    fit_paper_clusters,
    held_out_scores,
    load_fitted,
    save_fitted,
    uncut_layer,
)
from sparse_runtime.clusters.layer_data import packed_patterns, set_size_for
from sparse_runtime.clusters.packed_output import PackedOutput
from sparse_runtime.clusters.paper.binary_patterns import PackedPatterns
from sparse_runtime.clusters.plane_layers import base_error, packed
from sparse_runtime.clusters.ranks import Ranks, in_order
from sparse_runtime.clusters.router_choice import choose_router, router_candidates
from sparse_runtime.clusters.seeding import layer_generator
from sparse_runtime.clusters.stages import Stages
from sparse_runtime.clusters.text import (
    CalibrationText,
    DataSource,
    calibration_windows,
    expand_recipes,
)
from sparse_runtime.clusters.tuning.in_loop import cut_in_loop
from sparse_runtime.clusters.tuning.masks import kept_looks
from sparse_runtime.errors import ConfigError
from sparse_runtime.files import write_json, write_tensors
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.fingerprint import model_fingerprint
from sparse_runtime.models.onloading import is_offloaded
from sparse_runtime.predictors.training import route
from sparse_runtime.progress import ProgressReporter, TqdmProgress
from sparse_runtime.version import __version__

# In the working folder: text that was sampled from the model, which knows itself what it is.
_SAMPLED = "sampled.safetensors"


def build_clusters(
    model: Any,
    tokenizer: Any,
    data: Sequence[str | DataSource] = ("general",),
    config: BuildConfig | None = None,
    *,
    output: str | Path | None = None,
    packed_output: str | Path | None = None,
    model_name: str = "",
    progress: ProgressReporter | None = None,
    times: dict[str, float] | None = None,
    estimate: BuildEstimate | None = None,
) -> ClusterSet:
    """Build clusters and routers for a model from calibration text.

    Equal settings, text, weights, dtype and number of threads give an equal artifact, byte for byte.

    Args:
        model: a dense causal language model (docs/models.md lists the types whose FFNs are found).
        tokenizer: its tokenizer.
        data: text sources, as on the command line (``"notes.txt"``, ``"c4,weight=0.5"``), or the recipe
            ``"general"``.
        config: settings.
        output: folder to write the artifact to; without it nothing is kept on disk, and an
            interrupted build starts over.
        packed_output: new folder for the model as it was packed, with its tokenizer: what the artifact
            fits best, as ``sparsify(weights=…)`` rounds without calibration text. Only with
            ``weights``.
        model_name: recorded in the artifact.
        progress: draws bars; transformers' own if None.
        times: filled with the seconds that each stage took here; they are no part of the artifact.
        estimate: what these were expected to be, for a bar over the whole build.

    Returns:
        The artifact, written to ``output`` already if that was given.

    Raises:
        ConfigError: settings that cannot work together.
        DataError: a source that cannot be read, or too little text.
        ModelError: the model's weights are offloaded, or it computes infinities or NaN.
        OutputFolderError: ``output`` holds something else, or could not be written.
        UnsupportedArchitectureError, NothingMatchedError: see ``find_ffn_layers``.
    """
    settings = settings_for(model, config)
    if output is not None:
        check_output_folder(Path(output))
    if packed_output is not None and settings.weights is None:
        raise ConfigError(
            f"packed_output is {str(packed_output)!r}, but the build is for float weights; give "
            "weights as well, or leave packed_output out"
        )
    layers = find_ffn_layers(model)
    if settings.distill:
        check_in_memory(layers)
    router_candidates(layers, settings)  # raises where the budget leaves nothing beside a router
    ranks = Ranks.current()
    stages = Stages(
        progress or TqdmProgress(),
        {} if times is None else times,
        {} if estimate is None else {stage.name: stage.seconds for stage in estimate.stages},
    )
    # Whatever the caller's mode is.
    with torch.inference_mode(False), torch.enable_grad(), stages.all():
        with stages.stage("text"):
            text = ranks.by_first(
                lambda: _calibration_text(model, tokenizer, data, settings, output, stages)
            )
        num_fit = num_fit_tokens(text, settings)
        check_ranks(ranks, text, settings)
        build = _Build(model, layers, text, num_fit, settings, model_name, stages, ranks)
        if packed_output is not None:
            build.packed_output = PackedOutput(tokenizer, Path(packed_output))
        if output is not None:
            return _built_into(Path(output), build)
        with TemporaryDirectory() as work:
            clusters = build.run(Path(ranks.by_first(lambda: work)))
            ranks.wait()
            return clusters


def _calibration_text(
    model: Any,
    tokenizer: Any,
    data: Sequence[str | DataSource],
    settings: BuildSettings,
    output: str | Path | None,
    progress: ProgressReporter,
) -> CalibrationText:
    return calibration_windows(
        expand_recipes(data, sampled=not is_offloaded(model)).sources,
        tokenizer,
        max_tokens=settings.max_tokens,
        window=settings.window,
        split="train",
        seed=settings.seed,
        model=model,
        keep=None if output is None else Path(output) / WORK_FOLDER / _SAMPLED,
        progress=progress,
    )


def _built_into(folder: Path, build: _Build) -> ClusterSet:
    """Build, and write the artifact to a folder; what has been worked out stays there until then."""
    work = folder / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    clusters = build.run(work)

    def save() -> None:
        # What has been worked out goes last: saving may fail, for lack of room say.
        clusters.save_pretrained(folder, centroids=build.settings.save_centroids)
        shutil.rmtree(work)

    build.ranks.wait()
    build.ranks.by_first(save)
    return clusters


@dataclass
class _Build:
    """One build's inputs, and the stages that turn them into an artifact."""

    model: Any
    layers: list[FFNLayer]
    text: CalibrationText
    num_fit: int
    settings: BuildSettings
    model_name: str
    progress: Stages
    ranks: Ranks
    packed_output: PackedOutput | None = None

    def run(self, work: Path) -> ClusterSet:
        """All stages; what they find stays in ``work``."""
        fingerprint = model_fingerprint(self.model)
        record: dict[str, Any] = {"model": self.model_name, "data": self.text.record}
        computed_in = sorted({str(parameter.dtype) for parameter in self.model.parameters()})
        key = {
            "fingerprint": fingerprint,
            "config": self.settings.record(),
            "computed_in": computed_in,
            "library_version": __version__,
            **record,
        }
        self.ranks.by_first(lambda: _claim(work, key))
        if self.packed_output is not None:
            output = self.packed_output
            self.ranks.by_first(lambda: output.check(work))
        with self.progress.stage("capture"):
            states = capture_hidden_states(
                self.model,
                self.text.windows,
                work / "states",
                fingerprint=fingerprint,
                memory_mib=self.settings.memory_mib,
                ranks=self.ranks,
                progress=self.progress,
            )
        with self.progress.stage("fisher"):
            fisher, settings, fallback = self._fisher(work)
        record |= {"config": settings.record(), **fallback}
        # Layers fitted with and without Fisher weights never mix.
        own = work / settings.importance
        own.mkdir(exist_ok=True)
        context = BuildContext(
            self.model,
            self.text.windows,
            states,
            self.layers,
            fisher,
            settings,
            self.num_fit,
            own,
            self.progress,
            self.text.domains,
            self.text.names,
            ranks=self.ranks,
        )
        if settings.weights is None:
            return self._fit(context, fingerprint, record)
        with ExitStack() as stack:
            with self.progress.stage("pack"):
                fit_windows = context.fit_windows
                stack.enter_context(
                    packed(self.model, fit_windows, settings.weights, self.progress)
                )
                context = _of_packed(context)
            clusters = self._fit(context, fingerprint, record)
            if self.packed_output is not None and self.ranks.first:
                self.packed_output.save(self.model, work)
            return clusters

    def _fit(
        self, context: BuildContext, fingerprint: dict[str, Any], record: dict[str, Any]
    ) -> ClusterSet:
        """The stages after the capture."""
        settings = context.config
        with self.progress.stage("router choice"):
            rank = choose_router(context)
        with self.progress.stage("layers"):
            fitted = _fit_layers(context, rank)
        uncut = {}
        for position, one in enumerate(fitted):
            with context.weights_of(position) as layer:
                error, weights = (
                    context.base_error(position),
                    _cluster_weights(context, position, one),
                )
                uncut[layer.index] = uncut_layer(layer, settings, one, error, weights)
        clusters = ClusterSet(uncut, fingerprint, settings.budget)
        if settings.allocation == "global":
            with kept_looks(context.work / "looks"):
                clusters, figures_in_loop = cut_in_loop(context, clusters)
            record |= figures_in_loop
        with self.progress.stage("scores"):
            _score_layers(context, clusters, fitted)
        if not settings.save_centroids:
            for layer_clusters in clusters.layers.values():
                layer_clusters.centroids = None
        figures = [layer.figures for layer in fitted]
        clusters.build = {**record, "router_rank": rank, "layers": figures}
        return clusters

    def _fisher(self, work: Path) -> tuple[list[LayerFisher] | None, BuildSettings, dict[str, str]]:
        """Fisher information, the settings that the build goes on with, and why, if they are others."""
        settings = self.settings
        if settings.fisher_tokens is None:
            return None, settings, {}
        file = work / "fisher.safetensors"
        if not self.ranks.by_first(file.exists):
            windows = self.text.windows
            count = max(1, min(self.num_fit, settings.fisher_tokens) // windows.shape[1])
            try:
                buffers = Buffers(settings.memory_mib, work / f"sweep_{self.ranks.rank}")
                found = fisher_weights(
                    self.model,
                    windows[:count],
                    buffers=buffers,
                    ranks=self.ranks,
                    progress=self.progress,
                )
            except NoBackwardPassError as error:
                warnings.warn(
                    f"importance 'fisher' falls back to 'norm', and layers are not weighed and "
                    f"nothing is distilled, which costs quality: {error}. Give the model more "
                    "memory, or choose importance='norm', loop_weights=False and distill=0 to "
                    "silence this",
                    stacklevel=4,
                )
                return None, settings.without_backward(), {"fallback": str(error)}
            parts = [(f"{i}.", vars(layer)) for i, layer in enumerate(found)]
            tensors = {p + name: t for p, own in parts for name, t in own.items()}
            self.ranks.by_first(lambda: write_tensors(file, tensors, {}))
        saved = load_file(file)
        layers = [
            LayerFisher(saved[f"{i}.neurons"], saved[f"{i}.tokens"])
            for i in range(len(self.layers))
        ]
        return layers, settings, {}


def _of_packed(context: BuildContext) -> BuildContext:
    """The same build by a model that has been packed."""
    layers = find_ffn_layers(context.model, packed=True)
    errors = [
        base_error(
            layer,
            context.states.layer(position, context.num_fit, dtype=torch.bfloat16),
            context.fisher_of(position),
        )
        for position, layer in enumerate(layers)
    ]
    return replace(context, layers=layers, base_errors=errors)


def _fit_layers(context: BuildContext, rank: int | None) -> list[FittedLayer]:
    """Clusters and router of every layer, those of an interrupted build out of its files."""
    pooled = _pooled_clusters(context, rank)
    files = [context.work / f"layer_{layer.index}.safetensors" for layer in context.layers]
    mine = context.ranks.mine(range(len(files)))

    def fit() -> None:
        for position in mine:
            layer = context.layers[position]
            if not files[position].exists():
                with context.layer(position) as data:
                    one = fit_layer(
                        data,
                        layer,
                        context.config,
                        rank,
                        context.fisher_of(position),
                        layer_generator(context.config.seed, layer.index),
                        pooled,
                    )
                save_fitted(files[position], one)
            advance(1)

    with context.progress.task("layers", len(mine)) as advance:
        context.ranks.together(fit)
    return [*map(load_fitted, files)]


def _cluster_weights(context: BuildContext, position: int, fitted: FittedLayer) -> Tensor | None:
    """What the tokens of a layer's clusters count; None without Fisher information."""
    if context.fisher is None:
        return None
    gradients = context.fisher[position].tokens
    states = context.states.layer(position, 0, len(gradients))
    return cluster_weights(route(fitted.router, states), gradients, len(fitted.sets))


def _score_layers(
    context: BuildContext, clusters: ClusterSet, fitted: Sequence[FittedLayer]
) -> None:
    """Add to each layer's figures how its final sets fit held-out tokens."""
    mine = context.ranks.mine(range(len(fitted)))

    def scores() -> list[dict[str, float]]:
        found = []
        for position in mine:
            held_out = context.states.layer(position, context.num_fit, dtype=torch.bfloat16)
            with context.weights_of(position) as layer:
                own, router = clusters.layers[layer.index], fitted[position].router
                found.append(held_out_scores(held_out, layer, own, router))
            advance(1)
        return found

    with context.progress.task("scores", len(mine)) as advance:
        parts = context.ranks.together(scores)
    for one, found in zip(fitted, in_order(parts), strict=True):
        one.figures["held_out"] = found


def _claim(work: Path, key: dict[str, Any]) -> None:
    """Keep a working folder of the same build, empty that of any other but for sampled text."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    key_file = work / "key.json"
    if key_file.exists() and json.loads(key_file.read_text(encoding="utf-8")) == digest:
        return
    for entry in work.iterdir():
        if entry.name == _SAMPLED:
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    write_json(key_file, digest)


def _pooled_clusters(context: BuildContext, rank: int | None) -> Clustering | None:
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
