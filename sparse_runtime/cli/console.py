"""Where the command line prints."""

from __future__ import annotations

from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from sparse_runtime.printable import printable

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def warn(message: object) -> None:
    """Print a warning in one line on stderr."""
    text = escape(printable(str(message), longest=1000))
    err.print(f"[yellow]warning:[/yellow] {text}", soft_wrap=True)


def fail(message: str, code: int) -> NoReturn:
    """Print an error in one line on stderr and leave with an exit code."""
    err.print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True)
    raise SystemExit(code)
