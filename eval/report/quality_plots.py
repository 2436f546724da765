"""Figures over methods: distance from the dense model against what is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparse_runtime.eval.report.drawing import COLORS, MARKERS, Plot, new_figure
from sparse_runtime.eval.report.run_folder import (
    FORMAT_LABELS,
    METHOD_LABELS,
    method_label,
    near_half,
    series_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A ratio beyond this is off the picture; the table has it.
_LARGEST_RATIO = 10.0
# On a logarithmic axis nothing is zero; float32 logits give some 1e-7 for equal models.
_LEAST_KL = 1e-6
_PLANES_COLOR = "#A50026"
_FORMAT_COLORS = dict(
    zip(FORMAT_LABELS.values(), ("#999999", "#BBBBBB", "#333333", "#5D3A9B"), strict=True)
)


def rates(name: str, title: str, result: dict[str, Any]) -> Plot:
    """KL against the bits that are read, with ours and dense formats on one axis."""
    figure, axes = new_figure(7, 5)
    words = []
    for number, (label, rows) in enumerate(_series(result).items()):
        bits = [row["bits_per_weight"] for row in rows]
        distances = [max(row["kl"], _LEAST_KL) for row in rows]
        least, high = zip(*(row["kl_interval"] for row in rows), strict=True)
        low = [max(bound, _LEAST_KL) for bound in least]
        _line(axes, number, label, rows, bits, distances, (low, high))
        points = ", ".join(f"{row['kl']:.3g} at {row['bits_per_weight']:.2f}" for row in rows)
        words.append(f"{label} {points}")
    _log_distance(axes)
    axes.set_xlabel("bits read per FFN weight and token, everything counted")
    axes.set_ylabel("KL to the dense model, nats per token")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    alt = f"KL against bits read per FFN weight on {title}. " + "; ".join(words) + "."
    return Plot(name, f"Distance against bits read: {title}", alt, figure)


def quality(name: str, title: str, result: dict[str, Any]) -> Plot:
    """Perplexity ratio against cost share."""
    figure, axes = new_figure(7, 5)
    words = []
    for number, (label, rows) in enumerate(_series(result).items()):
        shares, ratios = ([row[key] for row in rows] for key in ("cost_share", "ratio"))
        low, high = zip(*(row["interval"] for row in rows), strict=True)
        middle = min(rows, key=near_half)
        above = f" ({_rounded(middle['ratio'])}, above)" if min(ratios) > _LARGEST_RATIO else ""
        _line(axes, number, label, rows, shares, ratios, (low, high), above)
        words.append(f"{label} {_rounded(middle['ratio'])} at {middle['cost_share']:.2f}")
    axes.axhline(1, color="#444444", linewidth=0.8, linestyle=":")
    _log_ratio(axes, [row["ratio"] for row in result["rows"]])
    axes.set_xlabel("FFN cost share (bytes read ÷ dense)")
    axes.set_ylabel("perplexity ÷ dense")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    alt = f"Perplexity ratio against cost share on {title}. " + "; ".join(words) + "."
    return Plot(name, f"Quality against cost share: {title}", alt, figure)


def domains(curves: dict[str, dict[str, Any]]) -> Plot | None:
    """Every method that ran on all texts, at the budget next to one half; None if there is none."""
    names, results = list(curves), list(curves.values())
    budgets = {row["budget"] for row in results[0]["rows"]} - {None}
    budget = min(budgets, key=lambda budget: abs(budget - 0.5), default=None)
    methods = [
        label
        for label in dict.fromkeys(method_label(row) for row in results[0]["rows"])
        if all(_at(result, label, budget) is not None for result in results)
    ]
    if budget is None or not methods:
        return None
    figure, axes = new_figure(7, 3.6)
    width = 0.8 / len(methods)
    words, shown = [], []
    for number, label in enumerate(methods):
        rows = [_at(result, label, budget) for result in results]
        ratios = [row["ratio"] for row in rows if row is not None]
        shown += ratios
        places = [index + (number - (len(methods) - 1) / 2) * width for index in range(len(rows))]
        axes.bar(places, ratios, width, label=label, color=_color(label))
        words.append(f"{label} " + ", ".join(f"{ratio:.2f}" for ratio in ratios))
    axes.set_xticks(
        range(len(names)),
        [name.replace(", ", ",\n") for name in names],
        fontsize=8,
        rotation=20,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_ylabel("perplexity ÷ dense")
    _log_ratio(axes, shown)
    axes.axhline(1, color="#444444", linewidth=0.8, linestyle=":")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    alt = (
        f"Perplexity ratio at a budget of {budget:g} on {', '.join(names)}: "
        + "; ".join(words)
        + "."
    )
    return Plot("domains", f"Domains at a budget of {budget:g}", alt, figure)


def _series(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Label of a line -> its rows, those that read least first."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        lines.setdefault(series_label(row), []).append(row)
    return {
        label: sorted(rows, key=lambda row: row["bits_per_weight"]) for label, rows in lines.items()
    }


def _line(
    axes: Axes,
    number: int,
    label: str,
    rows: Sequence[dict[str, Any]],
    x: Sequence[float],
    y: Sequence[float],
    bounds: tuple[Sequence[float], Sequence[float]],
    above: str = "",
) -> None:
    ours = rows[0]["method"] == "clusters"
    low, high = bounds
    axes.errorbar(
        x,
        y,
        # A hand-made interval may leave its value out; a bar of negative length is no bar.
        yerr=[
            [max(0.0, value - bound) for value, bound in zip(y, low, strict=True)],
            [max(0.0, bound - value) for value, bound in zip(y, high, strict=True)],
        ],
        label=label + above,
        color=_color(label),
        marker=MARKERS[number % len(MARKERS)],
        markersize=6 if ours else 4,
        linewidth=2.2 if ours else 1.1,
        linestyle="--" if label in _FORMAT_COLORS else "-",
        capsize=2,
    )


def _color(label: str) -> str:
    """The same color for a method in every figure."""
    labels = ["clusters with looks", "clusters without looks", *METHOD_LABELS.values()]
    # "clusters" alone is no row's label.
    labels.remove(METHOD_LABELS["clusters"])
    if label in labels:
        return COLORS[labels.index(label) % len(COLORS)]
    other = _PLANES_COLOR if label.startswith("clusters, ") else "#444444"
    return _FORMAT_COLORS.get(label, other)


def _log_distance(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _rounded(ratio: float) -> str:
    if ratio < 10:
        return f"{ratio:.2f}"
    return f"{ratio:.0f}" if ratio < 1000 else f"{ratio:.0e}"


def _log_ratio(axes: Axes, ratios: Sequence[float]) -> None:
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    top = min(_LARGEST_RATIO, max(ratios) * 1.05)
    axes.set_yscale("log")
    axes.set_ylim(min(0.97, 0.98 * min(ratios)), max(top, 1.2))
    fine, coarse = (1, 1.05, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2, 2.5), (1, 1.2, 1.5, 2, 3, 4, 6, 10)
    ticks = [tick for tick in (fine if top < 2.6 else coarse) if tick <= top]
    axes.set_yticks(ticks)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _at(result: dict[str, Any], label: str, budget: float | None) -> dict[str, Any] | None:
    for row in result["rows"]:
        if method_label(row) == label and row["budget"] == budget:
            found: dict[str, Any] = row
            return found
    return None
