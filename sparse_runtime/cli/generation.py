"""A text by a model that is sparse, or dense for once, and what it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TextStreamer

from sparse_runtime.api import cost_report, dense, reset_cost, sparse_modules
from sparse_runtime.cli.console import note, out
from sparse_runtime.compiled import compiled_decode, compiling
from sparse_runtime.cost import CostReport
from sparse_runtime.errors import BackendUnavailableError, CompilationError, ConfigError
from sparse_runtime.ffn.counts import bytes_per_token
from sparse_runtime.kernels import resolve_backend

#: Of the unmeasured runs before a comparison: enough for a decode step after the first.
WARM_UP_TOKENS = 3


def encode_prompt(tokenizer: Any, prompt: str, *, raw: bool) -> dict[str, Any]:
    """Token ids of a prompt.

    Args:
        tokenizer: of the model.
        prompt: a user's message, or text to continue.
        raw: leave the tokenizer's chat template aside.

    Returns:
        ``input_ids`` and ``attention_mask`` [1, n] int64, and ``chat``: whether the chat template
        was applied.

    Raises:
        ConfigError: the template cannot be applied, or there is no token.
    """
    chat = not raw and bool(getattr(tokenizer, "chat_template", None))
    if chat:
        messages = [{"role": "user", "content": prompt}]
        try:
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template is code that came with the model
            raise ConfigError(
                "the tokenizer's chat template cannot be applied to the prompt "
                f"({type(error).__name__}: {error}); --raw continues the text without it"
            ) from error
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    if encoded["input_ids"].shape[1] == 0:
        raise ConfigError(f"--prompt {prompt!r} has no tokens; expected some text")
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "chat": chat,
    }


def warm_up(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Any],
    variant: str,
    compiled_length: int | None = None,
) -> None:
    """Run a few tokens unmeasured: the first call of a length sets up threads and caches."""
    generate_text(
        model,
        tokenizer,
        inputs,
        variant,
        max_new_tokens=WARM_UP_TOKENS,
        min_new_tokens=WARM_UP_TOKENS,
        compiled_length=compiled_length,
    )


def compile_variants(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Any],
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
                warm_up(model, tokenizer, inputs, variant, length)
            seconds[variant] = time.perf_counter() - started
    except CompilationError as error:
        if strict:
            raise
        note(f"runs without --compile: {error}")
        return {}
    return seconds


def generate_text(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Any],
    variant: str,
    *,
    max_new_tokens: int,
    printer: TextStreamer | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    compiled_length: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Generate a text with a sparse model and count what it took.

    Args:
        model: sparse.
        tokenizer: of the model.
        inputs: as of :func:`encode_prompt`.
        variant: ``sparse``, or ``dense`` for the same model inside :func:`sparse_runtime.dense`.
        max_new_tokens: at most this many, an end token included.
        printer: prints the text as it comes.
        temperature: 0 is greedy.
        seed: of sampling.
        compiled_length: run decode steps compiled, with a cache for so many tokens.
        options: of ``model.generate``.

    Returns:
        ``text``; ``prompt_tokens``; ``new_tokens``, without an end token; ``prompt_seconds`` up to the
        first new token; ``tokens_per_second`` from there on, None where no further one came;
        ``cost_share``, and the same as ``bits_per_weight`` (16 × the share of bfloat16's bytes);
        ``bytes_per_token`` of the whole model's weights that a decode step reads;
        ``sparse_share_of_tokens``; ``sparse_tokens`` and ``dense_tokens``, mean over the layers,
        ``dense_reasons`` (reason -> such tokens); and ``nothing_sparse``: why no token of the sparse
        variant ran sparse, None if one did.
    """
    from sparse_runtime.eval.latency.timing import TokenClock

    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    if compiled_length is not None:
        options |= compiled_decode(model, compiled_length)
    clock = TokenClock(printer)
    ids = inputs["input_ids"].to(model.device)

    def run() -> Any:
        return model.generate(
            ids,
            attention_mask=inputs["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            streamer=clock,
            **sampling,
            **options,
        )

    reset_cost(model)
    torch.manual_seed(seed)
    with torch.inference_mode():
        if variant == "dense":
            with dense(model):
                tokens = run()
        else:
            tokens = run()
    new_tokens = tokens[0, ids.shape[1] :].tolist()
    ended = bool(new_tokens) and new_tokens[-1] in _end_tokens(model)
    steps, report = clock.steps, cost_report(model)
    return {
        "text": tokenizer.decode(new_tokens, skip_special_tokens=True),
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new_tokens) - ended,
        "prompt_seconds": clock.prompt_seconds,
        "tokens_per_second": len(steps) / sum(steps) if steps else None,
        **_counts(report, len(sparse_modules(model))),
        "bytes_per_token": bytes_per_token(model),
        "nothing_sparse": (
            _why_dense(model, report, decoded=bool(steps)) if variant == "sparse" else None
        ),
    }


def _end_tokens(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    return [] if end is None else end if isinstance(end, list) else [end]


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
