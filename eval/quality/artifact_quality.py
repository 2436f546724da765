"""Quality of a sparse model: distance from the dense one, perplexity, coverage on held-out text.

Four runs over the same text, every token through the sparse path (or every one after a prompt): dense;
sparse by the router's ids; sparse by oracle ids (the clusters whose sets cover the tokens' true
importance best with as many neurons as the router's, see ``sparse_runtime.clusters.metrics``; a model
tuned with its router may do worse by them); and static (one set for all tokens, the floor). With
verification a cluster's set is both of its bands. ``eval/quality/curves.py`` compares budgets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_runtime.api import dense, reset_cost, sparse_modules, sparsify, unsparsify
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.clusters.importance import ImportanceScorer, importance_scorer, normalized
from sparse_runtime.clusters.metrics import SetScorer, oracle_ids
from sparse_runtime.config import SparseConfig
from sparse_runtime.eval.quality.forwards import dense_prompts
from sparse_runtime.eval.quality.perplexity import TextScore, score_text
from sparse_runtime.eval.quality.rows import distance, reading
from sparse_runtime.ffn.counts import count_cost
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.kernels import ClusterTables, router_logits
from sparse_runtime.kernels.bitmaps import union, unpack_bits
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.progress import ProgressReporter

# Scoring sets costs more than running them; this many tokens fix a layer's means to about 0.001.
_SCORED_TOKENS = 4096
_CONFIDENCE_BINS = 10
#: Every token of every call sparse, by the backend that defines the answer.
EVALUATION = SparseConfig(prefill="sparse", backend="reference")


def evaluate_quality(
    model: nn.Module,
    clusters: ClusterSet,
    tokens: Tensor,
    *,
    window: int = 512,
    stride: int | None = None,
    prompt_tokens: int = 0,
    progress: ProgressReporter | None = None,
) -> dict[str, Any]:
    """Measure a dense model with and without clusters on a text.

    Args:
        model: a dense causal language model; dense again when this returns.
        clusters: the artifact to judge.
        tokens: the text, held out from the calibration [n] int64.
        window: tokens per window.
        stride: distance of window starts; ``window`` if None.
        prompt_tokens: tokens at the start of each window that run dense and are not scored, as a
            prompt is run before tokens are generated; 0 for every token sparse.
        progress: reports one unit per window of each run.

    Returns:
        Of the sparse run, its ``distance`` from the dense model, and ``cost_share`` and
        ``bits_per_weight`` (``sparse_runtime.eval.quality.rows``), counted by the runtime for bfloat16
        weights whatever the model's dtype (beside larger weights looks would seem cheaper);
        ``oracle_ids`` and ``static``: the distances of these runs; of each run (``dense``, ``sparse``,
        ``oracle_ids``, ``static``) ``perplexity`` and ``nll`` (the windows' negative
        log-likelihoods); ``scored`` (the windows' scored tokens), ``tokens``, ``window``, ``stride``,
        ``prompt_tokens`` and, per layer, the scores of :class:`SetScorer` on
        the states of the sparse model and ``confidence``: shares of the tokens whose router gives its
        choice a probability of 0 to 0.1, 0.1 to 0.2, … 0.9 to 1.

    Raises:
        DataError: the text is shorter than one window.
        ConfigError: window, stride or prompt are out of range (see ``text_windows``).
        SparseRuntimeError: as ``sparsify``.
    """
    options: dict[str, Any] = {"window": window, "stride": stride, "progress": progress}
    options["prompt_tokens"] = prompt_tokens
    layers = find_ffn_layers(model)
    scorers = {layer.index: importance_scorer(layer) for layer in layers}
    sparsify(model, clusters, config=EVALUATION)
    try:
        with dense(model):
            reference = score_text(model, tokens, description="dense", keep=True, **options)
        options["reference"] = reference
        scores = {}
        reset_cost(model)
        with dense_prompts(model, prompt_tokens):
            with _scored(model, clusters, scorers) as scored:
                scores["sparse"] = score_text(model, tokens, description="sparse", **options)
            cost = count_cost(sparse_modules(model), element_size=2)
            prices = {index: scorer.oracle_price() for index, (scorer, _) in scored.items()}
            with _oracle_ids(model, scorers, prices):
                scores["oracle_ids"] = score_text(
                    model, tokens, description="oracle ids", **options
                )
            with _static_set(model, clusters):
                scores["static"] = score_text(model, tokens, description="static", **options)
    finally:
        unsparsify(model)
    return {
        **_comparison(scores, reference),
        **reading(cost.cost_share),
        "tokens": len(tokens),
        "window": window,
        "stride": window if stride is None else stride,
        "prompt_tokens": prompt_tokens,
        "layers": [
            {
                "index": index,
                **scorer.scores(),
                "confidence": (counts / counts.sum()).tolist(),
            }
            for index, (scorer, counts) in sorted(scored.items())
        ],
    }


def _comparison(scores: dict[str, TextScore], dense: TextScore) -> dict[str, Any]:
    """How far runs are from the dense one."""
    distances = {name: distance(score, dense) for name, score in scores.items()}
    scores = {"dense": dense, **scores}
    return {
        **distances.pop("sparse"),
        **distances,
        "perplexity": {name: score.perplexity for name, score in scores.items()},
        "scored": dense.scored,
        "nll": {name: score.nll for name, score in scores.items()},
    }


@contextmanager
def _routes(model: nn.Module, make_route: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for module in sparse_modules(model):
            stack.enter_context(module.swapped(route=make_route(module)))
        yield


@contextmanager
def _scored(
    model: nn.Module, clusters: ClusterSet, scorers: dict[int, ImportanceScorer]
) -> Iterator[dict[int, tuple[SetScorer, Tensor]]]:
    """Score the sets that routers choose, and count how sure they are."""
    scored = {}

    def make_route(module: SparseFFN) -> Any:
        tables, router = module.tables, module.router
        static_set = clusters.layers[module.layer_index].static_set
        device = tables.active_sets.device
        neurons = clusters.intermediate_size(module.layer_index)
        scorer = SetScorer(
            unpack_bits(union(tables.active_sets, tables.maybe_sets), neurons),
            unpack_bits(static_set.to(device), neurons),
        )
        counts = torch.zeros(_CONFIDENCE_BINS, device=device)
        scored[module.layer_index] = (scorer, counts)
        remaining = _SCORED_TOKENS

        def route(x: Tensor) -> Tensor:
            nonlocal remaining
            ids = module.cluster_ids(x)
            if remaining > 0:
                sample = slice(0, remaining)
                scorer.add(scorers[module.layer_index](x[sample]), ids[sample])
                logits = router_logits(x[sample], router.down, router.up, router.bias)
                sure = logits.float().softmax(-1).amax(-1)
                counts.add_(torch.histc(sure, _CONFIDENCE_BINS, 0, 1))
                remaining -= len(ids[sample])
            return ids

        return route

    with _routes(model, make_route):
        yield scored


@contextmanager
def _oracle_ids(
    model: nn.Module, scorers: dict[int, ImportanceScorer], prices: dict[int, float]
) -> Iterator[None]:
    def make_route(module: SparseFFN) -> Any:
        scorer, price = scorers[module.layer_index], prices[module.layer_index]
        both = union(module.tables.active_sets, module.tables.maybe_sets)
        sets = unpack_bits(both, module.cost.intermediate_size).float()
        density = sets.mean(-1)
        return lambda x: oracle_ids(normalized(scorer(x)) @ sets.t(), density, price)

    with _routes(model, make_route):
        yield


@contextmanager
def _static_set(model: nn.Module, clusters: ClusterSet) -> Iterator[None]:
    with ExitStack() as stack:
        for module in sparse_modules(model):
            static = clusters.layers[module.layer_index].static_set
            sets = module.tables.active_sets
            # Every id points at the same set, so ids of any router stay in range.
            tables = ClusterTables(static.to(sets.device).expand_as(sets))
            stack.enter_context(module.swapped(tables=tables))
        yield
