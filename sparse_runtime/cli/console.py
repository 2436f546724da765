"""Where the command line prints."""

from __future__ import annotations

from typing import NoReturn

from rich.console import Console

from sparse_runtime.printable import markup

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
# Of a message: room for two of the longest paths that anybody has.
_LONGEST = 2000


def note(message: object, label: str = "") -> None:
    """Print a message in one line on stderr; what it quotes may come from strangers."""
    err.print(label + markup(str(message), longest=_LONGEST), soft_wrap=True)


def warn(message: object) -> None:
    """Print a warning in one line on stderr."""
    note(message, "[yellow]warning:[/yellow] ")


def fail(message: str, code: int) -> NoReturn:
    """Print an error in one line on stderr and leave with an exit code."""
    note(message, "[bold red]error:[/bold red] ")
    raise SystemExit(code)
