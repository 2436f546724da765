"""``generate``: an answer or a continuation by a sparse model, and how fast it came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape

from sparse_runtime.api import sparsify
from sparse_runtime.cli.console import note, out
from sparse_runtime.cli.cutting import Cut, MaxLossDomainOption, MaxLossOption
from sparse_runtime.cli.figures import write_figures
from sparse_runtime.cli.generation import (
    WARM_UP_TOKENS,
    compile_variants,
    generate_text,
    load_with_clusters,
    ran,
    speed,
    warm_up,
)
from sparse_runtime.cli.options import (
    BudgetOption,
    ClustersOption,
    DeviceOption,
    DoSampleOption,
    DtypeOption,
    FastLinearOption,
    JsonOption,
    LinearWeightsOption,
    MinPOption,
    ModelArgument,
    RampOption,
    RepetitionPenaltyOption,
    RevisionOption,
    SeedOption,
    StopOption,
    SystemOption,
    TauOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    VerifyOption,
    WeightsOption,
    plane_options,
)
from sparse_runtime.cli.ranges import POSITIVE
from sparse_runtime.cli.terminal import read_input, show_text
from sparse_runtime.errors import ConfigError, SparseRuntimeError
from sparse_runtime.generation import (
    Prompt,
    Sampling,
    Session,
    StopStrings,
    encode_messages,
    encode_text,
    has_chat_template,
    room_for_answer,
)


def generate(
    model: ModelArgument,
    clusters: ClustersOption,
    prompt: Annotated[
        str,
        typer.Option(help="What to answer; with --raw, text to continue; - reads standard input."),
    ],
    system: SystemOption = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text, without the chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(callback=POSITIVE.callback, help="Tokens to generate, at most.")
    ] = 64,
    stop: StopOption = None,
    do_sample: DoSampleOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
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
    fast_linear: FastLinearOption = False,
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
    sampling = Sampling(do_sample, temperature, top_p, top_k, min_p, repetition_penalty, seed)
    options: dict[str, Any] = {"sampling": sampling, "stop": StopStrings(stop or ()).strings}
    text = _text(prompt, system, raw=raw)
    planes = plane_options(weights, linear_weights, tau, ramp)
    cut = Cut(budget, verify, max_loss, max_loss_domain)
    artifact, loaded, tokenizer = load_with_clusters(
        model, clusters, planes, cut, revision=revision, dtype=dtype, device=device
    )
    asked = _encoded(tokenizer, text, system, raw=raw)
    room = room_for_answer(loaded, asked)
    options["max_new_tokens"] = max_new_tokens if room is None else min(max_new_tokens, room)
    sparsify(loaded, artifact, strict=strict, fast_linear=fast_linear, **planes)
    variants = ("dense", "sparse") if compare else ("sparse",)
    ways: dict[str, Any] = {"compile_steps": compile_steps, "strict": strict}
    before = "" if asked.chat else text  # a continuation reads as one text; an answer stands alone
    runs = _generated(loaded, tokenizer, asked, variants, before=before, **ways, **options)
    record = {"model": model, "prompt": text, "chat": asked.chat}
    write_figures(json_file, {**record, **runs})
    if strict and runs["sparse"]["nothing_sparse"]:
        raise SparseRuntimeError(f"nothing ran sparse: {runs['sparse']['nothing_sparse']}")


def _text(prompt: str, system: str | None, *, raw: bool) -> str:
    """What ``--prompt`` says, or standard input. Raises ConfigError."""
    if raw and system is not None:
        raise ConfigError(
            "--system is given with --raw, which leaves out the chat template that a system prompt is "
            "put into; leave one of them out"
        )
    text = read_input() if prompt == "-" else prompt
    if not text:
        found = "-, and standard input is empty" if prompt == "-" else "empty"
        raise ConfigError(f"--prompt is {found}; expected some text")
    return text


def _generated(
    model: Any,
    tokenizer: Any,
    asked: Prompt,
    variants: Sequence[str],
    *,
    before: str,
    compile_steps: bool,
    strict: bool,
    max_new_tokens: int,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Generate and print a text by each variant: variant -> figures."""
    length = asked.length + max(max_new_tokens, WARM_UP_TOKENS)
    compiled: dict[str, float] = {}
    if compile_steps:
        compiled = compile_variants(model, tokenizer, asked, variants, length, strict=strict)
    elif len(variants) > 1:
        for variant in variants:
            warm_up(model, tokenizer, asked, variant)
    options["compiled_length"] = length if compiled else None
    runs = {}
    for variant in variants:
        out.print(f"[bold]{variant}[/bold]")
        show_text(before)
        # A session of its own: what one variant keeps is not for the other.
        session = Session(model, tokenizer)
        runs[variant] = generate_text(
            *(model, session, asked, variant),
            max_new_tokens=max_new_tokens,
            show=show_text,
            **options,
        )
        print()
        runs[variant]["compile_seconds"] = compiled.get(variant)
        _print_figures(runs[variant])
    return runs


def _encoded(tokenizer: Any, text: str, system: str | None, *, raw: bool) -> Prompt:
    """The prompt in the tokenizer's chat template, where there is one and it is wanted."""
    if raw or not has_chat_template(tokenizer):
        if system is not None:
            raise ConfigError(
                "--system is given, and the model's tokenizer has no chat template to put it into; "
                "take a model tuned for conversations, or begin --prompt with it"
            )
        return encode_text(tokenizer, text)
    messages = [] if system is None else [{"role": "system", "content": system}]
    return encode_messages(tokenizer, [*messages, {"role": "user", "content": text}])


def _print_figures(figures: dict[str, Any]) -> None:
    how_fast = speed(figures)
    if figures["compile_seconds"] is not None:
        how_fast += f", compiled in {figures['compile_seconds']:.1f} s before"
    prompt = f"prompt of {figures['prompt_tokens']} tokens in {figures['prompt_seconds']:.2f} s"
    out.print(f"[dim]{how_fast}; {prompt}; {escape(ran(figures))}[/dim]\n", soft_wrap=True)
    if figures["nothing_sparse"]:
        note(f"nothing ran sparse: {figures['nothing_sparse']}")
