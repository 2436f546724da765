"""``pack``: a model folder with weights in planes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_runtime.cli.console import err, out
from sparse_runtime.cli.figures import check_output_folder, peak_memory_mib, write_figures
from sparse_runtime.cli.options import (
    AutoDtypeOption,
    CompensateOption,
    DataOption,
    DeviceOption,
    JsonOption,
    LinearWeightsOption,
    ModelArgument,
    SeedOption,
    WindowOption,
    resolve_dtype,
)
from sparse_runtime.cli.progress import RichProgress
from sparse_runtime.cli.ranges import PLANE_BITS, POSITIVE
from sparse_runtime.cli.texts import check_windows_fit, fit_sources
from sparse_runtime.errors import ConfigError
from sparse_runtime.files import atomic_folder, check_new_folder
from sparse_runtime.models import load_model

_Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", help="Folder of the packed model.", callback=check_output_folder
    ),
]
_Weights = Annotated[
    int,
    typer.Option(
        help="Bits of the FFNs' weights: 3, 4, 5, 6, 7 or 8.", callback=PLANE_BITS.callback
    ),
]
_Tokens = Annotated[
    int | None,
    typer.Option(
        callback=POSITIVE.callback, help="Calibration tokens, with --data [default: 16384]"
    ),
]
_DEFAULT_TOKENS = 16_384


def pack(
    model: ModelArgument,
    output: _Output,
    weights: _Weights = 6,
    linear_weights: LinearWeightsOption = None,
    data: DataOption = None,
    compensate: CompensateOption = None,
    max_tokens: _Tokens = None,
    window: WindowOption = 512,
    seed: SeedOption = 0,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Pack a model's weights into planes and save it; better rounded with --data."""
    if not data:
        for option, value in (("--compensate", compensate), ("--max-tokens", max_tokens)):
            if value is not None:
                raise ConfigError(f"{option} has no effect without calibration text; give --data")
    tokens = max_tokens or _DEFAULT_TOKENS
    check_windows_fit(window, {"--max-tokens": tokens})
    sources = fit_sources(data) if data else []
    check_new_folder(output)
    started = time.perf_counter()
    loaded, tokenizer = load_model(model, dtype=resolve_dtype(dtype, device), device=device)
    record: dict[str, Any] = {"model": model, "weights": weights, "linear_weights": linear_weights}
    # Before the work, as what is in the way would be found after it.
    with atomic_folder(output) as folder:
        if sources:
            record |= _calibrated(
                loaded,
                tokenizer,
                sources,
                weights,
                linear_weights,
                compensate=compensate is not False,
                max_tokens=tokens,
                window=window,
                seed=seed,
            )
        else:
            from sparse_runtime.ffn.plane_packing import pack_model

            pack_model(loaded, weights, linears=linear_weights)
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
    seconds, peak = time.perf_counter() - started, peak_memory_mib()
    memory = "" if peak is None else f", peak memory {peak:.0f} MiB"
    out.print(f"{output}: {size / 2**20:.0f} MiB, {seconds:.0f} s{memory}", soft_wrap=True)
    record |= {"bytes": size, "seconds": seconds, "peak_memory_mib": peak}
    write_figures(json_file, record)


def _calibrated(
    model: Any,
    tokenizer: Any,
    sources: Any,
    weights: int,
    linear_weights: int | None,
    *,
    compensate: bool,
    max_tokens: int,
    window: int,
    seed: int,
) -> dict[str, Any]:
    """Pack by calibration text, and say what it was."""
    from sparse_runtime.clusters import pack_calibrated
    from sparse_runtime.clusters.text import calibration_windows

    text = calibration_windows(
        sources, tokenizer, max_tokens=max_tokens, window=window, seed=seed, model=model
    )
    pack_calibrated(
        model,
        text.windows,
        weights,
        linears=linear_weights,
        compensate=compensate,
        progress=RichProgress(err),
    )
    return {"compensate": compensate, "calibration": text.record}
