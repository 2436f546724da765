"""A text by a model that is sparse, or dense for once, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from sparse_runtime.api import cost_report, dense, reset_cost, sparse_modules
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.cli.console import note, out
from sparse_runtime.cli.cutting import Cut
from sparse_runtime.cli.options import check_stages, resolve_dtype
from sparse_runtime.compiled import compiled_decode, compiling
from sparse_runtime.cost import CostReport
from sparse_runtime.errors import BackendUnavailableError, CompilationError
from sparse_runtime.ffn.counts import bytes_per_token
from sparse_runtime.generation import Prompt, Session
from sparse_runtime.kernels import resolve_backend
from sparse_runtime.models import load_model

#: Of the unmeasured runs before a comparison: enough for a decode step after the first.
WARM_UP_TOKENS = 3


def load_with_clusters(
    model: str,
    clusters: str,
    planes: dict[str, Any],
    cut: Cut,
    *,
    revision: str | None,
    dtype: str,
    device: str | None,
) -> tuple[ClusterSet, Any, Any]:
    """An artifact, cut, the model that it is for, dense as yet, and its tokenizer.

    Raises:
        SparseRuntimeError: one cannot be loaded, or an option has no effect on the model.
    """
    from sparse_runtime.attention import fast_attention

    artifact = cut.load(clusters, revision)
    loaded, tokenizer = load_model(model, dtype=resolve_dtype(dtype, device), device=device)
    fast_attention(loaded)
    check_stages(loaded, planes)
    return cut.of(loaded, artifact), loaded, tokenizer


def warm_up(
    model: Any, tokenizer: Any, prompt: Prompt, variant: str, compiled_length: int | None = None
) -> None:
    """Run a few tokens unmeasured: the first call of a length sets up threads and caches."""
    generate_text(
        model,
        Session(model, tokenizer),
        prompt,
        variant,
        max_new_tokens=WARM_UP_TOKENS,
        min_new_tokens=WARM_UP_TOKENS,
        compiled_length=compiled_length,
    )


def compile_variants(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    variants: Sequence[str],
    length: int,
    *,
    strict: bool,
) -> dict[str, float]:
    """Compile the decode steps of variants: variant -> seconds; nothing where it cannot be done.

    Raises:
        CompilationError: it cannot be done, and ``strict``.
    """
    seconds = {}
    try:
        for variant in variants:
            started = time.perf_counter()
            with out.status(f"compiling {variant} decode steps"), compiling(model):
                warm_up(model, tokenizer, prompt, variant, length)
            seconds[variant] = time.perf_counter() - started
    except CompilationError as error:
        if strict:
            raise
        note(f"runs without --compile: {error}")
        return {}
    return seconds


def generate_text(
    model: Any,
    session: Session,
    prompt: Prompt,
    variant: str,
    *,
    compiled_length: int | None = None,
    show: Callable[[str], object] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Generate a text with a sparse model and count what it took.

    Args:
        model: sparse.
        session: of the model.
        prompt: what to answer or continue.
        variant: ``sparse``, or ``dense`` for the same model inside :func:`sparse_runtime.dense`.
        compiled_length: run decode steps compiled, with a cache for so many tokens.
        show: is told each piece of the text as it comes.
        options: of :meth:`Session.answer`.

    Returns:
        ``text``; ``prompt_tokens``, and ``reused_tokens`` of them; ``new_tokens``, without an end
        token; ``ended``, see :class:`Answer`; ``prompt_seconds`` up to the first new token;
        ``decode_steps`` from there on and their ``tokens_per_second``, None where there is none;
        ``cost_share``, and the same as ``bits_per_weight`` (16 × the share of bfloat16's bytes);
        ``bytes_per_token`` of the whole model's weights that a decode step reads;
        ``sparse_share_of_tokens``; ``sparse_tokens`` and ``dense_tokens``, mean over the layers,
        ``dense_reasons`` (reason -> such tokens); and ``nothing_sparse``: why no token of the sparse
        variant ran sparse, None if one did.
    """
    if compiled_length is not None:
        options |= compiled_decode(model, compiled_length)
    reset_cost(model)
    with dense(model) if variant == "dense" else nullcontext():
        answer = session.answer(prompt, show=show, **options)
    report, decoded = cost_report(model), bool(answer.step_seconds)
    return {
        "text": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "reused_tokens": answer.reused_tokens,
        "new_tokens": answer.new_tokens,
        "ended": answer.ended,
        "prompt_seconds": answer.prompt_seconds,
        "decode_steps": len(answer.step_seconds),
        "tokens_per_second": answer.tokens_per_second,
        **_counts(report, len(sparse_modules(model))),
        "bytes_per_token": bytes_per_token(model),
        "nothing_sparse": (
            _why_dense(model, report, decoded=decoded) if variant == "sparse" else None
        ),
    }


def ran(figures: dict[str, Any]) -> str:
    """What a token of a run read, and how many tokens ran sparse and dense, in words."""
    why = ", ".join(
        reason if len(figures["dense_reasons"]) == 1 else f"{reason}: {tokens:.0f}"
        for reason, tokens in figures["dense_reasons"].items()
        if tokens
    )
    return (
        f"cost share {figures['cost_share']:.3f} ({figures['bits_per_weight']:.2f} bits per FFN "
        f"weight), {figures['bytes_per_token'] / 1e6:.1f} MB of weights per token; "
        f"{figures['sparse_tokens']:.0f} tokens ran sparse, "
        f"{figures['dense_tokens']:.0f} dense" + (f" ({why})" if why else "")
    )


def speed(figures: dict[str, Any]) -> str:
    """How fast a text came, in words."""
    if figures["new_tokens"] == 0 and figures["ended"] == "end":
        return "ended at once: the first token was the end of the text"
    rate = figures["tokens_per_second"]
    return "one token, so no rate" if rate is None else f"{rate:.1f} tokens/s after the first"


def _counts(report: CostReport, layers: int) -> dict[str, Any]:
    """What ran sparse and dense since the last reset, as tokens of the mean layer."""
    return {
        "cost_share": report.cost_share,
        "bits_per_weight": report.bits_per_weight,
        "sparse_share_of_tokens": report.sparse_share_of_tokens,
        "sparse_tokens": report.sparse_tokens / layers,
        "dense_tokens": report.dense_tokens / layers,
        "dense_reasons": {why: tokens / layers for why, tokens in report.dense_reasons.items()},
    }


def _why_dense(model: Any, report: CostReport, *, decoded: bool) -> str | None:
    """Why no token ran sparse; None if one did."""
    if report.sparse_tokens:
        return None
    if "no backend" in report.dense_reasons:
        try:
            resolve_backend("auto", model.device, model.dtype, strict=True)
        except BackendUnavailableError as error:
            return str(error)
    if not decoded:
        return "nothing was decoded after the first token, and prompts run dense"
    problems = dict.fromkeys(module.problem for module in sparse_modules(model) if module.problem)
    return ", ".join([*report.dense_reasons, *map(str, problems)])
