"""Markdown from the JSON of ``sparse-runtime paper``; what ``make report-paper`` calls.

python -m sparse_runtime.eval.report.coverage_markdown FIGURES.json OUTPUT.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.report.figures import PAPER, read_figures
from sparse_runtime.eval.report.markdown import records_table, run_line

_INTRODUCTION = """# Coverage in the paper's setting

Written by `make report-paper`. One binary pattern per token and layer, half of the values ones;
centroids are masks for all tokens of a cluster, which a token finds by its own pattern (*oracle
ids*). *Coverage*: share of a token's ones that its centroid holds, what arXiv 2507.14179 calls
clustering precision. *Chance*: the centroids' real density, and so the coverage of random masks of
their size; *static*: that of the most frequent neurons, as many. *Precision*: share of the centroid's
ones that the token has. All of these are of held-out text; *fitted coverage* is of the text that was
clustered, which is what the paper reports. Means over the layers named in the command; *seconds* are
of one layer. The density can only be asked of the paper's method, so read the others beside their
chance.
"""


def coverage_markdown(figures: dict[str, Any]) -> str:
    """The whole document."""
    columns = "method clusters density coverage static chance precision fitted_coverage seconds"
    table = records_table(figures["coverage"], columns.split())
    return "\n".join([_INTRODUCTION, run_line(figures["host"]), table])


def main() -> None:
    """Write the document named on the command line."""
    figures, document = map(Path, sys.argv[1:])
    try:
        text = coverage_markdown(read_figures(figures, PAPER, "paper MODEL --compare"))
    except SparseRuntimeError as error:
        raise SystemExit(f"error: {error}") from None
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
