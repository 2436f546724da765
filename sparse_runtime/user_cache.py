"""Where this package keeps what it can make again: the user's cache folder."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """The user's cache folder for this package, by the platform's rules; need not exist.

    On Linux ``$XDG_CACHE_HOME/sparse_runtime``, by default ``~/.cache/sparse_runtime``.
    """
    return user_cache_path("sparse_runtime", appauthor=False)
