"""The command line ``sparse-runtime``: a thin edge over the library.

Every command takes ``--json FILE`` for its figures. Errors are one line on stderr: exit code 2 for
wrong usage, 1 for failure, 130 when interrupted.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_runtime.cli.bench import bench, tune
from sparse_runtime.cli.build import build, inspect
from sparse_runtime.cli.chat import chat
from sparse_runtime.cli.console import fail, out, warn
from sparse_runtime.cli.evaluate import evaluate
from sparse_runtime.cli.generate import generate
from sparse_runtime.cli.long import long
from sparse_runtime.cli.pack import pack
from sparse_runtime.cli.plane_studies import ramp, rounding
from sparse_runtime.cli.report import demo, report
from sparse_runtime.cli.serve import serve
from sparse_runtime.cli.studies import ablate, ingredients, paper, tasks
from sparse_runtime.cli.upcycle import upcycle
from sparse_runtime.errors import ConfigError, SparseRuntimeError
from sparse_runtime.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_INTERRUPTED = 130
_PACKAGE = Path(__file__).parents[1]

app.command()(build)
app.command()(pack)
app.command()(upcycle)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command("eval")(evaluate)
app.command()(long)
app.command()(paper)
app.command()(ablate)
app.command()(ingredients)
app.command()(rounding)
app.command()(ramp)
app.command()(tasks)
app.command()(bench)
app.command()(tune)
app.command()(report)
app.command()(inspect)
app.command()(demo)


def main() -> None:
    """Run the command line; every error ends as one line and an exit code."""
    code = None
    # Ours in one line, without the place in the code; others' as Python shows them.
    show = warnings.showwarning
    warnings.showwarning = lambda message, kind, file, *rest: (
        warn(message)
        if str(_PACKAGE) in file or kind is UserWarning
        else show(message, kind, file, *rest)
    )
    try:
        # Not standalone: Typer would draw a box around what one line says.
        code = app(prog_name="sparse-runtime", standalone_mode=False)
    except SparseRuntimeError as error:
        fail(str(error), 2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        fail("interrupted", _INTERRUPTED)
    except Exception as error:
        # Typer's usage errors; it keeps their classes to itself.
        if hasattr(error, "format_message"):
            message = _usage(error)
            if not message:  # no command, and Typer has printed the help
                raise SystemExit(2) from None
            fail(message, 2)
        if os.environ.get("SPARSE_RUNTIME_TRACEBACK"):
            raise
        reason = next(iter(str(error).splitlines()), "")
        fail(
            f"{type(error).__name__}: {reason} (set SPARSE_RUNTIME_TRACEBACK=1 to see where; please "
            "report it if the input was right)",
            1,
        )
    if code == _INTERRUPTED:  # Typer's word for Ctrl-C
        fail("interrupted", _INTERRUPTED)
    raise SystemExit(code or 0)


def _usage(error: Any) -> str:
    """One line about a wrong option or argument, and where the right ones are listed."""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    return (
        message
        if context is None or not message
        else f"{message}; see {context.command_path} --help"
    )


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Faster language models: read only the feed-forward neurons a token needs."""
    if version:
        out.print(__version__)
        raise typer.Exit
