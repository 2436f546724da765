"""Counters for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sparse_runtime.serve.served_model import Figures

_RATES = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 500)


class Metrics:
    """What a server has done since it started, by model."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "sparse_runtime_requests",
            "Requests for an answer, by how they ended: answered, refused, failed or left.",
            ("model", "endpoint", "outcome"),
            registry=self._registry,
        )
        self._tokens = Counter(
            "sparse_runtime_tokens",
            "Tokens of prompts that were computed, of prompts that were cached, and of answers.",
            ("model", "kind"),
            registry=self._registry,
        )
        self._rates = Histogram(
            "sparse_runtime_tokens_per_second",
            "Of an answer, after its first token.",
            ("model",),
            buckets=_RATES,
            registry=self._registry,
        )
        self._bytes = Counter(
            "sparse_runtime_ffn_bytes",
            "FFN bytes that sparse tokens have read, and that dense ones would have in their place.",
            ("model", "kind"),
            registry=self._registry,
        )
        self._layer_tokens = Counter(
            "sparse_runtime_ffn_tokens",
            "Tokens through an FFN layer, by how they ran.",
            ("model", "way"),
            registry=self._registry,
        )
        self._audits = Counter(
            "sparse_runtime_audited_prompts",
            "Prompts that the guard has audited, by how it had them decode.",
            ("model", "way"),
            registry=self._registry,
        )
        self._cost = self._gauge("cost_share", "FFN bytes read by sparse tokens ÷ dense bytes.")
        self._dense = self._gauge("dense_share", "Share of an FFN layer's tokens that ran dense.")
        self._totals: dict[str, tuple[float, ...]] = {}

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(
            f"sparse_runtime_{name}",
            f"{text} Since the start.",
            ("model",),
            registry=self._registry,
        )

    def count(self, model: str, endpoint: str, outcome: str) -> None:
        """Count a request that has ended."""
        self._requests.labels(model, endpoint, outcome).inc()

    def add(self, model: str, figures: Figures) -> None:
        """Add what an answer took."""
        cost = figures.cost
        for kind, tokens in (
            ("prompt", figures.prompt_tokens - figures.reused_tokens),
            ("cached", figures.reused_tokens),
            ("answer", figures.new_tokens),
        ):
            self._tokens.labels(model, kind).inc(tokens)
        if figures.tokens_per_second is not None:
            self._rates.labels(model).observe(figures.tokens_per_second)
        self._bytes.labels(model, "read").inc(cost.sparse_bytes)
        self._bytes.labels(model, "dense").inc(cost.dense_bytes_of_sparse_tokens)
        self._audits.labels(model, "sparse").inc(cost.audited_prompts - cost.guarded_prompts)
        self._audits.labels(model, "dense").inc(cost.guarded_prompts)
        self._layer_tokens.labels(model, "sparse").inc(cost.sparse_tokens)
        self._layer_tokens.labels(model, "dense").inc(cost.dense_tokens)
        new = (
            *(cost.sparse_bytes, cost.dense_bytes_of_sparse_tokens),
            *(cost.sparse_tokens, cost.dense_tokens),
        )
        before = self._totals.get(model, (0.0,) * len(new))
        totals = tuple(map(sum, zip(before, new, strict=True)))
        self._totals[model] = totals
        read, whole, sparse, dense = totals
        if whole:
            self._cost.labels(model).set(read / whole)
        if sparse + dense:
            self._dense.labels(model).set(dense / (sparse + dense))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
