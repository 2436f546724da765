"""What the report shows of ``long``: plots by position and depth, and tables for page and Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sparse_runtime.eval.report.drawing import COLORS, MARKERS, Plot, new_figure
from sparse_runtime.eval.report.figures import BESIDE

#: Headings of the columns BESIDE.
BESIDE_HEADER = ("dense", "±", "sparse", "±", "sparse − dense", "±")
#: A caption, the columns' headings, and rows of text and numbers.
TableParts = tuple[str, Sequence[str], Sequence[Sequence[Any]]]


def long_plots(figures: dict[str, Any]) -> Iterator[Plot]:
    """Plots of the parts that were measured."""
    if "positions" in figures:
        yield _positions(figures["positions"])
    if "needle" in figures:
        yield _needles(figures["needle"]["rows"])


def long_tables(figures: dict[str, Any]) -> list[TableParts]:
    """Tables of the parts that were measured."""
    tables: list[TableParts] = []
    if "positions" in figures:
        part = figures["positions"]
        keys = ("windows", "dense", "sparse", "ratio", "ratio_error", "kl", "kl_error", "top1")
        header = ["position", "windows", "dense", "sparse", "÷ dense", "±", "KL", "±", "top-1"]
        rows = [[_range(row), *(row[key] for key in keys)] for row in part["rows"]]
        tables.append((_positions_caption(part), header, rows))
    if "needle" in figures:
        header = ["sparse run", "length", "depth", "prompts", "found: dense", "sparse"]
        header += [f"log-probability: {BESIDE_HEADER[0]}", *BESIDE_HEADER[1:]]
        rows = [
            [
                *(row["run"], row["length"]),
                "all" if row["depth"] is None else f"{row['depth']:g}",
                *(row["prompts"], row["found"]["dense"], row["found"]["sparse"]),
                *(row["log_probability"][key] for key in BESIDE),
            ]
            for row in figures["needle"]["rows"]
        ]
        caption = "Needles: greedy answers that are right, and log-probability of the right answer"
        tables.append((caption, header, rows))
    if "continuations" in figures:
        part = figures["continuations"]
        header = ["sampling", "share of", "text itself", *BESIDE_HEADER]
        rows = [
            [
                *(row["sampling"], row["figure"].replace("_", " "), row["text"]),
                *(row[key] for key in BESIDE),
            ]
            for row in part["rows"]
        ]
        caption = (
            f"{part['prompts']} continuations of {part['new_tokens']} tokens after prompts of "
            f"{part['prompt_tokens']}, which run dense; greedy ones are the same for "
            f"{part['same_tokens']:.1f} tokens"
        )
        tables.append((caption, header, rows))
    return tables


def _positions_caption(part: dict[str, Any]) -> str:
    prompt = part["prompt_tokens"]
    after = f" after a dense prompt of {prompt}" if prompt else ""
    return (
        f"Perplexity by position in windows of {part['window']}, every token sparse{after}, "
        f"{part['bits_per_weight']:.2f} bits per FFN weight"
    )


def _range(row: dict[str, Any]) -> str:
    return f"{row['from']}–{row['to'] - 1}"


def _positions(part: dict[str, Any]) -> Plot:
    rows = part["rows"]
    places = [_range(row) for row in rows]
    figure, axes = new_figure(8, 3.2, 2)
    labels = {"kl": "KL to the dense model, nats per token", "ratio": "perplexity ÷ dense"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        values = [row[key] for row in rows]
        errors = [row[f"{key}_error"] or 0.0 for row in rows]
        axis.errorbar(places, values, errors, color=COLORS[0], marker=MARKERS[0], capsize=3)
        axis.set_ylim(0 if key == "kl" else min(1.0, *values) - 0.01)
        axis.set_xlabel("position")
        axis.set_ylabel(label)
        axis.tick_params(axis="x", labelsize=7, rotation=30)
    words = ", ".join(f"{row['kl']:.3f} at {_range(row)}" for row in rows)
    alt = f"{_positions_caption(part)}; bars are standard errors over windows. KL {words}."
    return Plot("positions", "Distance by position", alt, figure)


def _needles(rows: list[dict[str, Any]]) -> Plot:
    runs = list(dict.fromkeys(row["run"] for row in rows))
    figure, axes = new_figure(8, 3.2, len(runs), sharey=True, squeeze=False)
    words = []
    for axis, run in zip(axes[0], runs, strict=True):
        of_run = [row for row in rows if row["run"] == run]
        for number, length in enumerate(dict.fromkeys(row["length"] for row in of_run)):
            found = [row for row in of_run if row["length"] == length and row["depth"] is not None]
            changes = [row["log_probability"] for row in found]
            axis.errorbar(
                [row["depth"] for row in found],
                [change["difference"] for change in changes],
                [change["difference_error"] or 0.0 for change in changes],
                label=f"{length} tokens",
                color=COLORS[number % len(COLORS)],
                marker=MARKERS[number % len(MARKERS)],
                capsize=3,
            )
            values = ", ".join(f"{change['difference']:.2f}" for change in changes)
            words.append(f"{run}, {length} tokens: {values}")
        axis.axhline(0, color="#444444", linewidth=0.8, linestyle=":")
        axis.set_title(run, fontsize=9)
        axis.set_xlabel("depth of the needle")
    axes[0][0].set_ylabel("log-probability of the answer, sparse − dense")
    axes[0][-1].legend(fontsize=8)
    alt = (
        "Change of the right answer's log-probability by depth of the needle, with standard errors. "
        + "; ".join(words)
        + "."
    )
    return Plot("needle", "A needle in a long text", alt, figure)
