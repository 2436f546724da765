"""``bench`` and ``tune``: latency on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer

from sparse_runtime.api import sparse_modules, sparsify
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.cli.console import err, out
from sparse_runtime.cli.cutting import Cut, MaxLossDomainOption, MaxLossOption
from sparse_runtime.cli.figures import write_figures
from sparse_runtime.cli.options import (
    BudgetOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LinearWeightsOption,
    RampOption,
    RevisionOption,
    TauOption,
    WeightsOption,
    check_stages,
    plane_options,
)
from sparse_runtime.cli.progress import RichProgress
from sparse_runtime.cli.ranges import DENSITY, POSITIVE, TWO_OR_MORE, parse_numbers
from sparse_runtime.cli.tables import print_bench, print_rows
from sparse_runtime.errors import ConfigError
from sparse_runtime.models import load_model, parse_dtype

ModelOrNoneArgument = Annotated[str | None, typer.Argument(metavar="[MODEL]", help="As elsewhere.")]
ClustersOrNoneOption = Annotated[
    str | None, typer.Option("--clusters", help="Cluster artifact.", metavar="DIR")
]
ShapeOption = Annotated[
    str | None,
    typer.Option(help="Random weights of this shape: mistral-7b, smollm2-135m, qwen3-30b-a3b."),
]

# About what the demo model's clusters look at, for a budget of 0.4 to 0.5.
_LOOKED_AT = 0.65


def bench(
    model: ModelOrNoneArgument = None,
    clusters: ClustersOrNoneOption = None,
    revision: RevisionOption = None,
    shape: ShapeOption = None,
    layers: Annotated[
        int | None, typer.Option(callback=POSITIVE.callback, help="Layers of --shape.")
    ] = None,
    density: Annotated[
        str | None,
        typer.Option(help="Densities of --shape's random sets, with commas; 0.5 if not given."),
    ] = None,
    weights: WeightsOption = None,
    linear_weights: LinearWeightsOption = None,
    tau: TauOption = None,
    ramp: RampOption = None,
    budget: BudgetOption = None,
    max_loss: MaxLossOption = None,
    max_loss_domain: MaxLossDomainOption = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            help="With or without looks, whatever the artifact has; of --shape: also "
            "sets that looks decide on."
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(callback=TWO_OR_MORE.callback, help="Prompt length.")
    ] = 128,
    new_tokens: Annotated[
        int, typer.Option(callback=POSITIVE.callback, help="Decode steps per run.")
    ] = 16,
    repeats: Annotated[
        int, typer.Option(callback=POSITIVE.callback, help="Runs of each variant.")
    ] = 5,
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
    """FFN, prefill and decode latency, sparse beside dense in one run.

    With --weights or --linear-weights the sparse model is packed, the dense one stays float, and all
    neurons of the packed one are timed as well. Both are in memory.
    """
    sizes = [] if batches is None else parse_numbers("--batches", batches, int, POSITIVE)
    planes = _planes(device, plane_options(weights, linear_weights, tau, ramp))
    cut = Cut(budget, verify, max_loss, max_loss_domain)
    if shape is not None:
        if model is not None or clusters is not None or revision is not None:
            raise ConfigError(
                "--shape makes its own model and clusters; leave out MODEL, --clusters and --revision"
            )
        if budget is not None or max_loss is not None:
            option = "--max-loss" if budget is None else "--budget"
            raise ConfigError(f"{option} cuts an artifact's sets; --shape takes --density")
        densities = parse_numbers("--density", density or "0.5", float, DENSITY)
        loaded, artifacts = _of_shape(
            shape, layers, densities, parse_dtype(dtype), looks=bool(verify)
        )
    else:
        if model is None or clusters is None:
            raise ConfigError("give MODEL and --clusters DIR, or --shape")
        for option, value in (("--layers", layers), ("--density", density)):
            if value is not None:
                raise ConfigError(f"{option} is for --shape, and MODEL is given; leave it out")
        loaded, artifact = _of_artifact(model, clusters, revision, cut, dtype, device)
        artifacts = [artifact]
    check_stages(loaded, planes)
    options: dict[str, Any] = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    options |= {"repeats": repeats, "batches": sizes, "planes": planes}
    figures = _timed(shape or str(model), loaded, artifacts, device, options)
    record: dict[str, Any] = {"model": shape or model, "clusters": clusters, "planes": planes}
    write_figures(json_file, {**record, **asdict(cut), **figures})


def _planes(device: str | None, planes: dict[str, Any]) -> dict[str, Any]:
    """Options for weights in planes, none on a GPU. Raises ConfigError."""
    if planes and not _on_cpu(device):
        raise ConfigError(
            f"--{next(iter(planes)).replace('_', '-')} is timed on the CPU, and --device is "
            f"{device!r}; leave one of them out"
        )
    return planes


def _on_cpu(device: str | None) -> bool:
    return (device or "cpu").startswith("cpu")


def _timed(
    name: str,
    model: Any,
    artifacts: Sequence[ClusterSet],
    device: str | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Figures on a device, printed."""
    progress = RichProgress(err)
    if _on_cpu(device):
        from sparse_runtime.eval.latency.bench import bench as bench_cpu

        figures = bench_cpu(model, artifacts, progress=progress, **options)
        print_bench(name, figures)
        return figures
    from sparse_runtime.eval.latency.gpu import bench_gpu

    del options["planes"]
    options["batches"] = options["batches"] or [1, 8]
    figures = bench_gpu(model.to(device), artifacts, progress=progress, **options)
    title = f"one FFN, on {figures['inputs']}; a copy reaches {figures['copy_gbps']:.0f} GB/s"
    print_rows(title, figures["ffn"])
    print_rows("decode", figures["decode"])
    return figures


def _of_shape(
    shape: str, layers: int | None, densities: Sequence[float], dtype: torch.dtype, *, looks: bool
) -> tuple[Any, list[ClusterSet]]:
    """A model with random weights, and random clusters of several densities."""
    from sparse_runtime.eval.latency.shapes import random_clusters, random_model

    model = random_model(shape, layers=layers, dtype=dtype)
    return model, [
        random_clusters(model, density=share, looked=looked)
        for share in densities
        for looked in ([0.0, _LOOKED_AT] if looks else [0.0])
    ]


def _of_artifact(
    name: str,
    clusters: str,
    revision: str | None,
    cut: Cut,
    dtype: str,
    device: str | None,
) -> tuple[Any, ClusterSet]:
    """A model, and an artifact as users hold it who generate: without centroids."""
    artifact = cut.load(clusters, revision)
    model, _ = load_model(name, dtype=parse_dtype(dtype), device=device)
    if cut.wanted:
        artifact = cut.of(model, artifact)
        for layer in artifact.layers.values():
            layer.centroids = None
    return model, artifact


def tune(
    model: ModelOrNoneArgument = None,
    clusters: ClustersOrNoneOption = None,
    revision: RevisionOption = None,
    shape: ShapeOption = None,
    layers: Annotated[
        int, typer.Option(callback=POSITIVE.callback, help="Layers to measure on.")
    ] = 8,
    dtype: DtypeOption = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, …")] = "cuda",
    json_file: JsonOption = None,
) -> None:
    """Measure block sizes of the GPU kernels for this card and shape; kept in the user's cache."""
    from sparse_runtime.eval.latency.shapes import random_clusters, random_model

    if (shape is None) == (model is None) or (model is None) != (clusters is None):
        raise ConfigError("give MODEL and --clusters DIR, or --shape")
    if shape is not None and revision is not None:
        raise ConfigError("--revision is of --clusters, and --shape makes its own; leave it out")
    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise ConfigError(
            f"--device is {device!r}; expected a GPU, and torch finds "
            f"{torch.cuda.device_count()} of them. The CPU's kernels need no tuning"
        )
    if shape is not None:
        loaded: Any = random_model(shape, layers=layers, dtype=parse_dtype(dtype)).to(device)
        artifact = random_clusters(loaded, density=0.5, looked=_LOOKED_AT)
    else:
        loaded, _ = load_model(str(model), dtype=parse_dtype(dtype), device=device)
        artifact = ClusterSet.from_pretrained(str(clusters), revision=revision)
    from sparse_runtime.eval.latency.gpu_tuning import tune as run_tune

    sparsify(loaded, artifact, backend="triton", prefill="sparse")
    result = run_tune(sparse_modules(loaded)[:layers], progress=RichProgress(err))
    out.print(f"one FFN: {result['before_us']:.1f} → {result['after_us']:.1f} µs")
    for name, value in result["config"].items():
        out.print(f"{name} {value}")
    write_figures(json_file, result)
