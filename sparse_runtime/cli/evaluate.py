"""``eval``: quality of a sparse model on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from torch import Tensor

from sparse_runtime.artifact.build_record import within
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.recut import recut
from sparse_runtime.cli.console import err, note
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
    cuts,
    plane_options,
    resolve_dtype,
)
from sparse_runtime.cli.progress import RichProgress
from sparse_runtime.cli.ranges import NOT_NEGATIVE, POSITIVE, SHARE, parse_numbers
from sparse_runtime.cli.tables import print_curves, print_packed, print_quality
from sparse_runtime.cli.texts import (
    check_windows_fit,
    fit_sources,
    held_out,
    judged_source,
    warn_of_overlap,
)
from sparse_runtime.config import SparseConfig
from sparse_runtime.errors import ConfigError
from sparse_runtime.models import load_model
from sparse_runtime.models.ffn_layers import is_packed

if TYPE_CHECKING:
    from sparse_runtime.clusters.text import DataSource
    from sparse_runtime.eval.quality.curves import Protocol

_CALIBRATION_TOKENS = 16_384

PromptTokensOption = Annotated[
    int,
    typer.Option(
        callback=NOT_NEGATIVE.callback,
        help="First tokens of each window that run dense and are not scored, as a prompt.",
    ),
]
BudgetsOption = Annotated[
    str | None,
    typer.Option(help="Compare these cost shares, with commas, with looks and without."),
]
BaselinesOption = Annotated[
    str | None,
    typer.Option(
        help="Beside other methods at the same budgets: all, or some of oracle,teal,wina,cats,"
        "deja-vu,griffin,awc-paper,static,random."
    ),
]
CalibrationOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Text for --baselines, as --data; if not given, what the artifact was built on.",
        metavar="SOURCE",
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
        help=f"Tokens of calibration text for --baselines; {_CALIBRATION_TOKENS} if not given.",
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
    revision: RevisionOption = None,
    budgets: BudgetsOption = None,
    weights: WeightsOption = None,
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
    from sparse_runtime.eval.quality.curves import Protocol
    from sparse_runtime.eval.quality.perplexity import check_windows

    check_windows(window, stride or window, prompt_tokens)
    shares = None if budgets is None else parse_numbers("--budgets", budgets, float, SHARE)
    names = baselines.split(",") if baselines is not None else []
    for_baselines = {"calibration": calibration, "calibration-tokens": calibration_tokens}
    _check_options(budget, budgets, names, for_baselines)
    limits = (calibration_tokens or _CALIBRATION_TOKENS, window)
    check_windows_fit(window, {"--max-tokens": max_tokens})
    if names:
        check_windows_fit(window, {"--calibration-tokens": limits[0]})
    sources = _checked(names, data or ["wikitext2"], calibration)
    planes = plane_options(weights, None, tau, ramp)
    curves = shares is not None or bool(names)
    _check_planes(planes, curves)
    centroids = curves or cuts(budget, verify)
    artifact = ClusterSet.from_pretrained(clusters, revision=revision, centroids=centroids)
    loaded, tokenizer = load_model(model, dtype=resolve_dtype(dtype, device), device=device)
    check_stages(loaded, planes)
    artifact.check_model(loaded)
    floats = _float_model(against, loaded, planes, curves)
    texts = [(name, held_out(text, tokenizer, max_tokens, loaded)) for name, text in sources]
    _warn_of_overlaps(texts, within(artifact.build, "data"))
    protocol = Protocol(window, stride or None, prompt_tokens, RichProgress(err))
    record: dict[str, Any] = {"model": model, "clusters": clusters}
    record["dtype"] = str(loaded.dtype).removeprefix("torch.")
    if not curves:
        if centroids:
            artifact = recut(loaded, artifact, budget=budget, verify=verify)
        record |= _on_texts(loaded, artifact, texts, protocol, planes, floats)
    else:
        windows = None
        if names:
            windows, record["calibration"] = _calibration(
                artifact, calibration or [], tokenizer, *limits, loaded
            )
            if calibration:
                _warn_of_overlaps(texts, record["calibration"])
        record |= _curves(
            loaded,
            artifact,
            texts,
            budgets=shares or [artifact.budget if budget is None else budget],
            verify=[True, False] if verify is None else [verify],
            baselines=names,
            calibration=windows,
            protocol=protocol,
        )
    write_figures(json_file, {**record, "host": host_record(loaded.device)})


def _warn_of_overlaps(texts: Sequence[tuple[str, Tensor]], calibration: Any) -> None:
    for source, tokens in texts:
        warn_of_overlap(source, tokens, calibration)


def _check_options(
    budget: float | None, budgets: str | None, baselines: Sequence[str], for_them: dict[str, Any]
) -> None:
    """Refuse options that do not go together. Raises ConfigError."""
    if budget is not None and budgets is not None:
        raise ConfigError("--budget and --budgets are both given; expected one of them")
    for option, value in for_them.items():
        if value and not baselines:
            raise ConfigError(f"--{option} is given without --baselines, which alone it is for")


def _check_planes(planes: dict[str, Any], curves: bool) -> None:
    """Refuse packed weights where float ones are compared. Raises ConfigError."""
    if planes and curves:
        raise ConfigError(
            "--weights is given with --budgets or --baselines, which compare float weights; expected "
            "one or the other"
        )


def _float_model(against: str | None, model: Any, planes: dict[str, Any], curves: bool) -> Any:
    """The model of ``--against``; None without it. Raises ConfigError if it has no effect or place."""
    if against is None:
        return None
    if curves or not _packed_bits(model) or planes.get("weights"):
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


def _packed_bits(model: Any) -> int | None:
    """Bits of the FFNs of a model that came packed; None if they are floats."""
    return next((m.format.bits for m in model.modules() if is_packed(m)), None)


def _checked(
    baselines: Sequence[str], data: Sequence[str], calibration: list[str] | None
) -> list[tuple[str, DataSource]]:
    """Texts to judge by, as they are written; wrong names are refused before the model is loaded.

    Raises:
        ConfigError, DataError: a baseline, or a text, that cannot be.
    """
    from sparse_runtime.eval.baselines.registry import named_baselines

    named_baselines(baselines)
    fit_sources(calibration)
    return [(spec, judged_source(spec)) for spec in data]


def _on_texts(
    model: Any,
    artifact: ClusterSet,
    texts: Sequence[tuple[str, Tensor]],
    protocol: Protocol,
    planes: dict[str, Any],
    floats: Any,
) -> dict[str, Any]:
    """Figures over float weights or packed ones; those of further texts under ``others``."""
    if planes or _packed_bits(model):
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

    weights: int = planes.get("weights") or _packed_bits(model) or 0
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


def _curves(
    model: Any, artifact: ClusterSet, texts: Sequence[tuple[str, Tensor]], **options: Any
) -> dict[str, Any]:
    """Figures over budgets and methods."""
    from sparse_runtime.eval.quality.curves import evaluate_curves

    curves = evaluate_curves(model, artifact, texts, **options)
    print_curves(curves)
    return curves


def _calibration(
    artifact: ClusterSet,
    specs: Sequence[str],
    tokenizer: Any,
    max_tokens: int,
    window: int,
    model: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Windows that baselines are fitted on, and their record; says if they are not the artifact's."""
    from sparse_runtime.eval.quality.curves import baseline_calibration

    text, reason = baseline_calibration(
        artifact, specs, tokenizer, max_tokens=max_tokens, window=window, model=model
    )
    if reason is not None:
        note(f"baselines are calibrated on wikitext2: {reason}")
    return text.windows, text.record
