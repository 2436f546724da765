"""``paper``, ``ablate``, ``ingredients`` and ``tasks``: studies of the method."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sparse_runtime.cli.console import err, out
from sparse_runtime.cli.cutting import Cut, MaxLossDomainOption, MaxLossOption
from sparse_runtime.cli.figures import write_figures
from sparse_runtime.cli.options import (
    AutoDtypeOption,
    BudgetOption,
    CalibrationTokensOption,
    ClustersOption,
    DataOption,
    DeviceOption,
    JsonOption,
    LinearWeightsOption,
    ModelArgument,
    NewBudgetOption,
    PercentileOption,
    RampOption,
    RevisionOption,
    SeedOption,
    TauOption,
    TestOption,
    TestTokensOption,
    VerifyOption,
    WeightsOption,
    WindowOption,
    check_stages,
    plane_options,
    resolve_dtype,
)
from sparse_runtime.cli.progress import RichProgress
from sparse_runtime.cli.ranges import (
    INNER_SHARE,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    parse_numbers,
)
from sparse_runtime.cli.tables import print_rows, print_tasks
from sparse_runtime.cli.texts import (
    check_windows_fit,
    fit_and_test,
    fit_sources,
    held_out_of,
    judged_source,
)
from sparse_runtime.cost import share_in_bits
from sparse_runtime.models import load_model


def paper(
    model: ModelArgument,
    data: DataOption = None,
    test: TestOption = None,
    clusters: Annotated[str, typer.Option(help="Values of K, with commas.")] = "256",
    densities: Annotated[
        str, typer.Option(help="Densities of the centroids, with commas.")
    ] = "0.6,0.7,0.8",
    layers: Annotated[
        str | None,
        typer.Option(help="Layers of the coverage table, with commas; all if not given."),
    ] = None,
    masks: Annotated[
        bool,
        typer.Option("--masks", help="Also perplexity under separate masks of gate, up and down."),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Beside binary k-means, factorization and a penalty."),
    ] = False,
    percentile: PercentileOption = 50.0,
    init: Annotated[str, typer.Option(help="random or kmeans++.")] = "random",
    seed: SeedOption = 0,
    max_tokens: CalibrationTokensOption = 32_768,
    test_tokens: TestTokensOption = 8192,
    window: WindowOption = 512,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Reproduce the AWC paper's figures; evaluation only, nothing is saved or skipped."""
    from sparse_runtime.eval.latency.host import host_record
    from sparse_runtime.eval.paper.tables import (
        paper_coverage,
        paper_perplexity,
        paper_settings,
    )

    counts, shares = (
        parse_numbers("--clusters", clusters, int, POSITIVE),
        parse_numbers("--densities", densities, float, INNER_SHARE),
    )
    chosen = None if layers is None else parse_numbers("--layers", layers, int, NOT_NEGATIVE)
    for count in counts:
        paper_settings(count, shares[0], init)  # raises before anything is loaded
    loaded, text, tokens, windows = fit_and_test(
        model, data, test, max_tokens, test_tokens, window, seed, dtype, device
    )
    options: dict[str, Any] = {"percentile": percentile, "init": init, "seed": seed}
    progress = RichProgress(err)
    result: dict[str, Any] = {"model": model, "data": text.record, "layers": chosen, **options}
    result["coverage"] = paper_coverage(
        loaded,
        text.windows,
        windows,
        clusters=counts,
        densities=shares,
        layers=chosen,
        compare=compare,
        progress=progress,
        **options,
    )
    print_rows("oracle ids, held-out text", result["coverage"])
    if masks:
        result["perplexity"] = paper_perplexity(
            loaded,
            text.windows,
            tokens,
            num_clusters=counts[0],
            densities=shares,
            window=window,
            progress=progress,
            **options,
        )
        _print_masks(result["perplexity"])
    write_figures(json_file, {**result, "host": host_record(loaded.device)})


def _print_masks(figures: dict[str, Any]) -> None:
    """Print the figures of ``paper_perplexity``."""
    out.print(
        f"perplexity: dense {figures['dense']:.2f}, thresholds only "
        f"{figures['thresholds_only']:.2f}; under separate masks:"
    )
    rows = []
    for row in figures["masks"]:
        scores = {
            f"{name} coverage": values["coverage"] for name, values in row["projections"].items()
        }
        rows.append({name: row[name] for name in ("density", "perplexity", "ratio")} | scores)
    print_rows("", rows)


def ablate(
    model: ModelArgument,
    data: DataOption = None,
    test: TestOption = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers, with commas; three spread over the model if not given."),
    ] = None,
    clusters: Annotated[str, typer.Option(help="Values of K, with commas.")] = "64,256,1024",
    percentiles: Annotated[
        str, typer.Option(help="Top percentiles p, with commas: sets hold 1 − p of the neurons.")
    ] = "0.2,0.4,0.6,0.8",
    sparsities: Annotated[
        str, typer.Option(help="Shares of zeros in the paper's patterns, with commas.")
    ] = "0.3,0.5,0.7",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0,1,2",
    max_tokens: CalibrationTokensOption = 16_384,
    test_tokens: TestTokensOption = 4096,
    window: WindowOption = 512,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Settings of the clustering, one changed at a time, by coverage on held-out text."""
    from sparse_runtime.eval.latency.host import host_record
    from sparse_runtime.eval.studies.ablation import Grid, ablate

    grid = Grid(
        clusters=tuple(parse_numbers("--clusters", clusters, int, POSITIVE)),
        top_percentiles=tuple(parse_numbers("--percentiles", percentiles, float, INNER_SHARE)),
        sparsities=tuple(parse_numbers("--sparsities", sparsities, float, INNER_SHARE)),
        seeds=tuple(parse_numbers("--seeds", seeds, int, SEED)),
    )
    chosen = None if layers is None else parse_numbers("--layers", layers, int, NOT_NEGATIVE)
    loaded, text, _, windows = fit_and_test(
        model, data, test, max_tokens, test_tokens, window, 0, dtype, device
    )
    rows = ablate(
        loaded,
        text.windows,
        windows,
        layers=chosen,
        grid=grid,
        progress=RichProgress(err),
    )
    names = ("coverage", "oracle_coverage", "static_coverage", "chance", "precision", "effective")
    shown = [
        {name: row[name] for name in ("method", "factor", "value", *names, "iterations")}
        for row in rows
    ]
    print_rows("held-out text, ids by a linear router", shown)
    record = {"model": model, "data": text.record, "rows": rows}
    write_figures(json_file, {**record, "host": host_record(loaded.device)})


def ingredients(
    model: ModelArgument,
    data: DataOption = None,
    test: TestOption = None,
    seeds: Annotated[str, typer.Option(help="Seeds of builds, with commas.")] = "0,1,2",
    budget: NewBudgetOption = 0.5,
    clusters: Annotated[
        int, typer.Option(callback=POSITIVE.callback, help="Clusters per layer.")
    ] = 256,
    router: Annotated[str, typer.Option(help="auto, linear, or a rank.")] = "auto",
    distill: Annotated[
        int, typer.Option(callback=POSITIVE.callback, help="Steps of distillation.")
    ] = 60,
    step_tokens: Annotated[
        int, typer.Option(callback=POSITIVE.callback, help="Tokens of a step.")
    ] = 1024,
    max_tokens: CalibrationTokensOption = 65_536,
    test_tokens: TestTokensOption = 8192,
    window: WindowOption = 512,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """What each ingredient of a build brings in the running model: alone, together, left out."""
    from sparse_runtime.clusters import BuildConfig
    from sparse_runtime.eval.latency.host import host_record
    from sparse_runtime.eval.studies.ingredients import measure_ingredients

    config = BuildConfig(
        num_clusters=clusters,
        budget=budget,
        router=router,
        distill=distill,
        correction_rank=16,
        max_tokens=max_tokens,
        window=window,
    )
    of_builds = parse_numbers("--seeds", seeds, int, SEED)
    check_windows_fit(window, {"--test-tokens": test_tokens})
    sources, test_text = fit_sources(data), None if test is None else judged_source(test)
    loaded, tokenizer = load_model(model, dtype=resolve_dtype(dtype, device), device=device)
    sources, tokens = held_out_of(
        sources, test_text, tokenizer, max_tokens, test_tokens, window, loaded
    )
    measured = measure_ingredients(
        loaded,
        tokenizer,
        sources,
        tokens,
        config=config,
        seeds=of_builds,
        step_tokens=step_tokens,
        progress=RichProgress(err),
    )
    print_rows("every token sparse, means over seeds", measured["rows"])
    write_figures(json_file, {"model": model, **measured, "host": host_record(loaded.device)})


def tasks(
    model: ModelArgument,
    clusters: ClustersOption,
    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            help="lambada=FILE, piqa=FILE, or a task of lm-eval, which reads it from the Hub; may be "
            "given again.",
            metavar="TASK",
        ),
    ],
    limit: Annotated[
        int, typer.Option(callback=NOT_NEGATIVE.callback, help="Documents of each task; 0 for all.")
    ] = 0,
    batch_size: Annotated[
        int, typer.Option(callback=POSITIVE.callback, help="Documents per call.")
    ] = 1,
    weights: WeightsOption = None,
    linear_weights: LinearWeightsOption = None,
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
    """Downstream tasks by lm-eval, every token sparse beside the dense model.

    With --weights or --linear-weights that is the float model, and the sparse one is packed.
    """
    from sparse_runtime.eval.latency.host import host_record
    from sparse_runtime.eval.quality.downstream import check_task, evaluate_tasks

    for spec in task:
        check_task(spec)
    planes = plane_options(weights, linear_weights, tau, ramp)
    cut = Cut(budget, verify, max_loss, max_loss_domain)
    artifact = cut.load(clusters, revision)
    loaded, tokenizer = load_model(model, dtype=resolve_dtype(dtype, device), device=device)
    check_stages(loaded, planes)
    artifact = cut.of(loaded, artifact)
    result = evaluate_tasks(
        loaded,
        tokenizer,
        artifact,
        task,
        planes=planes,
        limit=limit or None,
        batch_size=batch_size,
        progress=RichProgress(err),
    )
    print_tasks(result["rows"])
    bits = share_in_bits(result["cost_share"])
    out.print(
        f"cost share {result['cost_share']:.3f} ({bits:.2f} bits per FFN weight, "
        f"{result['bytes_per_token'] / 1e9:.3f} GB of weights per token); ± is the standard "
        "error over documents, of the difference paired"
    )
    record: dict[str, Any] = {"model": model, "clusters": clusters, "planes": planes}
    record |= {**result, "bits_per_weight": bits}
    write_figures(json_file, {**record, "host": host_record(loaded.device)})
