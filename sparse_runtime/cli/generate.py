"""``generate``: an answer or a continuation by a sparse model, and how fast it came."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from transformers import TextStreamer

from sparse_runtime.api import sparsify
from sparse_runtime.cli.console import note, out
from sparse_runtime.cli.cutting import Cut, MaxLossDomainOption, MaxLossOption
from sparse_runtime.cli.figures import write_figures
from sparse_runtime.cli.generation import (
    WARM_UP_TOKENS,
    compile_variants,
    encode_prompt,
    generate_text,
    warm_up,
)
from sparse_runtime.cli.options import (
    BudgetOption,
    ClustersOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LinearWeightsOption,
    ModelArgument,
    RampOption,
    RevisionOption,
    SeedOption,
    TauOption,
    VerifyOption,
    WeightsOption,
    check_stages,
    plane_options,
    resolve_dtype,
)
from sparse_runtime.cli.ranges import NOT_NEGATIVE, POSITIVE
from sparse_runtime.errors import ConfigError, SparseRuntimeError
from sparse_runtime.models import load_model


def generate(
    model: ModelArgument,
    clusters: ClustersOption,
    prompt: Annotated[str, typer.Option(help="What to answer; with --raw, text to continue.")],
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text, without the chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(callback=POSITIVE.callback, help="Tokens to generate.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option(callback=NOT_NEGATIVE.callback, help="0 is greedy.")
    ] = 0.0,
    seed: SeedOption = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Run dense too.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where nothing can run, or ran, sparse.")
    ] = False,
    compile_steps: Annotated[
        bool,
        typer.Option(
            "--compile", help="Run decode steps as one compiled graph; compiling takes a while."
        ),
    ] = False,
    fast_linear: Annotated[
        bool,
        typer.Option(
            "--fast-linear", help="Run attention's linear layers and the head by the kernels too."
        ),
    ] = False,
    weights: WeightsOption = None,
    linear_weights: LinearWeightsOption = None,
    tau: TauOption = None,
    ramp: RampOption = None,
    budget: BudgetOption = None,
    max_loss: MaxLossOption = None,
    max_loss_domain: MaxLossDomainOption = None,
    verify: VerifyOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Stream an answer, or a continuation; print tokens/s, what a token reads and what ran dense.

    Where the tokenizer has a chat template, the prompt is a user's message in it.
    """
    from sparse_runtime.attention import fast_attention

    if not prompt:
        raise ConfigError("--prompt is empty; expected some text")
    planes = plane_options(weights, linear_weights, tau, ramp)
    cut = Cut(budget, verify, max_loss, max_loss_domain)
    artifact = cut.load(clusters, revision)
    loaded, tokenizer = load_model(model, dtype=resolve_dtype(dtype, device), device=device)
    fast_attention(loaded)
    check_stages(loaded, planes)
    inputs = encode_prompt(tokenizer, prompt, raw=raw)
    ways: dict[str, Any] = {"strict": strict, "fast_linear": fast_linear}
    budget = cut.budget_in(artifact)
    sparsify(loaded, artifact, budget=budget, verify=verify, **ways, **planes)
    options: dict[str, Any] = {"temperature": temperature, "seed": seed}
    options["max_new_tokens"] = max_new_tokens
    variants = ("dense", "sparse") if compare else ("sparse",)
    length = inputs["input_ids"].shape[1] + max(max_new_tokens, WARM_UP_TOKENS)
    compiled: dict[str, float] = {}
    if compile_steps:
        compiled = compile_variants(loaded, tokenizer, inputs, variants, length, strict=strict)
    if compare and not compiled:
        for variant in variants:
            warm_up(loaded, tokenizer, inputs, variant)
    options["compiled_length"] = length if compiled else None
    runs = {}
    for variant in variants:
        runs[variant] = _streamed(loaded, tokenizer, inputs, variant, **options)
        runs[variant]["compile_seconds"] = compiled.get(variant)
        _print_figures(runs[variant])
    record = {"model": model, "prompt": prompt, "chat": inputs["chat"]}
    write_figures(json_file, {**record, **runs})
    if strict and runs["sparse"]["nothing_sparse"]:
        raise SparseRuntimeError(f"nothing ran sparse: {runs['sparse']['nothing_sparse']}")


def _streamed(
    model: Any, tokenizer: Any, inputs: Any, variant: str, **options: Any
) -> dict[str, Any]:
    """Print a text while it is generated; its figures."""
    out.print(f"[bold]{variant}[/bold]")
    # A continuation reads as one text; an answer stands alone.
    printer = TextStreamer(tokenizer, skip_prompt=bool(inputs["chat"]), skip_special_tokens=True)
    return generate_text(model, tokenizer, inputs, variant, printer=printer, **options)


def _print_figures(figures: dict[str, Any]) -> None:
    prompt = f"prompt of {figures['prompt_tokens']} tokens in {figures['prompt_seconds']:.2f} s"
    rate = figures["tokens_per_second"]
    if figures["new_tokens"] == 0:
        speed = "ended at once: the first token was the end of the text"
    elif rate is None:
        speed = "one token, so no rate"
    else:
        speed = f"{rate:.1f} tokens/s after the first"
    if figures["compile_seconds"] is not None:
        speed += f", compiled in {figures['compile_seconds']:.1f} s before"
    out.print(f"[dim]{speed}; {prompt}; {escape(ran(figures))}[/dim]\n", soft_wrap=True)
    if figures["nothing_sparse"]:
        note(f"nothing ran sparse: {figures['nothing_sparse']}")


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
