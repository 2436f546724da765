"""Quality over budgets: an artifact cut for each of them, beside other methods at the same cost.

The float model runs once for each text, and every row is one run compared with it. All see the same
windows and prompts, and what they read is counted on the text they are judged on, for bfloat16 weights
where they are floats. An artifact may run over planes: then the model is packed, as a copy, once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparse_runtime.api import reset_cost, sparsify, unsparsify
from sparse_runtime.artifact.build_record import recorded_sources, within
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.recut import recut
from sparse_runtime.clusters.capture import HiddenStates
from sparse_runtime.clusters.text import (
    CalibrationText,
    DataSource,
    calibration_windows,
    expand_recipes,
    parse_source,
    recorded_source,
)
from sparse_runtime.config import SparseConfig, check_cut
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.eval.baselines.dense_formats import (
    NO_EXPERTS,
    DenseFormat,
    DensePlanes,
    stored_in_four_bits,
)
from sparse_runtime.eval.baselines.look_all import LOOK_ALL, without_clusters
from sparse_runtime.eval.baselines.masked_ffn import (
    Baseline,
    CostMeter,
    Masks,
    PromptMasks,
    masked_ffns,
)
from sparse_runtime.eval.baselines.registry import captured_states, fit_baseline, named_baselines
from sparse_runtime.eval.quality.artifact_quality import EVALUATION
from sparse_runtime.eval.quality.forwards import dense_prompts
from sparse_runtime.eval.quality.rows import Curve, Protocol, amounts, reading, reading_of_bits
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_ffn_layers, packed_bits

DEFAULT_CALIBRATION = "wikitext2"

_STORED_IN_FOUR_BITS = (
    "the FFN weights of this model hold no more than 16 values in any block of 32, as those out of a "
    "GGUF file in Q4_1 or Q4_K do: dense formats near to that lose next to nothing, and are no "
    "opponents here"
)


def evaluate_curves(
    model: nn.Module,
    clusters: ClusterSet,
    texts: Sequence[tuple[str, Tensor]],
    *,
    budgets: Sequence[float],
    verify: Sequence[bool | None] = (True, False),
    baselines: Sequence[str] = (),
    calibration: Tensor | None = None,
    planes: DensePlanes | None = None,
    config: SparseConfig | None = None,
    protocol: Protocol | None = None,
) -> dict[str, Any]:
    """Measure an artifact, and other methods and formats, at several budgets on several texts.

    Args:
        model: a float causal language model, or a packed one without ``planes`` and baselines; what it
            was, bit for bit, when this returns.
        clusters: the artifact, with centroids.
        texts: names and tokens [n] int64 of held-out texts.
        budgets: mean cost shares, in (0, 1].
        verify: with looks, without them, as the artifact is (None), or several in turn.
        baselines: names of :func:`sparse_runtime.eval.baselines.registry.named_baselines`.
        calibration: windows that baselines are fitted on, and weights rounded by [W, window] int64.
        planes: what the artifact runs over; a copy of the model is packed so. None: the model as it is.
        config: of the sparse runs; every token sparse if None, over floats by the reference backend.
        protocol: windows and prompts. Dense formats run on prompts as on all else.

    Returns:
        ``results``, for each text: ``data``, ``tokens``, ``scored`` (scored tokens of each window),
        ``dense`` (``perplexity``, ``nll``) and ``rows`` of ``method`` (``clusters`` or a baseline),
        ``budget`` (None for formats), ``verify`` (None for baselines), ``weights`` and ``rounding``
        (bits of the planes and how they were rounded, or None), ``cost_share``, ``bits_per_weight``,
        ``looked``, ``counted`` and ``refined`` (shares of the neurons; None where a method has no such
        thing), the distances of :mod:`sparse_runtime.eval.quality.rows`, ``perplexity`` and ``nll``
        (summed over each window). With ``planes`` one row is of these with all neurons and bits.
        ``left_out``: ``method``, ``budget`` and ``reason`` of baselines that cannot go so low, have
        no prompt to go by, or do not fit the model. ``notes``: sentences on what rows can say.
        ``fit_seconds`` of each baseline. ``window``, ``stride`` and ``prompt_tokens``.

    Raises:
        ConfigError: a budget, a baseline's name, or the protocol is out of range; the artifact has no
            centroids; what is fitted on text has no ``calibration``.
        DataError: a text is shorter than one window.
        SparseRuntimeError: as ``sparsify``, and as ``pack_model``.
    """
    run = _Run(
        model, clusters, budgets, verify, calibration, protocol or Protocol(), planes, config
    )
    methods, formats = named_baselines(baselines)
    if LOOK_ALL in baselines or "all" in baselines:
        run.looks_at_all = True
    run.check(methods, formats)
    # Whatever cannot work shows here, before the first run; over planes, once these are there.
    cuts = run.cuts(model) if planes is None else []
    run.add_texts(texts)
    if planes is None:
        run.add_clusters(model, cuts)
    for form in dict.fromkeys([*([] if planes is None else [planes]), *formats]):
        run.add_format(form)
    if methods and calibration is not None:
        with captured_states(model, calibration, progress=run.protocol.progress) as states:
            for method in methods:
                run.add_method(method, states)
    return run.record(formats)


@dataclass(frozen=True)
class _Cut:
    """An artifact cut for a budget, with or without looks.

    Attributes:
        method: its name in the rows.
    """

    method: str
    budget: float
    verify: bool
    clusters: ClusterSet


class _Run:
    """One call of ``evaluate_curves``: what it was asked, and what it has found."""

    def __init__(
        self,
        model: nn.Module,
        clusters: ClusterSet,
        budgets: Sequence[float],
        verify: Sequence[bool | None],
        calibration: Tensor | None,
        protocol: Protocol,
        planes: DensePlanes | None,
        config: SparseConfig | None,
    ) -> None:
        self.model, self.clusters, self.protocol = model, clusters, protocol
        self.budgets, self.verify, self.calibration = budgets, verify, calibration
        self.planes, self.looks_at_all = planes, False
        own = EVALUATION if planes is None else SparseConfig(prefill="sparse")
        self.config = own if config is None else config
        self.curves: list[Curve] = []
        self.left_out: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}

    def check(self, methods: Sequence[Baseline], formats: Sequence[DenseFormat]) -> None:
        """Refuse what cannot be run, as far as it shows at once."""
        texts = [form.name for form in formats if form.needs_text]
        texts += [method.name for method in methods]
        if self.planes is not None and self.planes.needs_text:
            texts.append(f"{self.planes.rounding} rounding")
        if texts and self.calibration is None:
            raise ConfigError(
                f"{', '.join(texts)} given without calibration text; pass calibration"
            )
        for budget in self.budgets:
            check_cut(budget, None, None)
        self.clusters.check_model(self.model)
        if self.planes is not None:  # packing takes long; centroids may be missing
            recut(self.model, self.clusters, budget=max(self.budgets))

    def cuts(self, model: nn.Module) -> list[_Cut]:
        """The artifact for each budget, over the weights of a model; without its clusters, too."""
        artifacts = {"clusters": self.clusters}
        if self.looks_at_all:
            artifacts[LOOK_ALL] = without_clusters(self.clusters)
        found = [
            _Cut(name, budget, verified, recut(model, artifact, budget=budget, verify=looks))
            for name, artifact in artifacts.items()
            for budget in self.budgets
            for looks in self.verify
            if (verified := artifact.verified if looks is None else looks) or name != LOOK_ALL
        ]
        if self.looks_at_all and not any(cut.method == LOOK_ALL for cut in found):
            self._leave_out(LOOK_ALL, None, "it is nothing without looks")
        return found

    def _leave_out(self, method: str, budget: float | None, reason: str) -> None:
        self.left_out.append({"method": method, "budget": budget, "reason": reason})

    def add_texts(self, texts: Sequence[tuple[str, Tensor]]) -> None:
        """Run the model as it is."""
        for name, tokens in texts:
            dense = self.protocol.score(self.model, tokens, f"dense, {name}")
            self.curves.append(Curve(name, tokens, dense))

    def add_clusters(self, model: nn.Module, cuts: Sequence[_Cut]) -> None:
        """Run a model sparse by each cut."""
        bits = packed_bits(model)
        rounding = None if self.planes is None else self.planes.rounding
        for cut in cuts:
            looks = "with looks" if cut.verify else "without looks"
            with _sparse(model, cut.clusters, self.config):
                for curve in self.curves:
                    reset_cost(model)
                    with dense_prompts(model, self.protocol.prompt_tokens):
                        score = self.protocol.score(
                            model,
                            curve.tokens,
                            f"budget {cut.budget:.3f}, {cut.method} {looks}",
                            reference=curve.dense,
                        )
                    curve.add(
                        score,
                        cut.method,
                        amounts(model),
                        budget=cut.budget,
                        verify=cut.verify,
                        weights=bits,
                        rounding=rounding,
                    )

    def add_format(self, form: DenseFormat) -> None:
        """Run the model in a dense format, and the clusters over it if it is their planes."""
        obstacle = form.obstacle(self.model)
        if obstacle is not None:
            self._leave_out(form.name, None, obstacle)
            return
        bits = form.bits_per_weight(self.model)
        started = time.perf_counter()
        progress = self.protocol.progress
        with form.stored(self.model, self.calibration, progress=progress) as stored:
            self.seconds[form.name] = time.perf_counter() - started
            if form == self.planes:
                self.add_clusters(stored, self.cuts(stored))
            for curve in self.curves:
                score = self.protocol.score(stored, curve.tokens, form.name, reference=curve.dense)
                curve.add(
                    score,
                    form.name,
                    reading_of_bits(bits),
                    weights=form.weights,
                    rounding=form.rounding,
                )

    def add_method(self, method: Baseline, states: HiddenStates) -> None:
        """Fit a method for the budgets that it can meet, and run it."""
        layers = find_ffn_layers(self.model)
        reasons = {
            budget: _reason_against(method, budget, layers, self.protocol)
            for budget in self.budgets
        }
        for budget, reason in reasons.items():
            if reason is not None:
                self._leave_out(method.name, budget, reason)
        possible = [budget for budget in self.budgets if reasons[budget] is None]
        if not possible:
            return
        started = time.perf_counter()
        progress = self.protocol.progress
        fitted = fit_baseline(self.model, method, states, possible, progress=progress)
        self.seconds[method.name] = time.perf_counter() - started
        for budget, rows in zip(possible, fitted, strict=True):
            for name, masks in rows.items():
                self._add_masked(name, masks, budget)

    def _add_masked(self, name: str, masks: dict[int, Masks | PromptMasks], budget: float) -> None:
        prompt_tokens = self.protocol.prompt_tokens
        for curve in self.curves:
            meter: CostMeter
            with masked_ffns(self.model, masks, prompt_tokens=prompt_tokens) as meter:
                score = self.protocol.score(
                    self.model, curve.tokens, f"budget {budget}, {name}", reference=curve.dense
                )
            read = reading(meter.cost_share)
            curve.add(score, name, read, budget=budget, counted=meter.computed)

    def record(self, formats: Sequence[DenseFormat]) -> dict[str, Any]:
        """What ``evaluate_curves`` returns."""
        protocol = self.protocol
        notes = [_STORED_IN_FOUR_BITS] if formats and stored_in_four_bits(self.model) else []
        return {
            "window": protocol.window,
            "stride": protocol.window if protocol.stride is None else protocol.stride,
            "prompt_tokens": protocol.prompt_tokens,
            "results": [curve.record() for curve in self.curves],
            "left_out": self.left_out,
            "notes": notes,
            "fit_seconds": self.seconds,
        }


@contextmanager
def _sparse(model: nn.Module, clusters: ClusterSet, config: SparseConfig) -> Iterator[None]:
    sparsify(model, clusters, config=config)
    try:
        yield
    finally:
        unsparsify(model)


def _reason_against(
    method: Baseline, budget: float, layers: list[FFNLayer], protocol: Protocol
) -> str | None:
    """Why a method cannot run at a budget; None if it can."""
    if any(layer.experts for layer in layers):
        return NO_EXPERTS
    if method.needs_prompt and protocol.prompt_tokens == 0:
        return "it takes its neurons from a prompt, and there is none (see --prompt-tokens)"
    least = max(method.least_share(layer) for layer in layers)
    return None if budget > least else f"it reads {least:.3f} of the FFN whatever it skips"


def baseline_calibration(
    clusters: ClusterSet,
    specs: Sequence[str],
    tokenizer: Any,
    *,
    max_tokens: int,
    window: int,
    model: Any = None,
) -> tuple[CalibrationText, str | None]:
    """Read the text that baselines are fitted on, and weights rounded by.

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
        return read(expand_recipes(specs).sources), None
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
