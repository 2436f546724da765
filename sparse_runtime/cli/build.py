"""``build`` and ``inspect``: make an artifact, and show what one holds."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer

from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.folders import check_output_folder as check_holds_artifact
from sparse_runtime.artifact.format import WORK_FOLDER
from sparse_runtime.cli.console import err, fail, note, out, warn
from sparse_runtime.cli.figures import check_output_folder, peak_memory_mib, write_figures
from sparse_runtime.cli.options import (
    AutoDtypeOption,
    DataOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    RevisionOption,
    SeedOption,
    WindowOption,
    budget_option,
    resolve_dtype,
)
from sparse_runtime.cli.progress import RichProgress
from sparse_runtime.cli.ranges import NOT_NEGATIVE, PERCENTAGE, PLANE_BITS, POSITIVE
from sparse_runtime.cli.tables import artifact_summary, clock, print_estimate, print_summary
from sparse_runtime.cli.texts import fit_sources
from sparse_runtime.errors import OutputFolderError
from sparse_runtime.files import free_space
from sparse_runtime.models import load_model
from sparse_runtime.models.onloading import is_offloaded
from sparse_runtime.progress import SilentProgress

if TYPE_CHECKING:
    from sparse_runtime.clusters import BuildConfig, BuildEstimate


_Output = Annotated[
    Path,
    typer.Option(
        "-o",
        "--output",
        help="Folder of the artifact.",
        callback=check_output_folder,
    ),
]
_Weights = Annotated[
    int | None,
    typer.Option(
        help="Build for weights packed in planes of so many bits: 3 to 8.",
        callback=PLANE_BITS.callback,
    ),
]
_Budget = Annotated[
    float | None,
    budget_option(
        "Mean cost share (0.25), or bits per FFN weight and token (4.0bits), router included; "
        "0.5, or 0.64 of what planes take."
    ),
]
_Packed = Annotated[
    Path | None,
    typer.Option(
        help="With --weights: new folder for the packed model, which the artifact fits best.",
        metavar="FOLDER",
    ),
]
_Importance = Annotated[str | None, typer.Option(help="fisher (default of awc), norm or binary.")]
_Allocation = Annotated[
    str | None,
    typer.Option(help="Budget over layers: global (one price; default of awc) or uniform."),
]
_Verify = Annotated[
    bool | None,
    typer.Option(help="Leave some neurons to a look; default if global."),
]
_LoopWeights = Annotated[
    bool | None,
    typer.Option(help="Weigh layers by what they leave out in the loop; default if global."),
]
_TuneTokens = Annotated[
    int | None,
    typer.Option(
        callback=NOT_NEGATIVE.callback,
        help="Tokens on which biases are tuned layer by layer; 0: none. 16384 if global.",
    ),
]
_Distill = Annotated[
    int | None,
    typer.Option(
        callback=NOT_NEGATIVE.callback,
        help="Steps of distillation that tune biases, and a correction, further; 0: none. 20 if global "
        "and the model is in memory.",
    ),
]
_CorrectionRank = Annotated[
    int | None,
    typer.Option(
        callback=NOT_NEGATIVE.callback,
        help="Of a correction that is distilled too; none by default.",
    ),
]
_MemoryMib = Annotated[
    int, typer.Option(callback=POSITIVE.callback, help="Bound on buffers; above it, files.")
]
_Percentile = Annotated[
    float | None,
    typer.Option(callback=PERCENTAGE.callback, help="Threshold of binary patterns; 50 with them."),
]
_PaperInit = Annotated[str | None, typer.Option(help="awc-paper: random (default) or kmeans++.")]
_PaperPooled = Annotated[
    bool | None, typer.Option("--paper-pooled", help="awc-paper: one table for all layers.")
]


_Offload = Annotated[
    bool | None,
    typer.Option(
        "--offload/--no-offload",
        help="Leave the decoder layers on the disk and load one at a time; by default where the model "
        "takes more than half of the free memory.",
    ),
]


_DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what a build would take, from a short measurement."),
]


@dataclass(frozen=True)
class _Loading:
    """How the model is loaded; as of ``load_model``."""

    dtype: str
    device: str | None
    offload: bool | None


def build(
    model: ModelArgument,
    output: _Output,
    data: DataOption = None,
    method: Annotated[str, typer.Option(help="awc, or awc-paper (the paper's method).")] = "awc",
    importance: _Importance = None,
    allocation: _Allocation = None,
    verify: _Verify = None,
    loop_weights: _LoopWeights = None,
    tune_tokens: _TuneTokens = None,
    distill: _Distill = None,
    correction_rank: _CorrectionRank = None,
    clusters: Annotated[
        int, typer.Option(callback=POSITIVE.callback, help="Clusters per layer.")
    ] = 256,
    weights: _Weights = None,
    packed: _Packed = None,
    budget: _Budget = None,
    router: Annotated[str, typer.Option(help="auto, linear, or a rank.")] = "auto",
    max_tokens: Annotated[
        int, typer.Option(callback=NOT_NEGATIVE.callback, help="Calibration tokens; 0 for all.")
    ] = 65_536,
    window: WindowOption = 512,
    seed: SeedOption = 0,
    memory_mib: _MemoryMib = 1024,
    percentile: _Percentile = None,
    paper_init: _PaperInit = None,
    paper_pooled: _PaperPooled = None,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    offload: _Offload = None,
    dry_run: _DryRun = False,
    json_file: JsonOption = None,
) -> None:
    """Build clusters and routers for a model from calibration text; resumable."""
    from sparse_runtime.clusters import BuildConfig

    config = BuildConfig(
        method=method,  # type: ignore[arg-type]
        importance=importance,  # type: ignore[arg-type]
        allocation=allocation,  # type: ignore[arg-type]
        verify=verify,
        loop_weights=loop_weights,
        tune_tokens=tune_tokens,
        distill=distill,
        correction_rank=correction_rank,
        num_clusters=clusters,
        weights=weights,
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
    loading = _Loading(dtype, device, offload)
    if dry_run:
        write_figures(json_file, _estimated(model, output, data, config, loading))
        return
    summary = _build(model, output, data, config, packed, loading)
    write_figures(json_file, summary)


def _build(
    model: str,
    output: Path,
    data: list[str] | None,
    config: BuildConfig,
    packed: Path | None,
    loading: _Loading,
) -> dict[str, Any]:
    """Build and say what came of it; the same as JSON."""
    from sparse_runtime.clusters import build_clusters, estimate_build, tuning_lines
    from sparse_runtime.clusters.ranks import Ranks

    first = _join_processes(loading.device)
    check_holds_artifact(output)
    sources = fit_sources(data, default="general", sampled=not loading.offload)
    started, times = time.perf_counter(), dict[str, float]()
    dtype = resolve_dtype(loading.dtype, loading.device)
    loaded, tokenizer = load_model(
        model, dtype=dtype, device=loading.device, offload=loading.offload
    )
    if is_offloaded(loaded) and loading.offload is None:
        note("the model takes more than half of the free memory: its layers stay on the disk")
        sources = fit_sources(data, default="general", sampled=False)
    estimate = estimate_build(loaded, config, sources, processes=Ranks.current().count)
    _check_room(estimate, output)
    note(f"about {clock(estimate.seconds)} in all; --dry-run shows the stages")
    try:
        artifact = build_clusters(
            loaded,
            tokenizer,
            sources,
            config,
            output=output,
            packed_output=packed,
            model_name=model,
            progress=RichProgress(err) if first else SilentProgress(),
            times=times,
            estimate=estimate,
        )
    except KeyboardInterrupt:
        fail(f"interrupted; run the same command again to go on, or delete {output}", 130)
    seconds, peak = time.perf_counter() - started, peak_memory_mib()
    summary = artifact_summary(artifact)
    if not first:
        raise typer.Exit
    print_summary(str(output), summary)
    for line in tuning_lines(artifact.build):
        out.print(line)
    memory = "" if peak is None else f", peak memory {peak:.0f} MiB"
    out.print(f"{seconds:.0f} s in all, {estimate.seconds:.0f} s expected{memory}")
    figures = {"seconds": times, "seconds_total": seconds, "peak_memory_mib": peak}
    return summary | figures | {"estimate": estimate.record()}


def _check_room(estimate: BuildEstimate, output: Path) -> None:
    """Say before the work what room it will not find.

    Raises:
        OutputFolderError: the disk has too little.
    """
    work = output / WORK_FOLDER
    there = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    free = free_space(output)
    if estimate.disk > free + there:
        raise OutputFolderError(
            f"{output} has {free / 2**20:.0f} MiB of disk free, but the build needs about "
            f"{(estimate.disk - there) / 2**20:.0f} for what it keeps meanwhile; free some space, "
            "choose another output folder or lower --max-tokens"
        )
    memory = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    if estimate.memory > memory:
        warn(
            f"the build needs about {estimate.memory / 2**30:.1f} GiB of memory, and "
            f"{memory / 2**30:.1f} are free; lower --memory-mib, the bound on buffers, or leave the "
            "model's layers on the disk (--offload)"
        )


def _estimated(
    model: str, output: Path, data: list[str] | None, config: BuildConfig, loading: _Loading
) -> dict[str, Any]:
    """Print what a build would take; the same as JSON."""
    from sparse_runtime.clusters import estimate_build

    dtype = resolve_dtype(loading.dtype, loading.device)
    loaded, _ = load_model(model, dtype=dtype, device=loading.device, offload=loading.offload)
    sources = fit_sources(data, default="general", sampled=not is_offloaded(loaded))
    estimate = estimate_build(loaded, config, sources)
    free = free_space(output)
    print_estimate(estimate.record(), free)
    return estimate.record() | {"disk_free": free, "offloaded": is_offloaded(loaded)}


def _join_processes(device: str | None) -> bool:
    """Join the others that `accelerate launch` or `torchrun` has started; whether this one prints."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from accelerate import PartialState

    state = PartialState(cpu=(device or "cpu").startswith("cpu"))
    if not state.is_main_process:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        out.quiet = err.quiet = True
    return bool(state.is_main_process)


def inspect(
    clusters: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id.")],
    revision: RevisionOption = None,
    json_file: JsonOption = None,
) -> None:
    """Show what an artifact holds."""
    summary = artifact_summary(ClusterSet.from_pretrained(clusters, revision=revision))
    print_summary(clusters, summary)
    write_figures(json_file, summary)
