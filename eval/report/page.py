"""``report``: one HTML page about a run that opens anywhere, without a network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.report.drawing import Plot
from sparse_runtime.eval.report.figures import BESIDE
from sparse_runtime.eval.report.long_figures import BESIDE_HEADER, long_tables
from sparse_runtime.eval.report.plots import make_plots
from sparse_runtime.eval.report.run_folder import (
    RunFolder,
    by_bits,
    method_label,
    near_half,
    series_label,
    text_name,
)
from sparse_runtime.files import atomic_path, write_output

#: Beside the page: every figure as PNG and SVG.
FIGURES_FOLDER = "figures"
_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; those that begin with one of ``ours`` are set in bold."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    ours: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Section:
    """Part of the page.

    Attributes:
        name: of its anchor.
        title: above it.
        plot: its picture.
        svg: that, in base 64.
        tables: below it.
        lines: sentences below them.
        hosts: names of files, and the ``host_record`` of each.
    """

    name: str
    title: str
    plot: Plot | None = None
    svg: str = ""
    tables: Sequence[Table] = ()
    lines: Sequence[str] = ()
    hosts: Sequence[tuple[str, dict[str, Any]]] = field(default_factory=list)


def write_report(run: RunFolder, output: Path) -> None:
    """Write the page, and every figure as PNG and SVG to ``figures`` beside it.

    Args:
        run: the figures.
        output: the HTML file; all it shows is inside it.

    Raises:
        ConfigError: Matplotlib or Jinja2 is not installed.
        OutputFolderError: a file cannot be written.
    """
    folder = output.parent / FIGURES_FOLDER
    sections: list[Section] = []
    for plot in make_plots(run):
        for kind, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            file = folder / f"{plot.name}.{kind}"
            with atomic_path(file) as temporary:
                plot.figure.savefig(temporary, format=kind, **options)
        svg = base64.b64encode(file.read_bytes()).decode()
        sections.append(Section(plot.name, plot.title, plot, svg))
    sections += _tables(run)
    hosts = [(name, figures["host"]) for name, figures in run.figures.items() if "host" in figures]
    sections.append(Section("measured", "How it was measured", hosts=hosts))
    write_output(output, _page(title=_title(run), summary=_summary(run), sections=sections))


def _page(**values: Any) -> str:
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise ConfigError(
            f"the report needs Jinja2, which cannot be imported ({error}); "
            "pip install 'sparse-runtime[report]'"
        ) from error
    environment = Environment(autoescape=True)
    environment.filters["figure"] = _figure
    text: str = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(values)
    return text


def _figure(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def _title(run: RunFolder) -> str:
    models = dict.fromkeys(text_name(f["model"]) for f in run.figures.values() if f.get("model"))
    return f"sparse_runtime on {', '.join(models) or 'a model'}"


def _summary(run: RunFolder) -> list[str]:
    lines = []
    for name, result in run.curves().items():
        ours = [row for row in result["rows"] if row["method"] == "clusters"]
        floats = [row for row in ours if row["weights"] is None]
        if floats:
            best = min(floats, key=lambda row: (near_half(row), row["kl"]))
            low, high = best["interval"]
            lines.append(
                f"{name}: {method_label(best)} are {best['kl']:.3f} nats per token (KL) from "
                f"the dense model and agree with its likeliest token in {best['top1']:.1%}, at "
                f"{best['ratio']:.3f} times its perplexity of {result['dense']['perplexity']:.2f} "
                f"(95 % interval over windows {low:.3f} to {high:.3f}); they read "
                f"{best['bits_per_weight']:.2f} bits per FFN weight, {best['cost_share']:.3f} of its "
                "bytes."
            )
        if len(floats) < len(ours):
            lines.append(f"{name}, KL at bits read per FFN weight: {_rates(result['rows'])}.")
    bench = run.figures.get("bench")
    if bench is not None:
        decode = bench["decode"]
        lines.append(
            f"Decode: {decode['dense_tok_s']:.1f} → {decode['sparse_tok_s']:.1f} tokens/s "
            f"({decode['speedup']:.2f}×); with fast linears on both sides "
            f"{decode['speedup_fast']:.2f}×."
        )
    return lines


def _rates(rows: list[dict[str, Any]]) -> str:
    """Planes, sparse and dense, as points."""
    points: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: row["bits_per_weight"]):
        if row["weights"] is not None:
            point = f"{row['kl']:.3f} at {row['bits_per_weight']:.2f}"
            points.setdefault(series_label(row), []).append(point)
    return "; ".join(f"{label} {', '.join(found)}" for label, found in points.items())


def _tables(run: RunFolder) -> list[Section]:
    sections = []
    curves = run.curves()
    if curves:
        tables = [_curve_table(name, result) for name, result in curves.items()]
        lines = run.left_out() + run.notes()
        sections.append(Section("methods", "All methods", tables=tables, lines=lines))
    paper = run.figures.get("paper")
    if paper is not None:
        names = {
            "method": "method",
            "clusters": "K",
            "density": "density asked",
            "coverage": "coverage",
            "static": "static",
            "chance": "chance",
            "precision": "precision",
            "fitted_coverage": "coverage of the fitted text",
        }
        rows = [[row[name] for name in names] for row in paper["coverage"]]
        table = Table("Binary clusters, oracle ids, held-out text", list(names.values()), rows)
        title = "Coverage in the paper's setting"
        sections.append(Section("coverage-table", title, tables=[table]))
    if "long" in run.figures and (found := long_tables(run.figures["long"])):
        lines = [f"Text: {text_name(run.figures['long']['data'])}. ± are standard errors, paired."]
        tables = [Table(*parts) for parts in found]
        sections.append(Section("long", "Long contexts and texts", tables=tables, lines=lines))
    tasks = run.figures.get("tasks")
    if tasks is not None:
        header = ["task", "metric", "documents", *BESIDE_HEADER]
        keys = ("task", "metric", "documents", *BESIDE)
        rows = [[row[key] for key in keys] for row in tasks["rows"]]
        title = f"lm-eval, every token sparse, cost share {tasks['cost_share']:.3f}; errors are "
        title += "standard errors over documents, of the difference paired"
        table = Table(title, header, rows)
        sections.append(Section("tasks", "Downstream tasks", tables=[table]))
    bench = run.figures.get("bench")
    if bench is not None:
        header = ["prediction, one token", "ms", "of the dense FFN", "KiB read"]
        rows = [
            [row["name"], row["ms"], row["share"], row["bytes"] / 1024]
            for row in bench["prediction"]["rows"]
        ]
        title = f"beside a dense FFN of {bench['prediction']['ffn_ms']:.3f} ms"
        table = Table(title, header, rows)
        sections.append(Section("prediction", "What a prediction takes", tables=[table]))
    ablation = run.figures.get("ablation")
    if ablation is not None:
        header = ["method", "factor", "value", "coverage", "oracle ids", "static", "chance"]
        header += ["precision", "empty clusters", "balance", "iterations", "seconds"]
        columns = [*header[:4], "oracle_coverage", "static_coverage", "chance", "precision"]
        columns += ["empty", "effective", "iterations", "seconds"]
        rows = [[row[column] for column in columns] for row in ablation["rows"]]
        table = Table("Held-out text, ids by a linear router", header, rows)
        sections.append(Section("ablation-table", "Ablations in numbers", tables=[table]))
    return sections


def _curve_table(name: str, result: dict[str, Any]) -> Table:
    header = ["method", "budget", "bits", "KL", "from", "to", "top-1", "÷ dense", "from", "to"]
    header += ["cost share", "looked", "counted", "refined", "perplexity"]
    last = ("cost_share", "looked", "counted", "refined", "perplexity")
    rows = [
        [
            method_label(row),
            row["budget"],
            row["bits_per_weight"],
            row["kl"],
            *row["kl_interval"],
            row["top1"],
            row["ratio"],
            *row["interval"],
            *(row[key] for key in last),
        ]
        for row in by_bits(result["rows"])
    ]
    ours = frozenset(method_label(row) for row in result["rows"] if row["method"] == "clusters")
    dense = result["dense"]["perplexity"]
    caption = f"{name}: {result['tokens']} tokens, dense perplexity {dense:.2f}"
    return Table(caption, header, rows, ours)
