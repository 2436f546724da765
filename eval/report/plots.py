"""Figures of the report, one function each, with the text that stands in for the picture.

Those over methods are in ``quality_plots``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sparse_runtime.artifact.build_record import objects_within
from sparse_runtime.artifact.format import list_of, whole
from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.report.drawing import COLORS, MARKERS, STYLE, Plot, new_figure
from sparse_runtime.eval.report.long_figures import long_plots
from sparse_runtime.eval.report.quality_plots import domains, quality, rates
from sparse_runtime.eval.report.run_folder import RunFolder
from sparse_runtime.kernels.bitmaps import set_sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZES = list_of(whole(0))


def make_plots(run: RunFolder) -> Iterator[Plot]:
    """Make the figures that a run has the numbers for.

    Raises:
        ConfigError: Matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError(
            f"the report needs Matplotlib, which cannot be imported ({error}); "
            "pip install 'sparse-runtime[report]'"
        ) from error
    with mpl.rc_context(STYLE):
        curves = run.curves()
        compared = {
            f"{number}": (name, result)
            for number, (name, result) in enumerate(curves.items(), 1)
            if len({row["budget"] for row in result["rows"]}) > 1
        }
        for draw in (rates, quality):
            for number, (name, result) in compared.items():
                yield draw(f"{draw.__name__}_{number}", name, result)
        if len(curves) > 1 and (plot := domains(curves)) is not None:
            yield plot
        if "eval" in run.figures:
            layers = run.figures["eval"]["layers"]
            yield _coverage(layers)
            yield _confidence(layers)
        if run.clusters is not None:
            yield _densities(run)
            sizes = _cluster_sizes(run)
            if sizes is not None:
                yield sizes
        if "long" in run.figures:
            yield from long_plots(run.figures["long"])
        if "bench" in run.figures:
            yield _latency(run.figures["bench"])
        if "ablation" in run.figures:
            yield _ablation(run.figures["ablation"]["rows"])
            yield _convergence(run.figures["ablation"]["rows"])


def _coverage(layers: list[dict[str, Any]]) -> Plot:
    names = {
        "density": "density",
        "coverage": "coverage",
        "oracle_coverage": "by oracle ids",
        "static_coverage": "static set",
        "precision": "precision",
        "router_top1": "router = oracle",
    }
    values = [[layer[name] for layer in layers] for name in names]
    figure, axes = new_figure(7, 2.6)
    image = axes.imshow(values, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axes.set_yticks(range(len(names)), names.values())
    _layer_axis(axes, [layer["index"] for layer in layers])
    figure.colorbar(image, ax=axes, label="share")
    mean = {name: sum(row) / len(row) for name, row in zip(names, values, strict=True)}
    alt = (
        "Heat map of scores by layer, on held-out text. Means over layers: "
        + ", ".join(f"{names[name]} {value:.2f}" for name, value in mean.items())
        + "."
    )
    return Plot("coverage", "Density, coverage and precision by layer", alt, figure)


def _confidence(layers: list[dict[str, Any]]) -> Plot:
    counts = torch.tensor([layer["confidence"] for layer in layers]).t()
    figure, axes = new_figure(7, 2.8)
    image = axes.imshow(counts, aspect="auto", origin="lower", cmap="magma")
    axes.set_yticks(
        [bin_ - 0.5 for bin_ in range(0, 11, 2)], [f"{b / 10:g}" for b in range(0, 11, 2)]
    )
    axes.set_ylabel("probability of the choice")
    axes.grid(False)
    _layer_axis(axes, [layer["index"] for layer in layers])
    figure.colorbar(image, ax=axes, label="share of tokens")
    sure = counts[5:].sum(0).mean().item()
    alt = (
        "Heat map of how probable the router holds the cluster it chooses, by layer. On average "
        f"{sure:.0%} of the tokens have a choice above one half."
    )
    return Plot("confidence", "Router confidence", alt, figure)


def _densities(run: RunFolder) -> Plot:
    assert run.clusters is not None
    layers = sorted(run.clusters.layers.items())
    neurons = [run.clusters.intermediate_size(index) for index, _ in layers]
    computed = [
        set_sizes(layer.active_sets).float() / size
        for (_, layer), size in zip(layers, neurons, strict=True)
    ]
    looked = [
        torch.zeros(1) if layer.maybe_sets is None else set_sizes(layer.maybe_sets) / size
        for (_, layer), size in zip(layers, neurons, strict=True)
    ]
    largest = max(len(values) for values in computed)
    rows = torch.stack(
        [
            # Layers with fewer clusters are stretched over the width.
            (a + b).sort().values[torch.arange(largest) * len(a) // largest]
            for a, b in zip(computed, looked, strict=True)
        ]
    )
    figure, axes = new_figure(7, 3.4, 2, width_ratios=(1, 1))
    indices = [index for index, _ in layers]
    sure = [values.mean().item() for values in computed]
    maybe = [values.mean().item() for values in looked]
    axes[0].bar(indices, sure, label="computed (sure)", color=COLORS[0])
    axes[0].bar(indices, maybe, bottom=sure, label="looked at (maybe)", color=COLORS[1])
    axes[0].set_xlabel("layer")
    axes[0].set_ylabel("share of the neurons, mean over clusters")
    axes[0].set_ylim(0, 1)
    figure.legend(loc="outside lower left", ncols=2, fontsize=8)
    image = axes[1].imshow(rows, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axes[1].set_xlabel("clusters, smallest set first")
    axes[1].set_ylabel("layer")
    axes[1].yaxis.get_major_locator().set_params(integer=True)
    axes[1].grid(False)
    figure.colorbar(image, ax=axes[1], label="share computed or looked at")
    alt = (
        f"Sets of {len(layers)} layers. On average {sum(sure) / len(sure):.2f} of the neurons are "
        f"surely computed and {sum(maybe) / len(maybe):.2f} looked at first; both together range "
        f"from {rows.min().item():.2f} to {rows.max().item():.2f} over layers and clusters."
    )
    return Plot("densities", "Sets by layer and cluster", alt, figure)


def _cluster_sizes(run: RunFolder) -> Plot | None:
    assert run.clusters is not None
    layers = [
        layer
        for layer in objects_within(run.clusters.build, "layers")
        if _SIZES.accepts(layer.get("cluster_sizes"))
        and sum(layer["cluster_sizes"])
        and isinstance(layer.get("index"), int)
    ]
    if not layers:
        return None
    figure, axes = new_figure(7, 3)
    picked = sorted({0, len(layers) // 4, len(layers) // 2, 3 * len(layers) // 4, len(layers) - 1})
    for number, position in enumerate(picked):
        sizes = torch.tensor(layers[position]["cluster_sizes"]).sort(descending=True).values
        shares = sizes * len(sizes) / sizes.sum()
        axes.plot(shares, label=f"layer {layers[position]['index']}", color=COLORS[number])
    axes.axhline(1, color="#444444", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("clusters, largest first")
    axes.set_ylabel("tokens ÷ mean")
    axes.legend(fontsize=8)
    largest = max(max(x["cluster_sizes"]) / sum(x["cluster_sizes"]) for x in layers)
    empty = sum(size == 0 for x in layers for size in x["cluster_sizes"])
    total = sum(len(x["cluster_sizes"]) for x in layers)
    alt = (
        "Tokens per cluster by the router, of calibration text. The largest cluster of any layer holds "
        f"{largest:.1%} of its tokens; {empty} of {total} clusters hold none."
    )
    return Plot("cluster_sizes", "Cluster sizes", alt, figure)


def _latency(bench: dict[str, Any]) -> Plot:
    decode, mlp = bench["decode"], bench["mlp"]
    layers = bench["num_layers"]
    times = {row["name"]: row["ms"] for row in bench["prediction"]["rows"]}
    router = times.get("router", 0.0)
    figure, axes = new_figure(7, 2.8)
    names = {
        "dense": ("dense", mlp["dense_ms"], 0.0),
        "sparse": ("sparse", mlp["sparse_ms"], router),
        "dense_fast": ("dense, fast linears", mlp["all_rows_ms"], 0.0),
        "sparse_fast": ("sparse, fast linears", mlp["sparse_ms"], router),
    }
    words = []
    for position, (key, (label, ffn, predict)) in enumerate(names.items()):
        total = decode[f"{key}_ms"]
        parts = [max(0.0, total - layers * ffn), layers * max(0.0, ffn - predict), layers * predict]
        left = 0.0
        for part, color, name in zip(
            parts, ("#BBBBBB", COLORS[0], COLORS[3]), ("rest", "FFN", "router"), strict=True
        ):
            axes.barh(position, part, left=left, color=color, label=name if position == 0 else None)
            left += part
        words.append(f"{label} {total:.1f} ms, of which FFN {layers * ffn:.1f}")
    axes.set_yticks(range(len(names)), [label for label, _, _ in names.values()])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.05 * max(decode[f"{key}_ms"] for key in names))
    axes.set_xlabel("ms per decoded token (FFN and router: timed alone × layers)")
    axes.legend(fontsize=8, loc="lower right")
    alt = (
        "Decode time per token: "
        + "; ".join(words)
        + f". The router takes {layers * router:.2f} ms."
    )
    return Plot("latency", "Latency breakdown", alt, figure)


def _ablation(rows: list[dict[str, Any]]) -> Plot:
    factors = list(dict.fromkeys(row["factor"] for row in rows))
    figure, axes = new_figure(9, 3.2, len(factors), sharey=True)
    words = []
    for axis, factor in zip([axes] if len(factors) == 1 else axes, factors, strict=True):
        for number, method in enumerate(("awc", "awc-paper")):
            found = [row for row in rows if (row["factor"], row["method"]) == (factor, method)]
            if not found:
                continue
            places = [str(row["value"]) for row in found]
            for key, style in (("coverage", "-"), ("chance", ":")):
                axis.plot(
                    places,
                    [row[key] for row in found],
                    style,
                    marker=MARKERS[number],
                    markersize=4,
                    color=COLORS[3 * number],
                    label=f"{method}, {key}",
                )
            if factor == "top_percentile":
                scores = ", ".join(f"{row['coverage']:.2f} at {row['value']:g}" for row in found)
                words.append(f"{method}: coverage {scores}")
        axis.set_title(factor.replace("_", " "), fontsize=8)
        axis.tick_params(labelsize=7)
    (axes if len(factors) == 1 else axes[0]).set_ylabel("held-out coverage")
    handles, labels = (axes if len(factors) == 1 else axes[0]).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    alt = "Held-out coverage by one setting at a time. By top percentile, " + "; ".join(words) + "."
    return Plot("ablation", "Ablations", alt, figure)


def _convergence(rows: list[dict[str, Any]]) -> Plot:
    figure, axes = new_figure(8, 2.8, 3)
    base = [row for row in rows if row["factor"] == "clusters"]
    words = []
    measures = {"awc": "mean coverage", "awc-paper": "mean distance"}
    for axis, (method, label) in zip(axes, measures.items(), strict=False):
        for number, row in enumerate(r for r in base if r["method"] == method):
            axis.plot(row["history"], label=f"K = {row['clusters']}", color=COLORS[number])
            words.append(f"{method} K = {row['clusters']} takes {row['iterations']:.0f} iterations")
        axis.set_xlabel("iteration")
        axis.set_ylabel(f"{method}: {label}")
        axis.legend(fontsize=7)
    for number, method in enumerate(measures):
        found = [row for row in base if row["method"] == method]
        axes[2].plot(
            [str(row["clusters"]) for row in found],
            [row["effective"] for row in found],
            marker=MARKERS[number],
            color=COLORS[3 * number],
            label=method,
        )
    axes[2].set_ylim(0, 1)
    axes[2].set_xlabel("K")
    axes[2].set_ylabel("balance: exp(entropy) ÷ K")
    axes[2].legend(fontsize=7)
    alt = "Objective by iteration, and how even the cluster sizes are. " + "; ".join(words) + "."
    return Plot("convergence", "Convergence and balance", alt, figure)


def _layer_axis(axes: Axes, indices: Sequence[int]) -> None:
    step = max(1, len(indices) // 15)
    axes.set_xticks(range(0, len(indices), step), [str(index) for index in indices[::step]])
    axes.set_xlabel("layer")
    axes.grid(False)
