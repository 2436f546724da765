"""``report``: one HTML page about a run that opens anywhere, without a network."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparse_runtime.atomic import atomic_path, write_text
from sparse_runtime.eval.plots import Plot, make_plots
from sparse_runtime.eval.run_folder import RunFolder, method_label, text_name

#: Beside the page: every figure as PNG and SVG.
FIGURES_FOLDER = "figures"
_STYLE = """
:root { color-scheme: light; --ink: #1b1b1f; --soft: #5a5a66; --line: #d9d9e0; --band: #f5f6fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid var(--line); }
p, figcaption, .host { color: var(--soft); max-width: 46rem; }
figure { margin: 1rem 0; }
figure img { width: 100%; height: auto; }
figcaption { font-size: .85rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; margin: 0; padding: 0; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .25rem .45rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--line); }
tbody tr:nth-child(even) { background: var(--band); }
tr.ours { font-weight: 600; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #0072B2; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
code { font-size: .85em; }
@media print { body { max-width: none; font-size: 11px; } nav { display: none; }
  figure, tr { break-inside: avoid; } .table { overflow: visible; } }
"""

# Numbers sort as numbers; what is no number goes last, whichever way.
_SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const column = head.cellIndex, rising = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)], [p, q] = [parseFloat(x), parseFloat(y)];
      if (isNaN(p) !== isNaN(q)) return isNaN(p) ? 1 : -1;
      const order = isNaN(p) ? x.localeCompare(y) : p - q;
      return rising ? order : -order;
    });
    body.append(...rows);
  });
}
"""


def write_report(run: RunFolder, output: Path) -> None:
    """Write the page, and every figure as PNG and SVG to ``figures`` beside it.

    Args:
        run: the figures.
        output: the HTML file; all it shows is inside it.

    Raises:
        ConfigError: Matplotlib is not installed.
        OutputFolderError: a file cannot be written.
    """
    folder = output.parent / FIGURES_FOLDER
    sections: list[tuple[str, str, str]] = []
    for plot in make_plots(run):
        for kind, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            file = folder / f"{plot.name}.{kind}"
            with atomic_path(file) as temporary:
                plot.figure.savefig(temporary, format=kind, **options)
        sections.append((plot.name, plot.title, _picture(plot, file.read_bytes())))
    sections += _tables(run)
    sections.append(("measured", "How it was measured", _measured(run)))
    write_text(output, _page(_title(run), _summary(run), sections))


def _page(title: str, summary: str, sections: Sequence[tuple[str, str, str]]) -> str:
    links = "".join(
        f'<li><a href="#{name}">{html.escape(heading)}</a></li>' for name, heading, _ in sections
    )
    parts = "".join(
        f'<section id="{name}"><h2>{html.escape(heading)}</h2>{body}</section>\n'
        for name, heading, body in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # An empty icon, or browsers ask the server for one.
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main><h1>{html.escape(title)}</h1>{summary}<nav><ul>{links}</ul></nav>\n{parts}"
        f"</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _title(run: RunFolder) -> str:
    models = dict.fromkeys(text_name(f["model"]) for f in run.figures.values() if f.get("model"))
    return f"sparse_runtime on {', '.join(models) or 'a model'}"


def _summary(run: RunFolder) -> str:
    lines = []
    for name, result in run.curves().items():
        ours = [row for row in result["rows"] if row["method"] == "clusters"]
        if ours:
            best = min(ours, key=lambda row: (abs(row["budget"] - 0.5), row["ratio"]))
            low, high = best["interval"]
            lines.append(
                f"{name}: {method_label(best)} read {best['cost_share']:.3f} of the FFN's bytes at "
                f"{best['ratio']:.3f} times the dense perplexity (95 % interval over windows {low:.3f} "
                f"to {high:.3f}), where the dense model has {result['dense']['perplexity']:.2f}."
            )
    bench = run.figures.get("bench")
    if bench is not None:
        decode = bench["decode"]
        lines.append(
            f"Decode: {decode['dense_tok_s']:.1f} → {decode['sparse_tok_s']:.1f} tokens/s "
            f"({decode['speedup']:.2f}×); with fast linears on both sides "
            f"{decode['speedup_fast']:.2f}×."
        )
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _measured(run: RunFolder) -> str:
    """Where each file of figures comes from."""
    return "".join(
        f'<p class="host">{name}: {html.escape(host["date"])}, {html.escape(host["cpu"])}, '
        f"{host['threads']} threads; <code>{html.escape(host['command'])}</code></p>"
        for name, host in ((n, f["host"]) for n, f in run.figures.items() if "host" in f)
    )


def _picture(plot: Plot, svg: bytes) -> str:
    data = base64.b64encode(svg).decode()
    alt = html.escape(plot.alt)
    return (
        f'<figure><img alt="{alt}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{alt}</figcaption></figure>"
    )


def _tables(run: RunFolder) -> list[tuple[str, str, str]]:
    sections = []
    curves = run.curves()
    if curves:
        body = "".join(_curve_table(name, result) for name, result in curves.items())
        body += "".join(f"<p>{html.escape(sentence)}</p>" for sentence in run.left_out())
        sections.append(("methods", "All methods", body))
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
        table = _table("Binary clusters, oracle ids, held-out text", list(names.values()), rows)
        sections.append(("coverage-table", "Coverage in the paper's setting", table))
    tasks = run.figures.get("tasks")
    if tasks is not None:
        header = ["task", "metric", "documents", "dense", "±", "sparse", "±"]
        keys = ("task", "metric", "documents", "dense", "dense_error", "sparse", "sparse_error")
        rows = [[row[key] for key in keys] for row in tasks["rows"]]
        title = f"lm-eval, every token sparse, cost share {tasks['cost_share']:.3f}"
        sections.append(("tasks", "Downstream tasks", _table(title, header, rows)))
    bench = run.figures.get("bench")
    if bench is not None:
        header = ["prediction, one token", "ms", "of the dense FFN", "KiB read"]
        rows = [
            [row["name"], row["ms"], row["share"], row["bytes"] / 1024]
            for row in bench["prediction"]["rows"]
        ]
        title = f"beside a dense FFN of {bench['prediction']['ffn_ms']:.3f} ms"
        sections.append(("prediction", "What a prediction takes", _table(title, header, rows)))
    ablation = run.figures.get("ablation")
    if ablation is not None:
        header = ["method", "factor", "value", "coverage", "oracle ids", "static", "chance"]
        header += ["precision", "empty clusters", "balance", "iterations", "seconds"]
        columns = [*header[:4], "oracle_coverage", "static_coverage", "chance", "precision"]
        columns += ["empty", "effective", "iterations", "seconds"]
        rows = [[row[column] for column in columns] for row in ablation["rows"]]
        table = _table("Held-out text, ids by a linear router", header, rows)
        sections.append(("ablation-table", "Ablations in numbers", table))
    return sections


def _curve_table(name: str, result: dict[str, Any]) -> str:
    header = ["method", "budget", "cost share", "computed", "looked at", "perplexity", "÷ dense"]
    header += ["from", "to", "KL", "top-1"]
    keys = ("budget", "cost_share", "computed", "looked_at", "perplexity", "ratio")
    rows = [
        [
            method_label(row),
            *(row[key] for key in keys),
            *row["interval"],
            row["divergence"],
            row["agreement"],
        ]
        for row in result["rows"]
    ]
    ours = [row["method"] == "clusters" for row in result["rows"]]
    dense = result["dense"]["perplexity"]
    caption = f"{name}: {result['tokens']} tokens, dense perplexity {dense:.2f}"
    return _table(caption, header, rows, ours)


def _table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    ours: Iterable[bool] | None = None,
) -> str:
    head = "".join(
        f'<th scope="col"><button type="button">{html.escape(name)}</button></th>'
        for name in header
    )
    body = "".join(
        f"<tr{' class=ours' if strong else ''}>{''.join(map(_cell, row))}</tr>"
        for row, strong in zip(rows, ours or [False] * len(rows), strict=True)
    )
    return (
        f'<div class="table"><table><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if value is None:
        return '<td data-value="">–</td>'
    if isinstance(value, float):
        shown = f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
        return f'<td data-value="{value!r}">{shown}</td>'
    return f"<td>{html.escape(str(value))}</td>"
