"""``python -m sparse_runtime`` is the command line."""

from sparse_runtime.cli import main

main()
