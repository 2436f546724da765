"""The command line ``sparse-runtime``: a thin edge over the library.

Every command takes ``--json FILE`` for its figures. Errors are one line on stderr: exit code 2 for
wrong usage, 1 for failure, 130 when interrupted.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import TextStreamer

from sparse_runtime.api import cost_report, dense, reset_cost, sparse_modules, sparsify
from sparse_runtime.atomic import write_json
from sparse_runtime.cluster_set import ClusterSet, check_output_folder
from sparse_runtime.errors import ConfigError, DataError, SparseRuntimeError
from sparse_runtime.models import load_model, parse_dtype
from sparse_runtime.progress import RichProgress
from sparse_runtime.recut import recut
from sparse_runtime.tables import (
    artifact_summary,
    out,
    print_bench,
    print_curves,
    print_quality,
    print_rows,
    print_summary,
)
from sparse_runtime.version import __version__

if TYPE_CHECKING:
    from sparse_runtime.clusters.data import CalibrationText

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
err = Console(stderr=True, highlight=False)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, local folder, or 'demo' (SmolLM2-135M).")
]
ClustersOption = Annotated[
    str, typer.Option("--clusters", help="Cluster artifact: folder or Hub id.", metavar="DIR")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the figures to this file.", metavar="FILE")
]
DtypeOption = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
AutoDtypeOption = Annotated[
    str,
    typer.Option(
        help="bfloat16, float16, float32, or auto: bfloat16 where the device computes in it, else "
        "float32, which is three times faster on such a CPU."
    ),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … [default: cpu]")]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Text: a .txt or .jsonl file, wikitext2, c4, a Hub data set, pydoc, or self. May be "
        "given again; each may end in ,weight=W ,key=A+B ,split=S.",
        metavar="SOURCE",
    ),
]
TestOption = Annotated[
    str | None, typer.Option(help="Held-out text; the data's test split if not given.")
]
BudgetOption = Annotated[
    float | None, typer.Option(help="Cut the sets for this cost share instead of their own.")
]
VerifyOption = Annotated[
    bool | None,
    typer.Option(help="With or without looks at low-bit copies, whatever the artifact has."),
]


def main() -> None:
    """Run the command line; every error ends as one line and an exit code."""
    try:
        app()
    except SparseRuntimeError as error:
        _fail(str(error), 2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if os.environ.get("SPARSE_RUNTIME_TRACEBACK"):
            raise
        reason = next(iter(str(error).splitlines()), "")
        _fail(
            f"{type(error).__name__}: {reason} (set SPARSE_RUNTIME_TRACEBACK=1 to see where; please "
            "report it if the input was right)",
            1,
        )


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Faster language models: read only the feed-forward neurons a token needs."""
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command()
def build(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the artifact.")],
    data: DataOption = None,
    method: Annotated[str, typer.Option(help="awc, or awc-paper (the paper's method).")] = "awc",
    importance: Annotated[
        str | None, typer.Option(help="fisher (default of awc), norm or binary.")
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(help="Budget over layers: global (one price; default of awc) or uniform."),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(help="Leave some neurons to a look at low-bit copies; default if global."),
    ] = None,
    loop_weights: Annotated[
        bool | None,
        typer.Option(help="Weigh layers by what they leave out in the loop; default if global."),
    ] = None,
    distill: Annotated[
        int | None,
        typer.Option(help="Steps that tune biases and corrections; 0: none. 60 if global."),
    ] = None,
    correction_rank: Annotated[
        int | None, typer.Option(help="Of a correction that is distilled too; none by default.")
    ] = None,
    clusters: Annotated[int, typer.Option(help="Clusters per layer.")] = 256,
    budget: Annotated[float, typer.Option(help="Mean cost share, router included.")] = 0.5,
    router: Annotated[str, typer.Option(help="auto, linear, or a rank.")] = "auto",
    max_tokens: Annotated[int, typer.Option(help="Calibration tokens; 0 for all.")] = 65_536,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    seed: Annotated[int, typer.Option(help="Of sampling, clustering and training.")] = 0,
    memory_mib: Annotated[int, typer.Option(help="Bound on buffers; above it, files.")] = 1024,
    percentile: Annotated[
        float | None, typer.Option(help="Threshold of binary patterns; 50 with them.")
    ] = None,
    paper_init: Annotated[
        str | None, typer.Option(help="awc-paper: random (default) or kmeans++.")
    ] = None,
    paper_pooled: Annotated[
        bool | None, typer.Option("--paper-pooled", help="awc-paper: one table for all layers.")
    ] = None,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Build clusters and routers for a model from calibration text; resumable."""
    from sparse_runtime.clusters import BuildConfig, build_clusters, tuning_line

    config = BuildConfig(
        method=method,  # type: ignore[arg-type]
        importance=importance,  # type: ignore[arg-type]
        allocation=allocation,  # type: ignore[arg-type]
        verify=verify,
        loop_weights=loop_weights,
        distill=distill,
        correction_rank=correction_rank,
        num_clusters=clusters,
        budget=budget,
        router=router,
        max_tokens=max_tokens or None,
        window=window,
        seed=seed,
        memory_mib=memory_mib,
        percentile=percentile,
        paper_init=paper_init,  # type: ignore[arg-type]
        paper_pooled=paper_pooled,
    )
    check_output_folder(output)
    started, times = time.perf_counter(), dict[str, float]()
    loaded, tokenizer = load_model(model, dtype=_dtype(dtype, device), device=device)
    try:
        artifact = build_clusters(
            loaded,
            tokenizer,
            data or ["wikitext2"],
            config,
            output=output,
            model_name=model,
            progress=RichProgress(err),
            times=times,
        )
    except KeyboardInterrupt:
        _fail(f"interrupted; run the same command again to go on, or delete {output}", 130)
    seconds = time.perf_counter() - started
    summary = artifact_summary(artifact)
    summary.update(seconds=times, seconds_total=seconds, peak_memory_mib=_peak_memory_mib())
    print_summary(str(output), summary)
    if "tuning" in artifact.build:
        out.print(tuning_line(artifact.build["tuning"]))
    _write(json_file, summary)


@app.command()
def generate(
    model: ModelArgument,
    clusters: ClustersOption,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Run dense too.")] = False,
    budget: BudgetOption = None,
    verify: VerifyOption = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Stream a continuation; print tokens/s and the cost share."""
    artifact = ClusterSet.from_pretrained(clusters, centroids=True)
    loaded, tokenizer = load_model(model, dtype=_dtype(dtype, device), device=device)
    sparsify(loaded, artifact, budget=budget, verify=verify)
    runs = {}
    for variant in ("dense", "sparse") if compare else ("sparse",):
        out.print(f"[bold]{variant}[/bold]")
        options: dict[str, Any] = {"temperature": temperature, "seed": seed}
        runs[variant] = _generate(
            loaded,
            tokenizer,
            prompt,
            variant,
            stream=True,
            max_new_tokens=max_new_tokens,
            **options,
        )
        rate = f"{runs[variant]['tokens_per_second']:.1f} tokens/s"
        out.print(f"[dim]{rate}, cost share {runs[variant]['cost_share']:.3f}[/dim]\n")
    _write(json_file, {"model": model, "prompt": prompt, **runs})


@app.command("eval")
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
    shares = None if budgets is None else _numbers("--budgets", budgets, float)
    names = baselines.split(",") if baselines is not None else []
    named_baselines(names)  # a wrong name shows before the model is loaded
    sources = data or ["wikitext2"]
    artifact = ClusterSet.from_pretrained(clusters, centroids=True)
    loaded, tokenizer = load_model(model, dtype=_dtype(dtype, device), device=device)
    artifact.check_model(loaded)
    texts = [(source, _held_out(source, tokenizer, max_tokens, loaded)) for source in sources]
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
        _write(json_file, {**record, **curves, "host": host_record(loaded.device)})
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
    _write(json_file, {**record, **results[0], **further, "host": host_record(loaded.device)})


@app.command()
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
    percentile: Annotated[float, typer.Option(help="Threshold of the patterns.")] = 50.0,
    init: Annotated[str, typer.Option(help="random or kmeans++.")] = "random",
    seed: Annotated[int, typer.Option(help="Of windows and initialization.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Calibration tokens.")] = 32_768,
    test_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the held-out text.")] = 8192,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Reproduce the AWC paper's figures; evaluation only, nothing is saved or skipped."""
    from sparse_runtime.eval.host import host_record
    from sparse_runtime.eval.paper import paper_coverage, paper_perplexity

    counts, shares = (
        _numbers("--clusters", clusters, int),
        _numbers("--densities", densities, float),
    )
    chosen = None if layers is None else _numbers("--layers", layers, int)
    loaded, text, tokens, windows = _fit_and_test(
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
        figures = result["perplexity"]
        out.print(
            f"perplexity: dense {figures['dense']:.2f}, thresholds only "
            f"{figures['thresholds_only']:.2f}; under separate masks:"
        )
        rows = []
        for row in figures["masks"]:
            scores = {
                f"{name} coverage": values["coverage"]
                for name, values in row["projections"].items()
            }
            rows.append({name: row[name] for name in ("density", "perplexity", "ratio")} | scores)
        print_rows("", rows)
    _write(json_file, {**result, "host": host_record(loaded.device)})


@app.command()
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
    max_tokens: Annotated[int, typer.Option(min=1, help="Calibration tokens.")] = 16_384,
    test_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the held-out text.")] = 4096,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Settings of the clustering, one changed at a time, by coverage on held-out text."""
    from sparse_runtime.eval.ablation import Grid, ablate
    from sparse_runtime.eval.host import host_record

    grid = Grid(
        clusters=tuple(_numbers("--clusters", clusters, int)),
        top_percentiles=tuple(_numbers("--percentiles", percentiles, float)),
        sparsities=tuple(_numbers("--sparsities", sparsities, float)),
        seeds=tuple(_numbers("--seeds", seeds, int)),
    )
    chosen = None if layers is None else _numbers("--layers", layers, int)
    loaded, text, _, windows = _fit_and_test(
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
    _write(json_file, {**record, "host": host_record(loaded.device)})


@app.command()
def ingredients(
    model: ModelArgument,
    data: DataOption = None,
    test: TestOption = None,
    seeds: Annotated[str, typer.Option(help="Seeds of builds, with commas.")] = "0,1,2",
    budget: Annotated[float, typer.Option(help="Mean cost share, router included.")] = 0.5,
    clusters: Annotated[int, typer.Option(help="Clusters per layer.")] = 256,
    router: Annotated[str, typer.Option(help="auto, linear, or a rank.")] = "auto",
    distill: Annotated[int, typer.Option(min=1, help="Steps of distillation.")] = 60,
    step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=1, help="Calibration tokens.")] = 65_536,
    test_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the held-out text.")] = 8192,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """What each ingredient of a build brings in the running model: alone, together, left out."""
    from sparse_runtime.clusters import BuildConfig
    from sparse_runtime.clusters.data import parse_source
    from sparse_runtime.eval.host import host_record
    from sparse_runtime.eval.ingredients import measure_ingredients

    config = BuildConfig(
        num_clusters=clusters,
        budget=budget,
        router=router,
        distill=distill,
        correction_rank=16,
        max_tokens=max_tokens,
        window=window,
    )
    of_builds = _numbers("--seeds", seeds, int)
    sources = data or ["wikitext2"]
    loaded, tokenizer = load_model(model, dtype=_dtype(dtype, device), device=device)
    tokens = _held_out(test or sources[0], tokenizer, test_tokens, loaded)
    measured = measure_ingredients(
        loaded,
        tokenizer,
        [parse_source(source) for source in sources],
        tokens,
        config=config,
        seeds=of_builds,
        step_tokens=step_tokens,
        progress=RichProgress(err),
    )
    print_rows("every token sparse, means over seeds", measured["rows"])
    _write(json_file, {"model": model, **measured, "host": host_record(loaded.device)})


@app.command()
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
    limit: Annotated[int, typer.Option(min=0, help="Documents of each task; 0 for all.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents per call.")] = 1,
    budget: BudgetOption = None,
    verify: VerifyOption = None,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Downstream tasks by lm-eval, every token sparse beside the dense model."""
    from sparse_runtime.eval.downstream import evaluate_tasks
    from sparse_runtime.eval.host import host_record

    artifact = ClusterSet.from_pretrained(clusters, centroids=True)
    loaded, tokenizer = load_model(model, dtype=_dtype(dtype, device), device=device)
    if budget is not None or verify is not None:
        artifact = recut(loaded, artifact, budget=budget, verify=verify)
    result = evaluate_tasks(
        loaded,
        tokenizer,
        artifact,
        task,
        limit=limit or None,
        batch_size=batch_size,
        progress=RichProgress(err),
    )
    table = Table("task", "metric", "documents", "dense", "sparse")
    for row in result["rows"]:
        table.add_row(
            row["task"],
            row["metric"],
            str(row["documents"]),
            *(
                f"{row[side]:.3f}"
                + (f" ± {row[f'{side}_error']:.3f}" if row[f"{side}_error"] else "")
                for side in ("dense", "sparse")
            ),
        )
    out.print(table)
    out.print(f"cost share {result['cost_share']:.3f}; ± is the standard error over documents")
    record = {"model": model, "clusters": clusters, **result}
    _write(json_file, {**record, "host": host_record(loaded.device)})


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="As elsewhere.")] = None,
    clusters: Annotated[
        str | None, typer.Option("--clusters", help="Cluster artifact.", metavar="DIR")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights of this shape: mistral-7b, smollm2-135m.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of --shape.")] = None,
    density: Annotated[
        str | None,
        typer.Option(help="Densities of --shape's random sets, with commas; 0.5 if not given."),
    ] = None,
    budget: BudgetOption = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            help="With or without looks at low-bit copies, whatever the artifact has; of --shape: also "
            "sets that low-bit copies decide on."
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Prompt length.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Decode steps per run.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each variant.")] = 5,
    batches: Annotated[
        str | None,
        typer.Option(
            help="Further batch sizes to decode, with commas; on a GPU, tokens per call of an FFN, "
            "and 1 and 8 are decoded."
        ),
    ] = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """FFN, prefill and decode latency, sparse beside dense in one run."""
    from sparse_runtime.eval.shapes import random_clusters, random_model

    on_cpu = (device or "cpu").startswith("cpu")
    sizes = [] if batches is None else _numbers("--batches", batches, int)
    if shape is not None:
        if model is not None or clusters is not None:
            raise ConfigError(
                "--shape makes its own model and clusters; leave MODEL and --clusters"
            )
        if budget is not None:
            raise ConfigError("--budget cuts an artifact's sets; --shape takes --density")
        densities = _numbers("--density", density or "0.5", float)
        loaded: Any = random_model(shape, layers=layers, dtype=parse_dtype(dtype))
        # About what the demo model's clusters look at, for a budget of 0.4 to 0.5.
        looked_at = [0.0, 0.65] if verify else [0.0]
        artifacts = [
            random_clusters(loaded, density=share, looked=looked)
            for share in densities
            for looked in looked_at
        ]
    else:
        if model is None or clusters is None:
            raise ConfigError("give MODEL and --clusters DIR, or --shape")
        for option, value in (("--layers", layers), ("--density", density)):
            if value is not None:
                raise ConfigError(f"{option} is for --shape, and MODEL is given; leave it out")
        cut = budget is not None or verify is not None
        artifact = ClusterSet.from_pretrained(clusters, centroids=cut)
        loaded, _ = load_model(model, dtype=parse_dtype(dtype), device=device)
        if cut:
            artifact = recut(loaded, artifact, budget=budget, verify=verify)
            for layer in artifact.layers.values():
                layer.centroids = None  # a user who generates does not hold them
        artifacts = [artifact]
    if not on_cpu:
        from sparse_runtime.eval.gpu_latency import bench_gpu

        figures = bench_gpu(
            loaded.to(device),
            artifacts,
            batches=sizes or [1, 8],
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            progress=RichProgress(err),
        )
        print_rows(f"one FFN; a copy reaches {figures['copy_gbps']:.0f} GB/s", figures["ffn"])
        print_rows("decode", figures["decode"])
        _write(json_file, {"model": shape or model, "clusters": clusters, **figures})
        return
    from sparse_runtime.eval.latency import bench as run_bench

    result = run_bench(
        loaded,
        artifacts,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        batches=sizes,
        progress=RichProgress(err),
    )
    print_bench(shape or str(model), result)
    record = {"model": shape or model, "clusters": clusters, "budget": budget, "verify": verify}
    _write(json_file, record | result)


@app.command()
def tune(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="As elsewhere.")] = None,
    clusters: Annotated[
        str | None, typer.Option("--clusters", help="Cluster artifact.", metavar="DIR")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights of this shape: mistral-7b, smollm2-135m.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers to measure on.")] = 8,
    dtype: DtypeOption = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, …")] = "cuda",
    json_file: JsonOption = None,
) -> None:
    """Measure block sizes of the GPU kernels for this card and shape; kept in the user's cache."""
    from sparse_runtime.eval.shapes import random_clusters, random_model

    if (shape is None) == (model is None) or (model is None) != (clusters is None):
        raise ConfigError("give MODEL and --clusters DIR, or --shape")
    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise ConfigError(
            f"--device is {device!r}; expected a GPU, and torch finds "
            f"{torch.cuda.device_count()} of them. The CPU's kernels need no tuning"
        )
    if shape is not None:
        loaded: Any = random_model(shape, layers=layers, dtype=parse_dtype(dtype)).to(device)
        artifact = random_clusters(loaded, density=0.5, looked=0.65)
    else:
        loaded, _ = load_model(str(model), dtype=parse_dtype(dtype), device=device)
        artifact = ClusterSet.from_pretrained(str(clusters))
    from sparse_runtime.eval.gpu_tuning import tune as run_tune

    sparsify(loaded, artifact, backend="triton", prefill="sparse")
    result = run_tune(sparse_modules(loaded)[:layers], progress=RichProgress(err))
    out.print(f"one FFN: {result['before_us']:.1f} → {result['after_us']:.1f} µs")
    for name, value in result["config"].items():
        out.print(f"{name} {value}")
    _write(json_file, result)


@app.command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder with figures that other commands wrote with --json: eval.json, quality.json "
            "and decode_only.json (eval --budgets), ablation.json, paper.json, tasks.json, "
            "bench.json; an artifact in clusters/.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="HTML file. [default: DIR/report.html]")
    ] = None,
) -> None:
    """One self-contained HTML page with tables and plots; every plot as PNG and SVG beside it."""
    from sparse_runtime.eval.report import write_report
    from sparse_runtime.eval.run_folder import RunFolder

    page = output or folder / "report.html"
    write_report(RunFolder.read(folder), page)
    out.print(f"report in {page}, its figures in {page.parent / 'figures'}")


@app.command()
def inspect(
    clusters: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id.")],
    json_file: JsonOption = None,
) -> None:
    """Show what an artifact holds."""
    summary = artifact_summary(ClusterSet.from_pretrained(clusters))
    print_summary(clusters, summary)
    _write(json_file, summary)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to work in.")] = Path(
        "runs/demo"
    ),
    json_file: JsonOption = None,
) -> None:
    """Build, generate and judge on the bundled small model; a second run reuses the artifact."""
    from sparse_runtime.eval.demo import run_demo

    result = run_demo(output, out, RichProgress(err), _generate, _dtype("auto", None))
    print_quality("pydoc, held-out topics", result["quality"])
    write_json(output / "demo.json", result)
    _write(json_file, result)
    out.print(f"artifact in {output / 'clusters'}, figures in {output / 'demo.json'}")


def _fit_and_test(
    model: str,
    data: list[str] | None,
    test: str | None,
    max_tokens: int,
    test_tokens: int,
    window: int,
    seed: int,
    dtype: str,
    device: str | None,
) -> tuple[Any, CalibrationText, torch.Tensor, torch.Tensor]:
    """A model, calibration text, and the tokens of held-out text, also as windows [W, window]."""
    from sparse_runtime.clusters.data import calibration_windows, parse_source

    sources = data or ["wikitext2"]
    loaded, tokenizer = load_model(model, dtype=_dtype(dtype, device), device=device)
    text = calibration_windows(
        [parse_source(source) for source in sources],
        tokenizer,
        max_tokens=max_tokens,
        window=window,
        seed=seed,
        model=loaded,
    )
    tokens = _held_out(test or sources[0], tokenizer, test_tokens, loaded)
    whole = len(tokens) // window
    if whole == 0:
        raise DataError(f"the held-out text has {len(tokens)} tokens; expected {window} or more")
    return loaded, text, tokens, tokens[: whole * window].view(whole, window)


def _held_out(source: str, tokenizer: Any, max_tokens: int, model: Any) -> torch.Tensor:
    """First tokens of held-out text [n]."""
    from sparse_runtime.clusters.data import parse_source, token_stream

    return token_stream(
        parse_source(source), tokenizer, max_tokens=max_tokens, split="test", model=model
    )


def _generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    variant: str,
    *,
    stream: bool,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ConfigError("--prompt is empty; expected some text")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    reset_cost(model)
    torch.manual_seed(seed)
    started = time.perf_counter()
    with torch.inference_mode():
        if variant == "dense":
            with dense(model):
                tokens = model.generate(
                    **inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling
                )
        else:
            tokens = model.generate(
                **inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling
            )
    seconds = time.perf_counter() - started
    new_tokens = tokens[0, inputs["input_ids"].shape[1] :]
    report = cost_report(model)
    return {
        "text": tokenizer.decode(new_tokens, skip_special_tokens=True),
        "new_tokens": len(new_tokens),
        "tokens_per_second": len(new_tokens) / seconds,
        "cost_share": report.cost_share,
        "sparse_share_of_tokens": report.sparse_share_of_tokens,
    }


def _dtype(text: str, device: str | None) -> torch.dtype:
    if text != "auto":
        return parse_dtype(text)
    native = not (device or "cpu").startswith("cpu") or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} is {text!r}; expected numbers separated by commas, such as "
            + ("256,1024" if kind is int else "0.6,0.7")
        ) from None


def _write(json_file: Path | None, value: dict[str, Any]) -> None:
    if json_file is not None:
        write_json(json_file, value)


def _peak_memory_mib() -> float:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform != "darwin" else peak / 2**20


def _fail(message: str, code: int) -> None:
    err.print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True)
    raise SystemExit(code)
