"""Quality over budgets: an artifact cut for each of them, beside other methods at the same cost.

The dense model runs once for each text, and every row is one sparse run compared with it. All methods
see the same windows and prompts, and their cost shares are counted on the text they are judged on, for
bfloat16 weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sparse_runtime.api import reset_cost, sparse_modules, sparsify, unsparsify
from sparse_runtime.artifact.build_record import recorded_sources, within
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.recut import recut
from sparse_runtime.clusters.capture import HiddenStates
from sparse_runtime.clusters.text import (
    CalibrationText,
    DataSource,
    calibration_windows,
    parse_source,
    recorded_source,
)
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.eval.baselines.masked_ffn import (
    Baseline,
    CostMeter,
    Masks,
    PromptMasks,
    masked_ffns,
)
from sparse_runtime.eval.baselines.registry import captured_states, fit_baseline, named_baselines
from sparse_runtime.eval.quality.artifact_quality import EVALUATION
from sparse_runtime.eval.quality.bootstrap import ratio_interval
from sparse_runtime.eval.quality.forwards import dense_prompts
from sparse_runtime.eval.quality.perplexity import TextScore, score_text
from sparse_runtime.ffn.counts import count_cost, read_counts
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.models.ffn_layers import FFNLayer, find_ffn_layers
from sparse_runtime.progress import ProgressReporter

DEFAULT_CALIBRATION = "wikitext2"


@dataclass(frozen=True)
class Protocol:
    """How texts are run.

    Args:
        window: tokens per window.
        stride: distance of window starts; ``window`` if None.
        prompt_tokens: tokens at the start of each window that run dense and are not scored.
        progress: reports one unit per window of each run, and per layer of a fit.
    """

    window: int = 512
    stride: int | None = None
    prompt_tokens: int = 0
    progress: ProgressReporter | None = None

    def score(
        self,
        model: nn.Module,
        tokens: Tensor,
        description: str,
        *,
        reference: TextScore | None = None,
    ) -> TextScore:
        """Score a text beside a reference, or as one; see :func:`score_text`."""
        return score_text(
            model,
            tokens,
            window=self.window,
            stride=self.stride,
            prompt_tokens=self.prompt_tokens,
            reference=reference,
            keep=reference is None,
            progress=self.progress,
            description=description,
        )


@dataclass
class _Curve:
    """The rows of one text."""

    name: str
    tokens: Tensor
    dense: TextScore
    rows: list[dict[str, Any]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return {
            "data": self.name,
            "tokens": len(self.tokens),
            "scored": self.dense.scored,
            "dense": {"perplexity": self.dense.perplexity, "nll": self.dense.nll},
            "rows": self.rows,
        }

    def add(self, score: TextScore, **figures: Any) -> None:
        self.rows.append(
            {
                **figures,
                "perplexity": score.perplexity,
                "ratio": score.perplexity / self.dense.perplexity,
                "interval": ratio_interval(score.nll, self.dense.nll, score.scored),
                "divergence": score.mean_divergence,
                "agreement": score.agreement,
                "nll": score.nll,
            }
        )


def evaluate_curves(
    model: nn.Module,
    clusters: ClusterSet,
    texts: Sequence[tuple[str, Tensor]],
    *,
    budgets: Sequence[float],
    verify: Sequence[bool] = (True, False),
    baselines: Sequence[str] = (),
    calibration: Tensor | None = None,
    protocol: Protocol | None = None,
) -> dict[str, Any]:
    """Measure an artifact, and other methods, at several budgets on several texts.

    Args:
        model: a dense causal language model; dense again when this returns.
        clusters: the artifact, with centroids.
        texts: names and tokens [n] int64 of held-out texts.
        budgets: mean cost shares, in (0, 1].
        verify: with looks, without them, or both in turn.
        baselines: names out of ``BASELINES``, or ``all``.
        calibration: windows that the baselines are fitted on [W, window] int64.
        protocol: windows and prompts.

    Returns:
        ``results``, for each text: ``data``, ``tokens``, ``scored`` (scored tokens of each window),
        ``dense`` (``perplexity``, ``nll``) and ``rows`` of ``method`` (``clusters`` or a baseline),
        ``budget``, ``verify`` (None for baselines), ``cost_share``, ``computed`` and ``looked_at``
        (shares of the neurons; None where a method has no such thing), ``perplexity``, ``ratio`` to
        dense with its 95 % ``interval`` over windows, ``divergence`` (KL to the dense model in nats
        per token), ``agreement`` (share of the tokens with the dense model's likeliest next token)
        and ``nll`` (summed over each window). ``left_out``: ``method``, ``budget`` and ``reason`` of
        baselines that cannot go so low, or have no prompt to go by. ``fit_seconds`` of each
        baseline. ``window``, ``stride`` and ``prompt_tokens``.

    Raises:
        ConfigError: a budget, a baseline's name, or the protocol is out of range; the artifact has no
            centroids; baselines without ``calibration``.
        DataError: a text is shorter than one window.
        SparseRuntimeError: as ``sparsify``.
    """
    protocol = protocol or Protocol()
    methods = named_baselines(baselines)
    if methods and calibration is None:
        raise ConfigError("baselines are given without calibration text; pass calibration")
    clusters.check_model(model)
    # Whatever cannot work shows here, before the first run.
    cuts = [
        (budget, looks, recut(model, clusters, budget=budget, verify=looks))
        for budget in budgets
        for looks in verify
    ]
    curves = [
        _Curve(name, tokens, protocol.score(model, tokens, f"dense, {name}"))
        for name, tokens in texts
    ]
    for budget, looks, cut in cuts:
        _add_clusters(model, cut, curves, budget, looks, protocol)
    left_out: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    if methods and calibration is not None:
        with captured_states(model, calibration, progress=protocol.progress) as states:
            for method in methods:
                reasons, taken = _fit_and_add(model, method, states, curves, budgets, protocol)
                left_out += reasons
                if taken is not None:
                    seconds[method.name] = taken
    return {
        "window": protocol.window,
        "stride": protocol.window if protocol.stride is None else protocol.stride,
        "prompt_tokens": protocol.prompt_tokens,
        "results": [curve.record() for curve in curves],
        "left_out": left_out,
        "fit_seconds": seconds,
    }


def _fit_and_add(
    model: nn.Module,
    method: Baseline,
    states: HiddenStates,
    curves: list[_Curve],
    budgets: Sequence[float],
    protocol: Protocol,
) -> tuple[list[dict[str, Any]], float | None]:
    """Add a baseline's rows; the budgets it cannot meet, and seconds of its fit if there was one."""
    layers = find_ffn_layers(model)
    reasons = {budget: _reason_against(method, budget, layers, protocol) for budget in budgets}
    left_out = [
        {"method": method.name, "budget": budget, "reason": reason}
        for budget, reason in reasons.items()
        if reason is not None
    ]
    possible = [budget for budget in budgets if reasons[budget] is None]
    if not possible:
        return left_out, None
    started = time.perf_counter()
    fitted = fit_baseline(model, method, states, possible, progress=protocol.progress)
    seconds = time.perf_counter() - started
    for budget, rows in zip(possible, fitted, strict=True):
        for name, masks in rows.items():
            _add_baseline(model, name, masks, curves, budget, protocol)
    return left_out, seconds


def _reason_against(
    method: Baseline, budget: float, layers: list[FFNLayer], protocol: Protocol
) -> str | None:
    """Why a method cannot run at a budget; None if it can."""
    if method.needs_prompt and protocol.prompt_tokens == 0:
        return "it takes its neurons from a prompt, and there is none (see --prompt-tokens)"
    least = max(method.least_share(layer) for layer in layers)
    return None if budget > least else f"it reads {least:.3f} of the FFN whatever it skips"


def _add_clusters(
    model: nn.Module,
    cut: ClusterSet,
    curves: list[_Curve],
    budget: float,
    looks: bool,
    protocol: Protocol,
) -> None:
    sparsify(model, cut, config=EVALUATION)
    try:
        modules = sparse_modules(model)
        for curve in curves:
            reset_cost(model)
            with dense_prompts(model, protocol.prompt_tokens):
                how = "with looks" if looks else "without looks"
                score = protocol.score(
                    model, curve.tokens, f"budget {budget}, {how}", reference=curve.dense
                )
            computed, looked = _neuron_shares(modules)
            curve.add(
                score,
                method="clusters",
                budget=budget,
                verify=looks,
                cost_share=count_cost(modules, element_size=2).cost_share,
                computed=computed,
                looked_at=looked,
            )
    finally:
        unsparsify(model)


def _add_baseline(
    model: nn.Module,
    name: str,
    masks: dict[int, Masks | PromptMasks],
    curves: list[_Curve],
    budget: float,
    protocol: Protocol,
) -> None:
    for curve in curves:
        meter: CostMeter
        with masked_ffns(model, masks, prompt_tokens=protocol.prompt_tokens) as meter:
            score = protocol.score(
                model, curve.tokens, f"budget {budget}, {name}", reference=curve.dense
            )
        curve.add(
            score,
            method=name,
            budget=budget,
            verify=None,
            cost_share=meter.cost_share,
            computed=meter.computed,
            looked_at=None,
        )


def _neuron_shares(modules: list[SparseFFN]) -> tuple[float, float]:
    """Shares of the neurons computed and looked at, mean over the sparse tokens and layers."""
    counts = [(read_counts(module), module.cost.intermediate_size) for module in modules]
    neurons = sum(count.sparse_tokens * size for count, size in counts)
    computed = sum(count.computed for count, _ in counts)
    looked = sum(count.looked_at for count, _ in counts)
    return computed / neurons, looked / neurons


def baseline_calibration(
    clusters: ClusterSet,
    specs: Sequence[str],
    tokenizer: Any,
    *,
    max_tokens: int,
    window: int,
    model: Any = None,
) -> tuple[CalibrationText, str | None]:
    """Read the text that baselines are fitted on.

    Args:
        clusters: the artifact, whose build record names the default.
        specs: sources as on the command line; if empty, those that the artifact was built on, or
            ``wikitext2`` where they cannot be read.
        tokenizer: of the model.
        max_tokens: total over the sources.
        window: tokens per window.
        model: for ``self``.

    Returns:
        The text and, where the artifact's own sources could not be read, the reason.

    Raises:
        DataError, ConfigError: see :func:`calibration_windows`.
    """

    def read(sources: list[DataSource]) -> CalibrationText:
        return calibration_windows(
            sources, tokenizer, max_tokens=max_tokens, window=window, model=model
        )

    if specs:
        return read([parse_source(spec) for spec in specs]), None
    recorded = recorded_sources(within(clusters.build, "data"))
    reason = "its build record names no sources"
    if recorded:
        try:
            return read([recorded_source(entry) for entry in recorded]), None
        except DataError as error:
            reason = str(error)
    try:
        return read([parse_source(DEFAULT_CALIBRATION)]), reason
    except DataError as error:
        raise DataError(
            f"baselines need calibration text: that of the artifact is out of reach ({reason}), and so "
            f"is {DEFAULT_CALIBRATION} ({error}); name some with --calibration"
        ) from error
