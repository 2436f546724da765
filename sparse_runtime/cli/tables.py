"""Tables that the command line prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

from sparse_runtime.artifact.build_record import objects_within, within
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.measured import MeasuredCuts
from sparse_runtime.cli.console import out
from sparse_runtime.cost import share_in_bits
from sparse_runtime.kernels.bitmaps import set_sizes
from sparse_runtime.printable import markup


def artifact_summary(artifact: ClusterSet) -> dict[str, Any]:
    """What an artifact holds, as JSON."""
    layers = []
    for index, layer in sorted(artifact.layers.items()):
        neurons = artifact.intermediate_size(index)
        looked_at = 0.0
        if layer.maybe_sets is not None:
            looked_at = set_sizes(layer.maybe_sets).float().mean().item() / neurons
        layers.append(
            {
                "index": index,
                "clusters": layer.num_clusters,
                "density": set_sizes(layer.active_sets).float().mean().item() / neurons,
                "looked_at": looked_at,
                "router": "linear" if layer.router_rank is None else f"rank {layer.router_rank}",
            }
        )
    return {
        "fingerprint": artifact.fingerprint,
        "budget": artifact.budget,
        "bits_per_weight": share_in_bits(artifact.budget),
        "verified": artifact.verified,
        "measured": None if artifact.measured is None else artifact.measured.record(),
        "layers": layers,
        "build": artifact.build,
    }


def print_summary(name: str, summary: dict[str, Any]) -> None:
    """Print what ``artifact_summary`` says; its ``build`` may be anybody's and hold anything."""
    build, fingerprint, budget = (summary[name] for name in ("build", "fingerprint", "budget"))
    model = within(build, "model")
    out.print(f"[bold]{markup(name)}[/bold]: clusters for {markup(model or 'an unnamed model')}")
    sizes = sorted(set(fingerprint["intermediate_sizes"]))
    out.print(
        f"{markup(fingerprint['model_type'])}, {len(fingerprint['layers'])} layers, hidden "
        f"{fingerprint['hidden_size']}, intermediate "
        f"{sizes[0]}{f' to {sizes[-1]}' if len(sizes) > 1 else ''}"
    )
    settings = [
        f"{label} {markup(value)}"
        for label, value in (
            ("method", within(build, "config", "method")),
            ("importance", within(build, "config", "importance")),
            ("budget", f"{budget:g} ({share_in_bits(budget):g} bits per FFN weight)"),
            ("seed", within(build, "config", "seed")),
            ("calibration tokens", within(build, "data", "tokens")),
        )
        if value is not None
    ]
    out.print(", ".join(settings))
    table = Table(
        "layer", "clusters", "computed", "looked at", "router", "coverage", "chance", "static"
    )
    held_out = _held_out_scores(build)
    for layer in summary["layers"]:
        scores = held_out.get(layer["index"])
        table.add_row(
            str(layer["index"]),
            str(layer["clusters"]),
            f"{layer['density']:.3f}",
            f"{layer['looked_at']:.3f}",
            layer["router"],
            *(_score(within(scores, name)) for name in ("coverage", "chance", "static_coverage")),
        )
    out.print(table)
    if summary["measured"] is not None:
        _print_measured(MeasuredCuts.from_record(summary["measured"]))


def print_estimate(estimate: dict[str, Any], disk_free: int) -> None:
    """Print what a build would take, stage by stage, as ``BuildEstimate.record`` says."""
    table = Table("stage", "time", "memory, MiB", "disk, MiB")
    for stage in estimate["stages"]:
        sizes = (f"{stage[key] / 2**20:,.0f}" for key in ("memory", "disk"))
        table.add_row(stage["name"], clock(stage["seconds"]), *sizes)
    out.print(table)
    disk = f"{estimate['disk'] / 2**30:.1f} GiB of disk ({disk_free / 2**30:.1f} GiB are free)"
    out.print(
        f"{estimate['tokens']} tokens: about {clock(estimate['seconds'])}, "
        f"{estimate['memory'] / 2**30:.1f} GiB of memory, of which the model takes "
        f"{estimate['model'] / 2**30:.1f}, and {disk}. Nothing was built"
    )


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _print_measured(measured: MeasuredCuts) -> None:
    """What cuts for several budgets read and lost on each held-out text."""
    table = Table("budget", title="held-out text: cost share, KL to the dense model")
    for name, tokens in zip(measured.domains, measured.tokens, strict=True):
        table.add_column(f"{markup(name)} ({tokens} tokens)" if tokens else markup(name))
    for cut in measured.cuts:
        cells = [f"{share:.3f}" for share in cut.shares]
        if cut.kl is not None and cut.kl_error is not None:
            losses = zip(cells, cut.kl, cut.kl_error, strict=True)
            cells = [f"{share}, {kl:.4f} ± {error:.4f}" for share, kl, error in losses]
        table.add_row(f"{cut.promised:.3f}", *cells)
    out.print(table)


def _held_out_scores(build: Any) -> dict[int, Any]:
    return {
        entry["index"]: entry.get("held_out")
        for entry in objects_within(build, "layers")
        if isinstance(entry.get("index"), int)
    }


def _score(value: Any) -> str:
    number = isinstance(value, int | float) and -1e9 < value < 1e9
    return f"{value:.3f}" if number else "–"


def print_quality(source: str, result: dict[str, Any]) -> None:
    """Print the figures of ``evaluate_quality`` on one text."""
    table = Table(title=_text_title(source, result["tokens"], result))
    for column in ("neurons chosen", "KL", "top-1", "÷ dense", "cost share", "perplexity"):
        table.add_column(column, justify="left" if column == "neurons chosen" else "right")
    perplexity = result["perplexity"]
    table.add_row("all (dense)", "0", "1", "1", "1", f"{perplexity['dense']:.2f}")
    names = {
        "sparse": "by the router (sparse)",
        "oracle_ids": "by oracle ids (best coverage)",
        "static": "one static set (floor)",
    }
    distances = {key: result.get(key, result) for key in names}
    for key, name in names.items():
        table.add_row(
            name,
            f"{distances[key]['kl']:.3f}",
            f"{distances[key]['top1']:.3f}",
            f"{perplexity[key] / perplexity['dense']:.3f}",
            f"{result['cost_share']:.3f}" if key == "sparse" else "",
            f"{perplexity[key]:.2f}",
        )
    out.print(table)
    layers = result["layers"]
    scores = ("density", "coverage", "chance", "static_coverage", "oracle_coverage", "precision")
    mean = {name: sum(entry[name] for entry in layers) / len(layers) for name in scores}
    out.print(
        f"mean over layers: density {mean['density']:.3f}, "
        f"coverage {mean['coverage']:.3f} (chance {mean['chance']:.3f}, static "
        f"{mean['static_coverage']:.3f}, oracle ids {mean['oracle_coverage']:.3f}), precision "
        f"{mean['precision']:.3f}"
    )


# Heading -> what stands under it. In a narrow terminal the second group is left to --json.
_CURVE_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "budget": lambda row: "–" if row["budget"] is None else f"{row['budget']:g}",
    "bits": lambda row: f"{row['bits_per_weight']:.2f}",
    "KL": lambda row: f"{row['kl']:.4f}",
    "top-1": lambda row: f"{row['top1']:.3f}",
    "÷ dense": lambda row: f"{row['ratio']:.3f}",
}
_WIDE_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "95 %": lambda row: "–".join(f"{bound:.3f}" for bound in row["interval"]),
    "cost share": lambda row: f"{row['cost_share']:.3f}",
    "perplexity": lambda row: f"{row['perplexity']:.2f}",
    "looked": lambda row: _number(row["looked"]),
    "counted": lambda row: _number(row["counted"]),
    "refined": lambda row: _number(row["refined"]),
}
_NARROW = 100


def print_packed(result: dict[str, Any], bits: int) -> None:
    """Print what packed weights and sparsity over them cost, and what they read."""
    rows = []
    for name, own in (("all neurons", result["packed"]), ("sparse", result)):
        rows.append(
            {
                f"{bits} bits": name,
                "KL": f"{own['kl']:.4f}",
                "top-1": f"{own['top1']:.3f}",
                "perplexity ÷ float": f"{own['ratio']:.3f}",
                "bits per FFN weight": f"{own['bits_per_weight']:.2f}",
            }
        )
    print_rows(f"{result['data']}, {result['tokens']} tokens", rows)
    shares = (f"{100 * result[name]:.0f} % {name}" for name in ("looked", "counted", "refined"))
    out.print(f"[dim]of the neurons {', '.join(shares)}[/dim]", soft_wrap=True)


def print_curves(curves: dict[str, Any]) -> None:
    """Print the figures of ``evaluate_curves``."""
    columns = _CURVE_COLUMNS if out.width < _NARROW else _CURVE_COLUMNS | _WIDE_COLUMNS
    for result in curves["results"]:
        dense = f"dense perplexity {result['dense']['perplexity']:.2f}"
        title = _text_title(result["data"], result["tokens"], curves)
        table = Table(title=f"{title}, {dense}")
        table.add_column("method", no_wrap=True)
        for column in columns:
            # In a narrow terminal the headings of two words break, and nothing else.
            table.add_column(column, justify="right", no_wrap=" " not in column or "%" in column)
        for row in result["rows"]:
            table.add_row(_method(row), *(cell(row) for cell in columns.values()))
        out.print(table)
    for row in curves["left_out"]:
        budget = "" if row["budget"] is None else f" at budget {row['budget']:g}"
        out.print(f"{row['method']} is left out{budget}: {shown(row['reason'])}")


def _method(row: dict[str, Any]) -> str:
    if row["method"] != "clusters":
        return str(row["method"])
    if row["weights"] is None:
        return f"clusters{' + looks' if row['verify'] else ''}"
    # Without thresholds every candidate is read to its last bit.
    return f"clusters, {row['weights']} bits{'' if row['verify'] else ', refined whole'}"


def shown(value: Any) -> str:
    """A value from an artifact or a file, without a terminal's commands and Rich's markup."""
    return markup(str(value))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _text_title(source: str, tokens: int, protocol: dict[str, Any]) -> str:
    prompt = protocol["prompt_tokens"]
    dense_part = f", after a dense prompt of {prompt}" if prompt else ""
    return f"{shown(source)}: {tokens} tokens, window {protocol['window']}{dense_part}"


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print records with the same keys as a table."""
    table = Table(*(name.replace("_", " ") for name in rows[0]), title=title or None)
    for row in rows:
        table.add_row(
            *(
                "–"
                if value is None
                else f"{value:.3f}"
                if isinstance(value, float)
                else shown(value)
                for value in row.values()
            )
        )
    out.print(table)


def print_tasks(rows: list[dict[str, Any]]) -> None:
    """Print the rows of ``evaluate_tasks``."""
    table = Table("task", "metric", "documents", "dense", "sparse", "sparse − dense")
    for row in rows:
        table.add_row(
            shown(row["task"]),
            shown(row["metric"]),
            str(row["documents"]),
            *(
                with_error(row[name], row[f"{name}_error"], sign=name == "difference")
                for name in ("dense", "sparse", "difference")
            ),
        )
    out.print(table)


def with_error(value: float, error: float | None, *, digits: int = 3, sign: bool = False) -> str:
    """A figure with its standard error, if it has one; with ``sign`` a plus is shown, too."""
    shown_value = f"{value:{'+' if sign else ''}.{digits}f}"
    return shown_value if error is None else f"{shown_value} ± {error:.{digits}f}"


def _print_one_ffn(mlp: dict[str, Any], prediction: dict[str, Any]) -> None:
    out.print(
        f"one FFN, one token, density {mlp['density']:.2f}: F.linear {mlp['dense_ms']:.3f} ms, "
        f"prepacked {mlp['prepacked_ms'] or float('nan'):.3f} ms, sparse {mlp['sparse_ms']:.3f} ms "
        f"({mlp['speedup']:.2f}× the prepacked, {mlp['speedup_over_linear']:.2f}× F.linear; "
        f"{mlp['gbps']:.1f} GB/s, {mlp['bandwidth_share']:.2f} of {mlp['read_gbps']:.1f} GB/s)"
    )
    rows = (
        f"{row['name']} {1e3 * row['ms']:.0f} µs ({row['share']:.1%})" for row in prediction["rows"]
    )
    out.print(f"to predict, of the FFN's {prediction['ffn_ms']:.3f} ms: {', '.join(rows)}")


def _print_experts(experts: dict[str, Any]) -> None:
    out.print(
        f"one layer's experts, one token, cost share {experts['cost_share']:.2f}: the model's own "
        f"{experts['dense_ms']:.3f} ms ({experts['dense_gbps']:.1f} GB/s), all rows "
        f"{experts['all_rows_ms']:.3f} ms ({experts['all_rows_gbps']:.1f} GB/s), sparse "
        f"{experts['sparse_ms']:.3f} ms ({experts['gbps']:.1f} of {experts['read_gbps']:.1f} GB/s): "
        f"{experts['speedup']:.2f}× the model's own, {experts['speedup_over_all_rows']:.2f}× all rows"
    )


def print_bench(name: str, result: dict[str, Any]) -> None:
    """Print the figures of ``bench``."""
    for run in result["runs"]:
        decode, prefill = run["decode"], run["prefill"]
        out.print(
            f"[bold]{shown(name)}[/bold], cost share {run['cost_share']:.3f} "
            f"({run['bits_per_weight']:.2f} bits per FFN weight), read bandwidth "
            f"{result['read_gbps']:.1f} GB/s"
        )
        if "mlp" in run:  # FFNs are float
            _print_one_ffn(run["mlp"], run["prediction"])
        if "experts" in run:
            _print_experts(run["experts"])
        table = Table("decode", "ms per token", "p90", "tokens/s", "MB per token", "GB/s")
        for variant, gbps in decode["gbps"].items():
            table.add_row(
                variant.replace("_fast", " + fast linears"),
                f"{decode[variant + '_ms']:.1f}",
                f"{decode[variant + '_p90_ms']:.1f}",
                f"{decode[variant + '_tok_s']:.1f}",
                f"{decode['bytes_per_token'][variant] / 1e6:.1f}",
                f"{gbps:.1f}",
            )
        out.print(table)
        out.print(
            f"decode: sparse {decode['speedup']:.2f}×, with fast linears on both sides "
            f"{decode['speedup_fast']:.2f}× (ceiling by bytes {decode['ceiling']:.2f}×), both "
            f"together {decode['speedup_total']:.2f}×; prefill of {result['prompt_tokens']} tokens "
            f"{prefill['dense_ms']:.0f} → {prefill['sparse_ms']:.0f} ms "
            f"({prefill['speedup']:.2f}×)\n"
        )
    for batch in result["batches"]:
        out.print(
            f"batch {batch['batch']}: {batch['dense_ms']:.1f} → {batch['sparse_ms']:.1f} ms "
            f"({batch['speedup']:.2f}×)"
        )
    memory = result["memory"]
    out.print(
        f"memory: dense {memory['dense_mib']:.0f} MiB, sparse {memory['sparse_mib']:.0f} MiB; "
        f"weights {memory['weights_mib']:.0f} MiB, sparse {memory['sparse_weights_mib']:.0f} MiB; "
        f"(weights + growth) ÷ weights = {memory['ratio']:.3f}, artifact "
        f"{memory['artifact_mib']:.0f} MiB"
    )
