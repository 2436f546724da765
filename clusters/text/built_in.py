"""Texts that every Python brings along: its language reference, and its standard library's source."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from sparse_runtime.errors import ConfigError, DataError

#: Every so many-th document is held out: the ``test`` split.
_TEST_EVERY = 10
# Of a module, so that no long one stands for many.
_MODULE_CHARACTERS = 8_000
_NO_LIBRARY_CODE = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib"}


def built_in_texts(name: str, split: str) -> Iterator[str]:
    """Documents of ``pydoc`` or ``stdlib``.

    Args:
        name: of the source.
        split: ``train``, or ``test`` for those that it leaves out.

    Raises:
        ConfigError: there is no such split.
        DataError: this Python has been installed without them.
    """
    check_built_in_split(name, split)
    for number, document in enumerate(BUILT_IN_TEXTS[name]()):
        if (number % _TEST_EVERY == 0) == (split != "train"):
            yield document


def check_built_in_split(name: str, split: str) -> None:
    """Refuse a split that built-in texts have not. Raises ConfigError."""
    if split not in ("train", "test"):
        raise ConfigError(f"data source {name!r} has no split {split!r}; expected train or test")


def _pydoc() -> Iterator[str]:
    """Topics of the language reference, by name."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].strip()


def _stdlib() -> Iterator[str]:
    """Beginnings of the standard library's modules, shuffled once and for all."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = [
        name
        for name in (path.relative_to(folder) for path in folder.rglob("*.py"))
        if not _NO_LIBRARY_CODE & set(name.parts)
    ]
    if not names:
        raise DataError(
            f"data source 'stdlib': {folder} holds no source code; this Python brings none along. Name "
            "some files of code instead"
        )
    for name in sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()):
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
        yield text[:_MODULE_CHARACTERS].strip()


#: Name of a source -> its documents, in an order that depends on nothing but this Python.
BUILT_IN_TEXTS: dict[str, Callable[[], Iterator[str]]] = {"pydoc": _pydoc, "stdlib": _stdlib}
