"""``eval``: quality of a sparse model on held-out text."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from sparse_runtime.cli.console import err
from sparse_runtime.cli.figures import write_figures
from sparse_runtime.cli.options import (
    AutoDtypeOption,
    BudgetOption,
    ClustersOption,
    DataOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    VerifyOption,
    parse_numbers,
    resolve_dtype,
)
from sparse_runtime.cli.progress import RichProgress
from sparse_runtime.cli.tables import print_curves, print_quality
from sparse_runtime.cli.texts import held_out
from sparse_runtime.cluster_set import ClusterSet
from sparse_runtime.errors import ConfigError
from sparse_runtime.models import load_model
from sparse_runtime.recut import recut


def evaluate(
    model: ModelArgument,
    clusters: ClustersOption,
    data: DataOption = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of text.")] = 32_768,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    stride: Annotated[int, typer.Option(help="Distance of windows; 0: the window.")] = 0,
    prompt_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="First tokens of each window that run dense and are not scored, as a prompt.",
        ),
    ] = 0,
    budget: BudgetOption = None,
    budgets: Annotated[
        str | None,
        typer.Option(help="Compare these cost shares, with commas, with looks and without."),
    ] = None,
    verify: VerifyOption = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            help="Beside other methods at the same budgets: all, or some of oracle,teal,wina,cats,"
            "deja-vu,griffin,awc-paper,static,random."
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Text for --baselines, as --data; if not given, what the artifact was built on.",
            metavar="SOURCE",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of calibration text for --baselines.")
    ] = 16_384,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Perplexity, coverage and precision on held-out text, every token (after a prompt) sparse."""
    from sparse_runtime.eval.baselines import named_baselines
    from sparse_runtime.eval.curves import Protocol, baseline_calibration, evaluate_curves
    from sparse_runtime.eval.host import host_record
    from sparse_runtime.eval.quality import evaluate_quality

    if budget is not None and budgets is not None:
        raise ConfigError("--budget and --budgets are both given; expected one of them")
    if calibration and baselines is None:
        raise ConfigError("--calibration is given without --baselines, which alone it is for")
    shares = None if budgets is None else parse_numbers("--budgets", budgets, float)
    names = baselines.split(",") if baselines is not None else []
    named_baselines(names)  # a wrong name shows before the model is loaded
    sources = data or ["wikitext2"]
    artifact = ClusterSet.from_pretrained(clusters, centroids=True)
    loaded, tokenizer = load_model(model, dtype=resolve_dtype(dtype, device), device=device)
    artifact.check_model(loaded)
    texts = [(source, held_out(source, tokenizer, max_tokens, loaded)) for source in sources]
    progress = RichProgress(err)
    record: dict[str, Any] = {"model": model, "clusters": clusters}
    record["dtype"] = str(loaded.dtype).removeprefix("torch.")
    if shares is not None or names:
        windows = None
        if names:
            text, reason = baseline_calibration(
                artifact,
                calibration or [],
                tokenizer,
                max_tokens=calibration_tokens,
                window=window,
                model=loaded,
            )
            if reason is not None:
                err.print(escape(f"baselines are calibrated on wikitext2: {reason}"))
            windows, record["calibration"] = text.windows, text.record
        curves = evaluate_curves(
            loaded,
            artifact,
            texts,
            budgets=shares or [artifact.budget if budget is None else budget],
            verify=[True, False] if verify is None else [verify],
            baselines=names,
            calibration=windows,
            protocol=Protocol(window, stride or None, prompt_tokens, progress),
        )
        print_curves(curves)
        write_figures(json_file, {**record, **curves, "host": host_record(loaded.device)})
        return
    if budget is not None or verify is not None:
        artifact = recut(loaded, artifact, budget=budget, verify=verify)
    results = []
    for source, tokens in texts:
        result = evaluate_quality(
            loaded,
            artifact,
            tokens,
            window=window,
            stride=stride or None,
            prompt_tokens=prompt_tokens,
            progress=progress,
        )
        print_quality(source, result)
        results.append({"data": source, **result})
    further = {"others": results[1:]} if len(results) > 1 else {}
    write_figures(
        json_file, {**record, **results[0], **further, "host": host_record(loaded.device)}
    )
