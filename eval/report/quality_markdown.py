"""Markdown from the figures of ``make report``: docs/benchmarks/quality.md and README's table.

python -m sparse_runtime.eval.report.quality_markdown RUN_FOLDER QUALITY.md README.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sparse_runtime.errors import DataError, SparseRuntimeError
from sparse_runtime.eval.report.markdown import escaped, markdown_table, records_table, run_line
from sparse_runtime.eval.report.run_folder import CURVE_FILES, RunFolder, method_label

#: What stands between these lines of README is written by this module.
START, END = "<!-- quality: written by make report -->", "<!-- /quality -->"

_INTRODUCTION = """# Quality

Written by `make report`. Every token runs sparsely unless a prompt is named. *Cost share*: FFN bytes
read ÷ dense FFN's, everything counted. *KL*: to the dense model, in nats per token. *Top-1*: share of
the tokens with the dense model's likeliest next token. *÷ dense*: perplexity ratio, with its 95 %
bootstrap interval over the text's windows; it says how far another text of this kind could differ,
not another build. Opponents are fitted on the same calibration text, without fine-tuning; the
*oracle* knows each token's neurons.
"""


def quality_markdown(run: RunFolder) -> str:
    """The whole document."""
    parts = [_INTRODUCTION]
    parts += [run_line(run.figures[file]["host"]) for file in CURVE_FILES if file in run.figures]
    for title, result in run.curves().items():
        parts += [f"## {escaped(title)}\n", _curves(result)]
    parts += [f"{escaped(sentence)}\n" for sentence in run.left_out()]
    for name, (title, columns) in _OTHERS.items():
        figures = run.figures.get(name)
        if figures is not None:
            table = records_table(figures["rows"], columns.split())
            parts += [f"## {title}\n", run_line(figures["host"]), table]
    return "\n".join(parts)


#: File -> title and columns of its table.
_OTHERS = {
    "tasks": (
        "Downstream tasks (lm-eval)",
        "task metric documents dense dense_error sparse sparse_error",
    ),
    "ablation": (
        "Ablations: held-out coverage, ids by a linear router",
        "method factor value coverage oracle_coverage static_coverage chance precision empty "
        "effective iterations",
    ),
}


def readme_table(run: RunFolder, *, budget: float = 0.5) -> str:
    """Every method on the first text at one budget, best first.

    Raises:
        DataError: the run has no quality.json, or not this budget.
    """
    figures = run.figures.get("quality")
    curves = run.curves()
    title = next(iter(curves), "")
    rows = [row for row in curves[title]["rows"] if row["budget"] == budget] if curves else []
    if figures is None or not rows:
        raise DataError(f"the run has no quality.json with a budget of {budget:g}")
    result = curves[title]
    dense = result["dense"]["perplexity"]
    lines = [["dense", "0", "1", "1", "", "1"]]
    for row in sorted(rows, key=lambda row: row["divergence"]):
        label = escaped(method_label(row))
        label = f"**{label}**" if row["method"] == "clusters" else label
        lines.append([label, *_quality(row), f"{row['cost_share']:.2f}"])
    columns = ["KL", "top-1", "perplexity ÷ dense", "95 %", "FFN cost share"]
    measured = (
        f"{figures['model']}, {title}, {result['tokens']} tokens in windows of {figures['window']}, "
        f"dense perplexity {dense:.2f}, {figures['dtype']}, {figures['host']['date']}."
    )
    table = markdown_table(["every token sparse", *columns], lines)
    return f"{table}\n{escaped(measured)}\n"


def replaced(text: str, table: str) -> str:
    """README's text with another table between the marks.

    Raises:
        DataError: the marks are not there.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise DataError(f"the marks {START} and {END} are not in the file")
    return f"{before}{START}\n{table}{END}{after}"


def _curves(result: dict[str, Any]) -> str:
    header = ["method", "budget", "KL", "top-1", "÷ dense", "95 %", "cost share", "perplexity"]
    lines = [["dense", "", "0", "1", "1", "", "1", f"{result['dense']['perplexity']:.2f}"]]
    for row in result["rows"]:
        further = [f"{row['cost_share']:.3f}", f"{row['perplexity']:.2f}"]
        lines.append([escaped(method_label(row)), f"{row['budget']:g}", *_quality(row), *further])
    return f"{result['tokens']} tokens.\n\n{markdown_table(header, lines)}"


def _quality(row: dict[str, Any]) -> list[str]:
    low, high = row["interval"]
    return [
        f"{row['divergence']:.3f}",
        f"{row['agreement']:.3f}",
        _ratio(row["ratio"]),
        f"{_ratio(low)}–{_ratio(high)}",
    ]


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.0f}"


def main() -> None:
    """Write the document and the table named on the command line."""
    folder, document, readme = map(Path, sys.argv[1:])
    try:
        run = RunFolder.read(folder)
        text = replaced(readme.read_text(encoding="utf-8"), readme_table(run))
    except SparseRuntimeError as error:
        raise SystemExit(f"error: {error}") from None
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(quality_markdown(run), encoding="utf-8")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
