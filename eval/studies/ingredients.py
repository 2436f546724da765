"""What each ingredient of a build brings in the running model: alone, together, and left out.

One clustering and one router per layer and seed serve all rows; a row cuts, weighs and distills anew
what it has of these. All rows of a seed aim at the same cost share on held-out calibration text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from torch import Tensor

from sparse_runtime.api import sparse_modules, sparsify, unsparsify
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.recut import recut
from sparse_runtime.clusters.build import build_clusters
from sparse_runtime.clusters.build_checks import num_fit_tokens
from sparse_runtime.clusters.config import BuildConfig
from sparse_runtime.clusters.text import DataSource, calibration_windows
from sparse_runtime.clusters.tuning.distill import Distillation
from sparse_runtime.clusters.tuning.held_out import sparse_runs
from sparse_runtime.clusters.tuning.in_loop import LOOP_TOKENS, tune
from sparse_runtime.clusters.tuning.loop_weights import loop_weights, scaled
from sparse_runtime.eval.quality.artifact_quality import EVALUATION
from sparse_runtime.eval.quality.rows import Protocol, distance, reading
from sparse_runtime.ffn.counts import count_cost
from sparse_runtime.progress import ProgressReporter


@dataclass(frozen=True)
class Ingredients:
    """What is added to clusters of one cost share in every layer.

    Args:
        one_price: cut all layers at one price of a neuron.
        looks: leave neurons in between to a look.
        bias: add, for each cluster, the mean of what its set leaves out.
        loop_weights: weigh layers in the sparse model before they are cut; with ``one_price``.
        distill: tune shifts of the biases against the dense model's predictions; with ``bias``.
        correction: and a low-rank correction of each layer; with ``distill``.
    """

    one_price: bool = False
    looks: bool = False
    bias: bool = False
    loop_weights: bool = False
    distill: bool = False
    correction: bool = False


_ALL = Ingredients(True, True, True, True, True, True)
#: Name of a row -> what it has.
ROWS = {
    "none": Ingredients(),
    "bias": Ingredients(bias=True),
    "one price": Ingredients(one_price=True),
    "one price, loop weights": Ingredients(one_price=True, loop_weights=True),
    "looks": Ingredients(looks=True),
    "all": _ALL,
    "all but one price and loop weights": replace(_ALL, one_price=False, loop_weights=False),
    "all but loop weights": replace(_ALL, loop_weights=False),
    "all but looks": replace(_ALL, looks=False),
    "all but correction": replace(_ALL, correction=False),
    "all but distillation": replace(_ALL, distill=False, correction=False),
    "all but distillation and bias": replace(_ALL, bias=False, distill=False, correction=False),
}


def measure_ingredients(
    model: Any,
    tokenizer: Any,
    data: Sequence[DataSource],
    tokens: Tensor,
    *,
    config: BuildConfig,
    seeds: Sequence[int],
    step_tokens: int = 1024,
    progress: ProgressReporter | None = None,
) -> dict[str, Any]:
    """Build for each seed, and measure every row of ``ROWS``.

    Args:
        model: a dense causal language model; dense again when this returns.
        tokenizer: its tokenizer.
        data: calibration text.
        tokens: the text to judge on [n] int64.
        config: of the builds; budget, distillation steps and the correction's rank are those of the
            rows.
        seeds: of builds and distillation.
        step_tokens: tokens per distillation step.
        progress: reports on builds, steps and runs.

    Returns:
        ``runs``: ``seed`` and ``rows`` of ``name``, ``cost_share`` and ``bits_per_weight`` on the text
        as of bfloat16 weights, and the ``distance`` from the dense model
        (``sparse_runtime.eval.quality.rows``). ``rows``: means over the seeds of all but the
        intervals, with the ``least`` and the ``most`` ratio.

    Raises:
        ConfigError: settings that cannot work together, or a budget that cannot be met.
        DataError: a source that cannot be read, or too little text.
    """
    protocol = Protocol(config.window, progress=progress)
    dense = protocol.score(model, tokens, "dense")
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        base = _Base.of_seed(
            model, tokenizer, data, replace(config, seed=seed), step_tokens, progress
        )
        rows = []
        for name, parts in ROWS.items():
            sparsify(model, base.with_ingredients(parts), config=EVALUATION)
            try:
                sparse = protocol.score(model, tokens, name, reference=dense)
                cost_share = count_cost(sparse_modules(model), element_size=2).cost_share
            finally:
                unsparsify(model)
            rows.append({"name": name, **reading(cost_share), **distance(sparse, dense)})
        runs.append({"seed": seed, "rows": rows})
    return {"runs": runs, "rows": _means([run["rows"] for run in runs])}


@dataclass
class _Base:
    """One seed's clusters, neither weighed nor distilled, and the text to do both on."""

    model: Any
    clusters: ClusterSet
    fit_windows: Tensor
    held_out_windows: Tensor
    distillation: Distillation
    progress: ProgressReporter | None
    _weights: dict[tuple[bool, bool], dict[int, float]] = field(default_factory=dict)

    @classmethod
    def of_seed(
        cls,
        model: Any,
        tokenizer: Any,
        data: Sequence[DataSource],
        config: BuildConfig,
        step_tokens: int,
        progress: ProgressReporter | None,
    ) -> _Base:
        bare = replace(config, loop_weights=False, tune_tokens=0, distill=0, correction_rank=None)
        clusters = build_clusters(model, tokenizer, data, bare, progress=progress)
        text = calibration_windows(
            data,
            tokenizer,
            max_tokens=config.max_tokens,
            window=config.window,
            seed=config.seed,
            model=model,
        )
        fit, held_out = text.windows.tensor_split([num_fit_tokens(text, config) // config.window])
        settings = config.resolved()
        distillation = Distillation(
            settings.distill, settings.correction_rank, step_tokens, seed=config.seed
        )
        return cls(model, replace(clusters, measured=None), fit, held_out, distillation, progress)

    def with_ingredients(self, parts: Ingredients) -> ClusterSet:
        """An artifact with some ingredients, cut to read its budget on held-out text."""
        budget, clusters = self.clusters.budget, self.clusters

        def cut(clusters: ClusterSet, budget: float) -> ClusterSet:
            options: dict[str, Any] = {"budget": budget}
            if not parts.one_price:
                options = {"layer_budgets": dict.fromkeys(clusters.layers, budget)}
            return recut(self.model, clusters, verify=parts.looks, **options)

        count = max(1, LOOP_TOKENS // self.fit_windows.shape[1])
        if not parts.bias:
            layers = {i: replace(one, cluster_bias=None) for i, one in clusters.layers.items()}
            clusters = replace(clusters, layers=layers)
        if parts.loop_weights:
            key = parts.looks, parts.bias
            if key not in self._weights:
                self._weights[key] = loop_weights(
                    self.model,
                    cut(clusters, budget),
                    self.fit_windows[:count],
                    progress=self.progress,
                )
            clusters = scaled(clusters, self._weights[key])
        if parts.distill:
            settings = self.distillation
            settings = replace(settings, rank=settings.rank if parts.correction else 0)
            clusters, _ = tune(
                self.model,
                clusters,
                lambda uncut: cut(uncut, budget),
                self.fit_windows,
                self.held_out_windows[:count],
                settings,
                progress=self.progress,
            )
        windows = self.held_out_windows[:count]
        share = fmean(share for share, _ in sparse_runs(self.model, cut(clusters, budget), windows))
        return cut(clusters, 2 * budget - share)


def _means(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    means = []
    for same in zip(*runs, strict=True):
        ratios = [row["ratio"] for row in same]
        means.append(
            {
                "name": same[0]["name"],
                **{
                    key: sum(row[key] for row in same) / len(same)
                    for key in ("cost_share", "bits_per_weight", "kl", "top1", "ratio")
                },
                "least": min(ratios),
                "most": max(ratios),
            }
        )
    return means
