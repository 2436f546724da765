"""``long``: distance by position, a needle in a long text, and what is written after a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sparse_runtime.artifact.build_record import within
from sparse_runtime.cli.console import err, out
from sparse_runtime.cli.cutting import Cut, MaxLossDomainOption, MaxLossOption
from sparse_runtime.cli.figures import write_figures
from sparse_runtime.cli.options import (
    AutoDtypeOption,
    BudgetOption,
    ClustersOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    RampOption,
    RevisionOption,
    SeedOption,
    TauOption,
    VerifyOption,
    WeightsOption,
    WindowOption,
    check_stages,
    plane_options,
    resolve_dtype,
)
from sparse_runtime.cli.progress import RichProgress
from sparse_runtime.cli.ranges import (
    DEPTH,
    NOT_NEGATIVE,
    POSITIVE,
    TWO_OR_MORE,
    Range,
    parse_numbers,
)
from sparse_runtime.cli.tables import shown, with_error
from sparse_runtime.cli.texts import check_windows_fit, held_out, judged_source, warn_of_overlap
from sparse_runtime.errors import ConfigError
from sparse_runtime.models import load_model

if TYPE_CHECKING:
    from sparse_runtime.eval.long.study import LongStudy

_PARTS = ("positions", "needle", "continuations")
_SIDES = ("dense", "sparse")
_FOUR_OR_MORE = Range("4 or more, as groups of 4 tokens are counted", lambda value: value >= 4)
_ABOVE_ZERO = Range("more than 0", lambda value: 0 < value < float("inf"))


_Text = Annotated[str, typer.Option(help="Held-out text.", metavar="SOURCE")]
_Parts = Annotated[str, typer.Option(help=f"Some of {','.join(_PARTS)}, with commas.")]
_MaxTokens = Annotated[int, typer.Option(callback=POSITIVE.callback, help="Tokens of text.")]
_PromptTokens = Annotated[
    int,
    typer.Option(
        callback=NOT_NEGATIVE.callback,
        help="First tokens of each window that run dense and are not scored.",
    ),
]
_Lengths = Annotated[str, typer.Option(help="Tokens of needle prompts, with commas.")]
_Depths = Annotated[str, typer.Option(help="Shares of the text before the needle, with commas.")]
_Repeats = Annotated[
    int, typer.Option(callback=POSITIVE.callback, help="Needles of each length and depth.")
]
_Prompts = Annotated[
    int, typer.Option(callback=POSITIVE.callback, help="Prompts that are written on.")
]
_PromptLength = Annotated[
    int, typer.Option(callback=TWO_OR_MORE.callback, help="Tokens of these prompts.")
]
_NewTokens = Annotated[
    int, typer.Option(callback=_FOUR_OR_MORE.callback, help="Tokens of each continuation.")
]
_Temperature = Annotated[
    float, typer.Option(callback=_ABOVE_ZERO.callback, help="Of the sampled continuations.")
]


def long(
    model: ModelArgument,
    clusters: ClustersOption,
    data: _Text = "wikitext2",
    parts: _Parts = "positions,needle,continuations",
    max_tokens: _MaxTokens = 65_536,
    window: WindowOption = 8192,
    prompt_tokens: _PromptTokens = 0,
    lengths: _Lengths = "1024,4096",
    depths: _Depths = "0,0.5,1",
    needles: _Repeats = 4,
    prompts: _Prompts = 16,
    prompt_length: _PromptLength = 64,
    new_tokens: _NewTokens = 256,
    temperature: _Temperature = 1.0,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    tau: TauOption = None,
    ramp: RampOption = None,
    budget: BudgetOption = None,
    max_loss: MaxLossOption = None,
    max_loss_domain: MaxLossDomainOption = None,
    revision: RevisionOption = None,
    verify: VerifyOption = None,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Long contexts and texts, sparse beside dense: by position, a needle, and repetition."""
    from sparse_runtime.eval.latency.host import host_record
    from sparse_runtime.eval.long.study import (
        Continuations,
        LongStudy,
        Needles,
        check_context,
        context_of,
        evaluate_long,
    )
    from sparse_runtime.eval.quality.perplexity import check_windows

    wanted = _wanted(parts)
    hidden = Needles(
        tuple(parse_numbers("--lengths", lengths, int, POSITIVE)),
        tuple(parse_numbers("--depths", depths, float, DEPTH)),
        needles,
    )
    written = Continuations(prompts, prompt_length, new_tokens, temperature)
    check_windows(window, window, prompt_tokens)
    study = LongStudy(
        window if "positions" in wanted else None,
        prompt_tokens,
        hidden if "needle" in wanted else None,
        written if "continuations" in wanted else None,
        seed,
    )
    _check_tokens(max_tokens, study)
    source = judged_source(data)
    planes = plane_options(weights, None, tau, ramp)
    cut = Cut(budget, verify, max_loss, max_loss_domain)
    artifact = cut.load(clusters, revision)
    loaded, tokenizer = load_model(model, dtype=resolve_dtype(dtype, device), device=device)
    check_stages(loaded, planes)
    check_context(study, context_of(loaded))
    tokens = held_out(source, tokenizer, max_tokens, loaded)
    warn_of_overlap(data, tokens, within(artifact.build, "data"))
    options = {"budget": cut.budget_in(artifact), "verify": verify, **planes}
    progress = RichProgress(err)
    result = evaluate_long(
        loaded, tokenizer, artifact, tokens, study, options=options, progress=progress
    )
    print_long(result)
    record: dict[str, Any] = {"model": model, "clusters": clusters, **options}
    record |= {"dtype": str(loaded.dtype).removeprefix("torch."), "data": data}
    record |= {"tokens": len(tokens), "seed": seed, **result}
    write_figures(json_file, {**record, "host": host_record(loaded.device)})


def _wanted(parts: str) -> list[str]:
    """Names of ``--parts``. Raises ConfigError."""
    wanted = parts.split(",")
    for name in wanted:
        if name not in _PARTS:
            raise ConfigError(f"--parts has {name!r}; expected some of {', '.join(_PARTS)}")
    return wanted


def _check_tokens(max_tokens: int, study: LongStudy) -> None:
    """Refuse ``--max-tokens`` below what the study needs. Raises ConfigError."""
    if study.window is not None:
        check_windows_fit(study.window, {"--max-tokens": max_tokens})
    if max_tokens < study.least_tokens:
        raise ConfigError(
            f"--max-tokens is {max_tokens}; expected at least {study.least_tokens}, for the longest "
            "needle prompt, and for all prompts with their continuations"
        )


def print_long(result: dict[str, Any]) -> None:
    """Print the figures of ``evaluate_long``."""
    if "positions" in result:
        _print_positions(result["positions"])
    if "needle" in result:
        _print_needles(result["needle"]["rows"])
    if "continuations" in result:
        _print_continuations(result["continuations"])
    out.print("[dim]± is the standard error, of differences and ratios paired[/dim]")


def _print_positions(figures: dict[str, Any]) -> None:
    rows = figures["rows"]
    prompt = figures["prompt_tokens"]
    after = f" after a dense prompt of {prompt}" if prompt else ""
    table = Table(
        *("position", "dense", "sparse", "÷ dense", "KL", "top-1"),
        title=f"perplexity by position, {rows[0]['windows']} windows of {figures['window']}, every "
        f"token sparse{after}, {figures['bits_per_weight']:.2f} bits per FFN weight",
    )
    for row in rows:
        table.add_row(
            f"{row['from']}–{row['to'] - 1}",
            f"{row['dense']:.2f}",
            f"{row['sparse']:.2f}",
            with_error(row["ratio"], row["ratio_error"]),
            with_error(row["kl"], row["kl_error"], digits=4),
            f"{row['top1']:.3f}",
        )
    out.print(table)


def _print_needles(rows: list[dict[str, Any]]) -> None:
    for run in dict.fromkeys(row["run"] for row in rows):
        # Dense under the figure's name, sparse beside it: all of it fits 80 columns.
        table = Table(
            *("length", "depth", "found", "sparse", "log p", "sparse", "sparse − dense"),
            title=f"needles, {shown(run)}",
        )
        for row in (row for row in rows if row["run"] == run):
            found, answer = row["found"], row["log_probability"]
            table.add_row(
                str(row["length"]),
                "all" if row["depth"] is None else f"{row['depth']:g}",
                *(f"{round(row['prompts'] * found[side])}/{row['prompts']}" for side in _SIDES),
                *(f"{answer[side]:.2f}" for side in _SIDES),
                _difference(answer, digits=2),
            )
        out.print(table)


def _print_continuations(figures: dict[str, Any]) -> None:
    table = Table(
        *("sampling", "share of", "text", "dense", "sparse", "sparse − dense"),
        title=f"{figures['prompts']} continuations of {figures['new_tokens']} tokens after "
        f"{figures['prompt_tokens']}",
    )
    for row in figures["rows"]:
        table.add_row(
            shown(row["sampling"]),
            shown(row["figure"].replace("_", " ")),
            *(f"{row[name]:.3f}" for name in ("text", *_SIDES)),
            _difference(row, digits=3),
        )
    out.print(table)
    out.print(
        f"greedy texts are the same for {figures['same_tokens']:.1f} tokens; "
        f"{figures['bits_per_weight']:.2f} bits per FFN weight"
    )


def _difference(figures: dict[str, Any], *, digits: int) -> str:
    return with_error(figures["difference"], figures["difference_error"], digits=digits, sign=True)
