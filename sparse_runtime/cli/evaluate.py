"""``eval``: quality of a sparse model on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from torch import Tensor

from sparse_runtime.artifact.build_record import within
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.cli.comparison import CALIBRATION_TOKENS, Comparison
from sparse_runtime.cli.console import err
from sparse_runtime.cli.cutting import Cut, MaxLossDomainOption, MaxLossOption
from sparse_runtime.cli.figures import write_figures
from sparse_runtime.cli.options import (
    AutoDtypeOption,
    BudgetOption,
    ClustersOption,
    DataOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    RampOption,
    RevisionOption,
    TauOption,
    VerifyOption,
    WeightsOption,
    WindowOption,
    check_stages,
    plane_options,
    resolve_dtype,
)
from sparse_runtime.cli.progress import RichProgress
from sparse_runtime.cli.ranges import NOT_NEGATIVE, POSITIVE, SHARE, parse_numbers
from sparse_runtime.cli.tables import print_packed, print_quality
from sparse_runtime.cli.texts import (
    check_windows_fit,
    held_out,
    judged_source,
    warn_of_overlap,
)
from sparse_runtime.config import SparseConfig
from sparse_runtime.errors import ConfigError
from sparse_runtime.models import load_model
from sparse_runtime.models.ffn_layers import packed_bits

if TYPE_CHECKING:
    from sparse_runtime.eval.quality.rows import Protocol

PromptTokensOption = Annotated[
    int,
    typer.Option(
        callback=NOT_NEGATIVE.callback,
        help="First tokens of each window that run dense and are not scored, as a prompt.",
    ),
]
BudgetsOption = Annotated[
    str | None,
    typer.Option(
        help="Compare these cost shares, or bits per FFN weight (4bits), with commas: with looks and "
        "without, or over --weights."
    ),
]
BaselinesOption = Annotated[
    str | None,
    typer.Option(
        help="Beside other methods at the same budgets: oracle,teal,wina,cats,deja-vu,griffin,look-all,"
        "awc-paper,static,random; and FFN weights in dense formats, a row each: dense-8, dense-6, "
        "dense-5, dense-4, dense-3 (planes), the same with -mse (scales by E[x²]) or -gptq "
        "(compensated), q8_0, q5_0, q4_0 (GGUF). dense, dense-mse, dense-gptq and gguf stand for "
        "groups, all for everything but dense-mse."
    ),
]
CalibrationOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Text for --baselines and --rounding, as --data; if not given, what the artifact was "
        "built on.",
        metavar="SOURCE",
    ),
]
RoundingOption = Annotated[
    str | None,
    typer.Option(
        help="With --weights and --budgets or --baselines: plain, mse (scales by E[x²] of calibration "
        "text) or gptq (compensated) [default: gptq where such text is read anyway, else plain]"
    ),
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        help="Of a packed folder: the float model to measure from [default: all neurons of the folder]",
        metavar="MODEL",
    ),
]
CalibrationTokensOrNoneOption = Annotated[
    int | None,
    typer.Option(
        callback=POSITIVE.callback,
        help=f"Tokens of calibration text; {CALIBRATION_TOKENS} if not given.",
    ),
]


def evaluate(
    model: ModelArgument,
    clusters: ClustersOption,
    data: DataOption = None,
    max_tokens: Annotated[
        int, typer.Option(callback=POSITIVE.callback, help="Tokens of text.")
    ] = 32_768,
    window: WindowOption = 512,
    stride: Annotated[
        int,
        typer.Option(callback=NOT_NEGATIVE.callback, help="Distance of windows; 0: the window."),
    ] = 0,
    prompt_tokens: PromptTokensOption = 0,
    budget: BudgetOption = None,
    max_loss: MaxLossOption = None,
    max_loss_domain: MaxLossDomainOption = None,
    revision: RevisionOption = None,
    budgets: BudgetsOption = None,
    weights: WeightsOption = None,
    rounding: RoundingOption = None,
    tau: TauOption = None,
    ramp: RampOption = None,
    against: AgainstOption = None,
    verify: VerifyOption = None,
    baselines: BaselinesOption = None,
    calibration: CalibrationOption = None,
    calibration_tokens: CalibrationTokensOrNoneOption = None,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Distance from the dense model and coverage on held-out text, all tokens sparse after a prompt."""
    from sparse_runtime.eval.latency.host import host_record
    from sparse_runtime.eval.quality.perplexity import check_windows
    from sparse_runtime.eval.quality.rows import Protocol

    check_windows(window, stride or window, prompt_tokens)
    cut = Cut(budget, verify, max_loss, max_loss_domain)
    asked = Comparison(
        budget,
        None if budgets is None else parse_numbers("--budgets", budgets, float, SHARE),
        baselines,
        weights,
        rounding,
        calibration,
        calibration_tokens,
        window,
    )
    if asked.wanted and max_loss is not None:
        raise ConfigError(
            "--max-loss chooses one budget, and --budgets and --baselines compare several; leave it out"
        )
    check_windows_fit(window, {"--max-tokens": max_tokens})
    sources = [(spec, judged_source(spec)) for spec in data or ["wikitext2"]]
    planes = plane_options(weights, None, tau, ramp)
    artifact = cut.load(clusters, revision, centroids=asked.wanted)
    loaded, tokenizer = load_model(model, dtype=resolve_dtype(dtype, device), device=device)
    check_stages(loaded, planes)
    asked.check_model(model, loaded)
    artifact.check_model(loaded)
    floats = _float_model(against, loaded, planes, asked.wanted)
    texts = [(name, held_out(text, tokenizer, max_tokens, loaded)) for name, text in sources]
    for source, tokens in texts:
        warn_of_overlap(source, tokens, within(artifact.build, "data"))
    protocol = Protocol(window, stride or None, prompt_tokens, RichProgress(err))
    record: dict[str, Any] = {"model": model, "clusters": clusters}
    record["dtype"] = str(loaded.dtype).removeprefix("torch.")
    if asked.wanted:
        options: dict[str, Any] = {"planes": planes, "verify": verify, "protocol": protocol}
        record |= asked.run(loaded, tokenizer, artifact, texts, **options)
    else:
        record |= _on_texts(loaded, cut.of(loaded, artifact), texts, protocol, planes, floats)
    write_figures(json_file, {**record, "host": host_record(loaded.device)})


def _float_model(against: str | None, model: Any, planes: dict[str, Any], curves: bool) -> Any:
    """The model of ``--against``; None without it. Raises ConfigError if it has no effect or place."""
    if against is None:
        return None
    if curves or not packed_bits(model) or planes.get("weights"):
        raise ConfigError(
            "--against is for packed folders without --budgets and --baselines; a float model is "
            "compared with itself"
        )
    loaded, _ = load_model(against, dtype=model.dtype, device=str(model.device))
    sizes = [m.get_input_embeddings().weight.shape[0] for m in (model, loaded)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"--against {against} knows {sizes[1]} tokens, and the packed model {sizes[0]}; expected "
            "the model that it was made of"
        )
    return loaded


def _on_texts(
    model: Any,
    artifact: ClusterSet,
    texts: Sequence[tuple[str, Tensor]],
    protocol: Protocol,
    planes: dict[str, Any],
    floats: Any,
) -> dict[str, Any]:
    """Figures over float weights or packed ones; those of further texts under ``others``."""
    if planes or packed_bits(model):
        results = _packed_quality(model, artifact, texts, protocol, planes, floats)
    else:
        results = _quality(model, artifact, texts, protocol)
    return results[0] | ({"others": results[1:]} if len(results) > 1 else {})


def _quality(
    model: Any, artifact: ClusterSet, texts: Sequence[tuple[str, Tensor]], protocol: Protocol
) -> list[dict[str, Any]]:
    """Figures of an artifact as it is, on each text."""
    from sparse_runtime.eval.quality.artifact_quality import evaluate_quality

    results = []
    for source, tokens in texts:
        result = evaluate_quality(
            model,
            artifact,
            tokens,
            window=protocol.window,
            stride=protocol.stride,
            prompt_tokens=protocol.prompt_tokens,
            progress=protocol.progress,
        )
        print_quality(source, result)
        results.append({"data": source, **result})
    return results


def _packed_quality(
    model: Any,
    artifact: ClusterSet,
    texts: Sequence[tuple[str, Tensor]],
    protocol: Protocol,
    planes: dict[str, Any],
    floats: Any,
) -> list[dict[str, Any]]:
    """Figures of an artifact over packed weights, on each text."""
    from sparse_runtime.eval.quality.packed import evaluate_packed

    weights: int = planes.get("weights") or packed_bits(model) or 0
    results = evaluate_packed(
        model,
        artifact,
        [tokens for _, tokens in texts],
        SparseConfig(prefill="sparse", **planes),
        reference=floats,
        window=protocol.window,
        stride=protocol.stride,
        prompt_tokens=protocol.prompt_tokens,
        progress=protocol.progress,
    )
    named = [
        {"weights": weights, "data": source, **result}
        for (source, _), result in zip(texts, results, strict=True)
    ]
    for result in named:
        print_packed(result, weights)
    return named
