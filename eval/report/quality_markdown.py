"""Markdown from the figures of ``make report``: docs/benchmarks/quality.md and README's table.

python -m sparse_runtime.eval.report.quality_markdown RUN_FOLDER QUALITY.md README.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sparse_runtime.errors import DataError, SparseRuntimeError
from sparse_runtime.eval.report.figures import BESIDE
from sparse_runtime.eval.report.long_figures import long_tables
from sparse_runtime.eval.report.markdown import (
    cell,
    escaped,
    markdown_table,
    records_table,
    run_line,
)
from sparse_runtime.eval.report.run_folder import (
    CURVE_FILES,
    GGUF_LABELS,
    RunFolder,
    by_bits,
    method_label,
)

#: What stands between these lines of README is written by this module.
START, END = "<!-- quality: written by make report -->", "<!-- /quality -->"

_INTRODUCTION = """# Quality

Written by `make report`. Every token runs sparsely unless a prompt is named. *Bits*: read per FFN
weight and token, scales, routers and bitmaps included (bfloat16 has 16). *KL*: to the dense model, in
nats per token. *Top-1*: share of the tokens with the dense model's likeliest next token. *÷ dense*:
perplexity ratio. Intervals are 95 % bootstrap intervals over the text's windows; they say how far
another text of this kind could differ, not another build. Opponents are fitted on the same calibration
text, without fine-tuning; the *oracle* knows each token's neurons. *Dense* formats read all FFN weights
in fewer bits; attention and head stay as they are.
"""


def quality_markdown(run: RunFolder) -> str:
    """The whole document."""
    parts = [_INTRODUCTION]
    parts += [run_line(run.figures[file]["host"]) for file in CURVE_FILES if file in run.figures]
    for title, result in run.curves().items():
        parts += [f"## {escaped(title)}\n", _curves(result)]
    parts += [f"{escaped(sentence)}\n" for sentence in run.left_out() + run.notes()]
    if (figures := run.figures.get("long")) is not None:
        parts += ["## Long contexts and texts\n", run_line(figures["host"])]
        for caption, header, rows in long_tables(figures):
            cells = ([cell(value) for value in row] for row in rows)
            parts += [f"{escaped(caption)}.\n", markdown_table(header, cells)]
    for name, (title, columns) in _OTHERS.items():
        if (figures := run.figures.get(name)) is not None:
            table = records_table(figures["rows"], columns.split())
            parts += [f"## {title}\n", run_line(figures["host"]), table]
    return "\n".join(parts)


#: File -> title and columns of its table.
_OTHERS = {
    "tasks": (
        "Downstream tasks (lm-eval)",
        f"task metric documents {' '.join(BESIDE)}",
    ),
    "ablation": (
        "Ablations: held-out coverage, ids by a linear router",
        "method factor value coverage oracle_coverage static_coverage chance precision empty "
        "effective iterations",
    ),
}


def readme_table(run: RunFolder, *, budget: float = 0.5) -> str:
    """Two tables of the first text: quantized weights by the bits read, then float ones at one budget.

    Of dense planes the first holds those with the clusters' own rounding.

    Raises:
        DataError: the run has no quality.json, or not this budget.
    """
    figures = run.figures.get("quality")
    curves = run.curves()
    title = next(iter(curves), "")
    rows = curves[title]["rows"] if curves else []
    if figures is None or not any(row["budget"] == budget for row in rows):
        raise DataError(f"the run has no quality.json with a budget of {budget:g}")
    result = curves[title]
    measured = (
        f"{figures['model']}, {title}, {result['tokens']} tokens in windows of {figures['window']}, "
        f"dense perplexity {result['dense']['perplexity']:.2f}, {figures['dtype']}, "
        f"{figures['host']['date']}."
    )
    quantized = [row for row in rows if row["weights"] is not None or row["method"] in GGUF_LABELS]
    own = {row["rounding"] for row in quantized if row["method"] == "clusters"}
    quantized = [row for row in quantized if row["rounding"] in {*own, None}]
    floats = [row for row in rows if row["budget"] == budget and row["weights"] is None]
    parts = [_readme_part("weights of a few bits", quantized)] if quantized else []
    parts += ["Over float weights, at half of the FFNs' bytes:\n"] if quantized else []
    parts += [_readme_part("every token sparse", floats), f"{escaped(measured)}\n"]
    return "\n".join(parts)


def _readme_part(name: str, rows: list[dict[str, Any]]) -> str:
    lines = [["dense", "16", "0", "", "1", "1", ""]]
    for row in by_bits(rows):
        label = escaped(method_label(row))
        label = f"**{label}**" if row["method"] == "clusters" else label
        lines.append([label, *_quality(row)])
    columns = ["bits", "KL", "95 %", "top-1", "perplexity ÷ dense", "95 %"]
    return markdown_table([name, *columns], lines)


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
    header = ["method", "budget", "bits", "KL", "95 %", "top-1", "÷ dense", "95 %", "perplexity"]
    perplexity = f"{result['dense']['perplexity']:.2f}"
    lines = [["dense", "", "16", "0", "", "1", "1", "", perplexity]]
    for row in by_bits(result["rows"]):
        budget = "" if row["budget"] is None else f"{row['budget']:g}"
        perplexity = f"{row['perplexity']:.2f}"
        lines.append([escaped(method_label(row)), budget, *_quality(row), perplexity])
    return f"{result['tokens']} tokens.\n\n{markdown_table(header, lines)}"


def _quality(row: dict[str, Any]) -> list[str]:
    """Bits, KL, top-1 and ratio, with the intervals of KL and ratio."""
    (least, most), (low, high) = row["kl_interval"], row["interval"]
    return [
        f"{row['bits_per_weight']:.2f}",
        f"{row['kl']:.4f}",
        f"{least:.4f}–{most:.4f}",
        f"{row['top1']:.3f}",
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
