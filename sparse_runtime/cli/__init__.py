"""The command line."""

from sparse_runtime.cli.app import main

__all__ = ["main"]
