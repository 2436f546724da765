"""``rounding`` and ``ramp``: studies of weights in planes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sparse_runtime.artifact.build_record import within
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.cli.console import err
from sparse_runtime.cli.figures import write_figures
from sparse_runtime.cli.options import (
    AutoDtypeOption,
    CalibrationTokensOption,
    ClustersOption,
    DataOption,
    DeviceOption,
    JsonOption,
    LinearWeightsOption,
    ModelArgument,
    RevisionOption,
    SeedOption,
    TestOption,
    TestTokensOption,
    WindowOption,
    resolve_dtype,
)
from sparse_runtime.cli.progress import RichProgress
from sparse_runtime.cli.ranges import NOT_NEGATIVE, PLANE_BITS, POSITIVE, parse_numbers
from sparse_runtime.cli.tables import print_rows
from sparse_runtime.cli.texts import (
    check_windows_fit,
    fit_and_test,
    held_out,
    judged_source,
    warn_of_overlap,
)
from sparse_runtime.errors import ConfigError
from sparse_runtime.kernels.backends import BACKENDS
from sparse_runtime.models import load_model


def rounding(
    model: ModelArgument,
    data: DataOption = None,
    test: TestOption = None,
    weights: Annotated[str, typer.Option(help="Bits of the FFNs, with commas.")] = "4,5,6",
    roundings: Annotated[
        str, typer.Option(help="Some of plain, mean-squares, compensated, with commas.")
    ] = "plain,mean-squares,compensated",
    linear_weights: LinearWeightsOption = None,
    max_tokens: CalibrationTokensOption = 16_384,
    test_tokens: TestTokensOption = 4096,
    window: WindowOption = 512,
    seed: SeedOption = 0,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Plain and calibrated rounding in planes side by side, by distance from the float model."""
    from sparse_runtime.eval.latency.host import host_record
    from sparse_runtime.eval.studies.rounding import ROUNDINGS, compare_roundings

    bits, names = parse_numbers("--weights", weights, int, PLANE_BITS), roundings.split(",")
    for name in names:
        if name not in ROUNDINGS:
            raise ConfigError(f"--roundings has {name!r}; expected some of {', '.join(ROUNDINGS)}")
    first, text, tokens, _ = fit_and_test(
        model, data, test, max_tokens, test_tokens, window, seed, dtype, device
    )
    record: dict[str, Any] = {"model": model, "dtype": str(first.dtype).removeprefix("torch.")}
    record |= {"data": text.record, "test_tokens": len(tokens), "host": host_record(first.device)}
    waiting = [first]
    del first

    def load() -> Any:
        if waiting:
            return waiting.pop()
        return load_model(model, dtype=resolve_dtype(dtype, device), device=device)[0]

    rows = compare_roundings(
        load,
        text.windows,
        tokens,
        bits=bits,
        roundings=names,
        linears=linear_weights,
        window=window,
        progress=RichProgress(err),
    )
    print_rows("all neurons, beside the float model", _as_shown(rows))
    write_figures(json_file, {**record, "rows": rows})


def ramp(
    model: ModelArgument,
    clusters: ClustersOption,
    data: Annotated[str, typer.Option(help="Text to judge by.", metavar="SOURCE")] = "wikitext2",
    weights: Annotated[
        int, typer.Option(help="Bits of the FFNs.", callback=PLANE_BITS.callback)
    ] = 6,
    widths: Annotated[str, typer.Option(help="Widths, with commas; 0 is a step.")] = "0,0.25,0.5,1",
    backends: Annotated[
        str, typer.Option(help="With commas; the first one also measures quality.")
    ] = "auto",
    max_tokens: TestTokensOption = 2048,
    window: WindowOption = 512,
    noise_tokens: Annotated[
        int, typer.Option(callback=POSITIVE.callback, help="Tokens in one call and in chunks.")
    ] = 256,
    chunk: Annotated[int, typer.Option(callback=POSITIVE.callback, help="Tokens of a chunk.")] = 5,
    revision: RevisionOption = None,
    dtype: AutoDtypeOption = "auto",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """How far answers over planes shake with the batching of tokens, by the width of the ramp."""
    from sparse_runtime.eval.latency.host import host_record
    from sparse_runtime.eval.studies.ramp import compare_ramps

    chosen, names = parse_numbers("--widths", widths, float, NOT_NEGATIVE), backends.split(",")
    for name in names:
        if name not in BACKENDS:
            raise ConfigError(f"--backends has {name!r}; expected some of {', '.join(BACKENDS)}")
    check_windows_fit(window, {"--max-tokens": max_tokens})
    source = judged_source(data)
    artifact = ClusterSet.from_pretrained(clusters, revision=revision)
    loaded, tokenizer = load_model(model, dtype=resolve_dtype(dtype, device), device=device)
    artifact.check_model(loaded)
    tokens = held_out(source, tokenizer, max_tokens, loaded)
    warn_of_overlap(data, tokens, within(artifact.build, "data"))
    record = {"model": model, "clusters": clusters, "weights": weights, "data": data}
    record |= {"dtype": str(loaded.dtype).removeprefix("torch."), "tokens": len(tokens)}
    rows = compare_ramps(
        loaded,
        artifact,
        tokens,
        bits=weights,
        widths=chosen,
        backends=names,
        window=window,
        noise_tokens=noise_tokens,
        chunk=chunk,
        progress=RichProgress(err),
    )
    print_rows("every token sparse; noise is the KL of chunks", _as_shown(rows))
    write_figures(json_file, {**record, "rows": rows, "host": host_record(loaded.device)})


def _as_shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one set of names, intervals left out, whose KL shows the digits that tell them apart."""
    names = list(dict.fromkeys(name for row in rows for name in row if "interval" not in name))
    result = []
    for row in rows:
        shown = {name: row.get(name) for name in names}
        for name in ("kl", "noise"):
            if shown.get(name) is not None:
                shown[name] = f"{shown[name]:.5f}"
        result.append(shown)
    return result
