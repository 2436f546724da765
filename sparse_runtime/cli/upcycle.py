"""``upcycle``: a mixture of experts out of a dense model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sparse_runtime.cli.console import err, out
from sparse_runtime.cli.figures import check_output_folder, peak_memory_mib, write_figures
from sparse_runtime.cli.options import (
    AutoDtypeOption,
    CalibrationTokensOption,
    DataOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    TestOption,
    TestTokensOption,
    WindowOption,
    resolve_dtype,
)
from sparse_runtime.cli.progress import RichProgress
from sparse_runtime.cli.ranges import NOT_NEGATIVE, POSITIVE, TWO_OR_MORE
from sparse_runtime.cli.texts import (
    check_windows_fit,
    fit_sources,
    held_out_of,
    judged_source,
    warn_of_overlap,
)
from sparse_runtime.errors import ConfigError
from sparse_runtime.files import atomic_folder, check_new_folder
from sparse_runtime.models import load_model

_Output = Annotated[
    Path,
    typer.Option("-o", "--output", help="New folder of the mixture.", callback=check_output_folder),
]
_Experts = Annotated[
    int, typer.Option(help="Experts of each layer.", callback=TWO_OR_MORE.callback)
]
_Active = Annotated[
    int, typer.Option(help="Experts that a token takes.", callback=POSITIVE.callback)
]
_Distill = Annotated[
    int,
    typer.Option(
        help="Steps that tune the experts towards the dense model's predictions; 0: none.",
        callback=NOT_NEGATIVE.callback,
    ),
]


def upcycle(
    model: ModelArgument,
    output: _Output,
    experts: _Experts = 8,
    active: _Active = 4,
    data: DataOption = None,
    test: TestOption = None,
    distill: _Distill = 48,
    max_tokens: CalibrationTokensOption = 24_576,
    test_tokens: TestTokensOption = 4096,
    window: WindowOption = 512,
    seed: SeedOption = 0,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Make a Mixtral checkpoint of a dense Llama or Mistral, for trying experts on real weights."""
    from sparse_runtime.clusters.text import calibration_windows
    from sparse_runtime.eval.upcycling.mixtral import check_dense
    from sparse_runtime.eval.upcycling.upcycle import UpcycleConfig, compare, round_to
    from sparse_runtime.eval.upcycling.upcycle import upcycle as make_mixture

    if active > experts:
        raise ConfigError(
            f"--active is {active}; expected at most the number of --experts, {experts}"
        )
    config = UpcycleConfig(experts, active, distill, seed)
    check_windows_fit(window, {"--max-tokens": max_tokens, "--test-tokens": test_tokens})
    sources, judge = fit_sources(data), None if test is None else judged_source(test)
    check_new_folder(output)
    saved = resolve_dtype(dtype, device)
    started, progress = time.perf_counter(), RichProgress(err)
    # Fitted and measured in float32, whatever it is saved in.
    dense, tokenizer = load_model(model, dtype=torch.float32, device=device)
    check_dense(dense, experts)
    sources, tokens = held_out_of(
        sources, judge, tokenizer, max_tokens, test_tokens, window, dense, seed
    )
    text = calibration_windows(
        sources, tokenizer, max_tokens=max_tokens, window=window, seed=seed, model=dense
    )
    warn_of_overlap(test or sources[0].name, tokens, text.record)
    with atomic_folder(output) as folder:
        mixture, layers = make_mixture(
            dense, text.windows, config, work=folder / "work", progress=progress
        )
        round_to(mixture, saved)
        result = compare(dense, mixture, tokens, window=window, progress=progress)
        mixture.to(saved).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    seconds, peak = time.perf_counter() - started, peak_memory_mib()
    _print(output, result, layers, seconds, peak)
    record: dict[str, Any] = {"model": model, "experts": experts, "active": active}
    record |= {"distill": distill, "seed": seed, "dtype": str(saved).removeprefix("torch.")}
    record |= {"calibration": text.record, "test_tokens": len(tokens), "window": window}
    record |= {**result, "layers": layers, "seconds": seconds, "peak_memory_mib": peak}
    write_figures(json_file, record)


def _print(
    output: Path,
    result: dict[str, Any],
    layers: list[dict[str, Any]],
    seconds: float,
    peak: float | None,
) -> None:
    loads = [share for layer in layers for share in layer["load"]]
    memory = "" if peak is None else f", peak memory {peak:.0f} MiB"
    out.print(
        f"{output}: KL {result['kl']:.4f}, top-1 {result['top1']:.3f}, perplexity ÷ dense "
        f"{result['ratio']:.3f}; experts take {min(loads):.1%} to {max(loads):.1%} of the tokens; "
        f"{seconds:.0f} s{memory}",
        soft_wrap=True,
    )
