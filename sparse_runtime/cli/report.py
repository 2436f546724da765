"""``report`` and ``demo``: a page about a run, and a run on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sparse_runtime.cli.console import err, out
from sparse_runtime.cli.figures import (
    check_output_file,
    check_output_folder,
    write_figures,
)
from sparse_runtime.cli.options import JsonOption, resolve_dtype
from sparse_runtime.cli.progress import RichProgress
from sparse_runtime.cli.tables import print_curves
from sparse_runtime.files import write_json


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder with figures that other commands wrote with --json: eval.json, quality.json, "
            "planes.json and decode_only.json (eval --budgets), ablation.json, paper.json, long.json, "
            "tasks.json, bench.json; an artifact in clusters/.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="HTML file. [default: DIR/report.html]",
            callback=check_output_file,
        ),
    ] = None,
) -> None:
    """One self-contained HTML page with tables and plots; every plot as PNG and SVG beside it."""
    from sparse_runtime.eval.report.page import FIGURES_FOLDER, write_report
    from sparse_runtime.eval.report.run_folder import RunFolder

    page = output or folder / "report.html"
    check_output_folder(page.parent / FIGURES_FOLDER)
    write_report(RunFolder.read(folder), page)
    out.print(escape(f"report in {page}, its figures in {page.parent / FIGURES_FOLDER}"))


def demo(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Folder to work in.", callback=check_output_folder),
    ] = Path("runs/demo"),
    json_file: JsonOption = None,
) -> None:
    """Build for planes and compare with float and dense 4-bit weights, on the bundled small model."""
    from sparse_runtime.eval.demo import run_demo

    result = run_demo(output, out, RichProgress(err), resolve_dtype("auto", None))
    print_curves(result["curves"])
    write_json(output / "demo.json", result)
    out.print(escape(f"artifact in {output / 'clusters'}, figures in {output / 'demo.json'}"))
    write_figures(json_file, result)
