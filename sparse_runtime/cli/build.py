"""``build`` and ``inspect``: make an artifact, and show what one holds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from sparse_runtime.cli.console import err, fail
from sparse_runtime.cli.figures import peak_memory_mib, write_figures
from sparse_runtime.cli.options import (
    AutoDtypeOption,
    DataOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    resolve_dtype,
)
from sparse_runtime.cli.progress import RichProgress
from sparse_runtime.cli.tables import artifact_summary, print_summary
from sparse_runtime.cluster_set import ClusterSet, check_output_folder
from sparse_runtime.models import load_model


def build(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the artifact.")],
    data: DataOption = None,
    method: Annotated[str, typer.Option(help="awc, or awc-paper (the paper's method).")] = "awc",
    importance: Annotated[str, typer.Option(help="fisher, norm or binary.")] = "fisher",
    allocation: Annotated[
        str, typer.Option(help="Budget over layers: global (one price) or uniform.")
    ] = "global",
    verify: Annotated[
        bool, typer.Option(help="Leave some neurons to a look at low-bit copies.")
    ] = True,
    loop_weights: Annotated[
        bool, typer.Option(help="Weigh layers by what they leave out of the sparse model.")
    ] = True,
    distill: Annotated[
        int,
        typer.Option(help="Steps that tune biases and corrections by the dense model; 0: none."),
    ] = 60,
    correction_rank: Annotated[int, typer.Option(help="Of the distilled correction.")] = 16,
    clusters: Annotated[int, typer.Option(help="Clusters per layer.")] = 256,
    budget: Annotated[float, typer.Option(help="Mean cost share, router included.")] = 0.5,
    router: Annotated[str, typer.Option(help="auto, linear, or a rank.")] = "auto",
    max_tokens: Annotated[int, typer.Option(help="Calibration tokens; 0 for all.")] = 65_536,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    seed: Annotated[int, typer.Option(help="Of sampling, clustering and training.")] = 0,
    memory_mib: Annotated[int, typer.Option(help="Bound on buffers; above it, files.")] = 1024,
    percentile: Annotated[float, typer.Option(help="Threshold of binary patterns.")] = 50.0,
    paper_init: Annotated[str, typer.Option(help="awc-paper: random or kmeans++.")] = "random",
    paper_pooled: Annotated[
        bool, typer.Option("--paper-pooled", help="awc-paper: one table for all layers.")
    ] = False,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Build clusters and routers for a model from calibration text; resumable."""
    from sparse_runtime.clusters import BuildConfig, build_clusters

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
    started = time.perf_counter()
    loaded, tokenizer = load_model(model, dtype=resolve_dtype(dtype, device), device=device)
    try:
        artifact = build_clusters(
            loaded,
            tokenizer,
            data or ["wikitext2"],
            config,
            output=output,
            model_name=model,
            progress=RichProgress(err),
        )
    except KeyboardInterrupt:
        fail(f"interrupted; run the same command again to go on, or delete {output}", 130)
    seconds = time.perf_counter() - started
    summary = artifact_summary(artifact)
    summary.update(seconds_total=seconds, peak_memory_mib=peak_memory_mib())
    print_summary(str(output), summary)
    write_figures(json_file, summary)


def inspect(
    clusters: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id.")],
    json_file: JsonOption = None,
) -> None:
    """Show what an artifact holds."""
    summary = artifact_summary(ClusterSet.from_pretrained(clusters))
    print_summary(clusters, summary)
    write_figures(json_file, summary)
