"""What a text source is, and how it is written.

A source is written ``NAME[,weight=W][,key=A+B][,split=S]``, where NAME is a local file or folder, a
data set known by a short name, any Hub data set ``owner/name[:config]``, ``pydoc`` or ``stdlib`` (the
language reference and the standard library's source inside every Python, offline), ``self`` (text
sampled from the model itself), or ``general``, which stands for several of them (``recipes.py``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from sparse_runtime.clusters.text.built_in import BUILT_IN_TEXTS, check_built_in_split
from sparse_runtime.clusters.text.kinds import READABLE, has_known_suffix, kind_of_name
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.hub import why_a_path

#: Short name -> (Hub id, configuration, split for evaluation).
HUB_DATA = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": ("allenai/c4", "en", "validation"),
}
#: Sources that need no file and no network.
BUILT_IN = (*BUILT_IN_TEXTS, "self")
#: Names that stand for several sources, see ``recipes.py``.
RECIPES = ("general",)
# Above it a name is a text that somebody passed in place of a file name.
_LONGEST_NAME = 1024
_SHOWN = 60


@dataclass(frozen=True)
class DataSource:
    """A text source.

    Attributes:
        name: file, folder, data set, ``pydoc``, ``stdlib`` or ``self``.
        weight: share of the calibration text, relative to the other sources; above 0.
        keys: fields of a record whose values, joined by a newline, are its text; if empty, whichever
            the record has of ``text``, ``messages``, ``conversations``, and ``prompt`` with
            ``completion``.
        split: overrides the split that the caller asks for.
        max_tokens: calibrate on this many tokens at the beginning of the source at most; what follows
            is held out.

    Raises:
        ConfigError: a value is of the wrong kind or out of range, or cannot apply to such a source.
        DataError: the name is a text, not the name of one.
    """

    name: str
    weight: float = 1.0
    keys: tuple[str, ...] = ()
    split: str | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(
                f"a data source's name is {self.name!r}; expected a file or a data set"
            )
        if "\n" in self.name or "\0" in self.name or len(self.name) > _LONGEST_NAME:
            raise DataError(
                f"data source {shown(self.name)} is a text of {len(self.name)} characters; expected a "
                "file or the name of a data set. Write the text to a file"
            )
        for name, (valid, expected) in self._ranges().items():
            if not valid:
                raise ConfigError(
                    f"data source {shown(self.name)}: {name} is {getattr(self, name)!r}; expected "
                    f"{expected}"
                )
        if self.split is not None:
            self._check_split(self.split)
        for option in ("keys", "split", "max_tokens"):
            if self.name in RECIPES and getattr(self, option):
                raise ConfigError(
                    f"data source {shown(self.name)} stands for several texts, but {option}= is given; "
                    "leave it out, or name the texts themselves"
                )
        if self.keys and self.name in BUILT_IN:
            raise ConfigError(
                f"data source {shown(self.name)} has no fields, but key= is given; leave it out"
            )

    def _ranges(self) -> dict[str, tuple[bool, str]]:
        """Whether a field's value is one that it may have, and what is expected."""
        weight, keys, limit = self.weight, self.keys, self.max_tokens
        return {
            "weight": (_is(Real, weight) and 0 < weight < math.inf, "a number above 0"),
            "keys": (
                isinstance(keys, tuple) and all(isinstance(key, str) and key for key in keys),
                "a tuple of fields' names: key=A or key=A+B",
            ),
            "split": (
                self.split is None or (isinstance(self.split, str) and self.split != ""),
                "a name",
            ),
            "max_tokens": (
                limit is None or (_is(Integral, limit) and limit >= 1),
                "1 or more, or None",
            ),
        }

    def _check_split(self, split: str) -> None:
        if self.is_local or self.name in ("self", *RECIPES):
            raise ConfigError(
                f"data source {shown(self.name)} has no splits, but split={split} is given; leave it "
                "out"
            )
        if self.name in BUILT_IN_TEXTS:
            check_built_in_split(self.name, split)

    @property
    def is_local(self) -> bool:
        """Whether the name is a path, so that it is never looked up on the Hub."""
        return self.name not in (*HUB_DATA, *BUILT_IN, *RECIPES) and is_path(self.name)

    @property
    def has_test_split(self) -> bool:
        """Whether ``split="test"`` gives other text than ``split="train"``."""
        return self.split is None and not self.is_local

    def record(self) -> dict[str, Any]:
        """The fields that :func:`recorded_source` needs, as JSON, without the weight."""
        result: dict[str, Any] = {"name": self.name}
        if self.keys:
            result["keys"] = list(self.keys)
        return result


def shown(name: str) -> str:
    """The name in quotes, cut to the length of a message."""
    return repr(name if len(name) <= _SHOWN else name[:_SHOWN] + "…")


def is_path(name: str) -> bool:
    """Whether a name is a path: something is there, it ends as a file's, or it is no data set's."""
    return os.path.lexists(expanded(name)) or has_known_suffix(name) or bool(why_no_data_set(name))


def why_no_data_set(name: str) -> str | None:
    """Say why a name can be no Hub data set's, ``owner/name[:config]``, as :func:`why_a_path` does."""
    identifier, _, configuration = name.partition(":")
    written_as_path = "\\" in name or "/" in configuration
    return why_a_path(name if written_as_path else identifier, bare_ids=True)


def check_source(source: DataSource) -> None:
    """Find out whether a source can be there, without reading it.

    Raises:
        DataError: a file is missing, or of a kind that is refused by its name; a name is not known.
    """
    name = source.name
    if not source.is_local:
        if name in RECIPES:
            raise DataError(
                f"data source {shown(name)} stands for several texts to calibrate on; expected "
                "one text here"
            )
        if "/" not in name and name not in (*HUB_DATA, *BUILT_IN):
            raise DataError(
                f"data source {shown(name)} is not known; expected a file ({READABLE}), one of "
                f"{', '.join((*HUB_DATA, *BUILT_IN, *RECIPES))}, or a Hub data set owner/name"
            )
    elif not expanded(name).exists():
        reason = why_no_data_set(name)
        raise DataError(
            f"data source {shown(name)}{f', {reason}' if reason else ''}: there is no such file"
        )
    elif not expanded(name).is_dir():
        kind_of_name(name)


def parse_source(spec: str) -> DataSource:
    """Read a source as written on the command line.

    Raises:
        ConfigError: an option is unknown, given twice, cannot apply to the source, or has a value that
            cannot be used.
        DataError: what is given is a text, not the name of one.
    """
    name, options = _split_name(spec)
    if not name:
        raise ConfigError(f"data source {shown(spec)} has no name; expected NAME[,weight=W]…")
    fields: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        field = {"weight": "weight", "key": "keys", "split": "split"}.get(key)
        if field is None or not value:
            raise ConfigError(
                f"data source {shown(spec)}: option {shown(option)} is not known; expected weight=W, "
                "key=A+B or split=S"
            )
        if field in fields:
            raise ConfigError(f"data source {shown(spec)}: option {key} is given twice")
        fields[field] = _value(field, value)
    return DataSource(name, **fields)


def recorded_source(entry: Mapping[str, Any]) -> DataSource:
    """The source that an artifact's build record names.

    Args:
        entry: one of ``sources`` of :class:`CalibrationText`'s record.

    Raises:
        DataError: the entry has no name or values of a wrong kind.
    """
    try:
        keys = entry.get("keys", ())
        source = DataSource(
            entry["name"], entry.get("weight", 1.0), tuple(keys) if isinstance(keys, list) else keys
        )
        split = entry.get("split")
        if source.is_local or source.name == "self":
            split = None  # format version 1 recorded one for them too
        return DataSource(source.name, source.weight, source.keys, split)
    except (KeyError, ConfigError) as error:
        raise DataError(f"the build record has a damaged data source: {error!r}") from error


def expanded(name: str) -> Path:
    """The path of a local source."""
    return Path(os.path.expanduser(name))


def _split_name(spec: str) -> tuple[str, list[str]]:
    """The name, which may hold commas if there is such a file, and the options."""
    parts = spec.split(",")
    for end in range(len(parts), 1, -1):
        name = ",".join(parts[:end])
        if os.path.exists(os.path.expanduser(name)):
            return name, parts[end:]
    if "\n" in spec or len(spec) > _LONGEST_NAME:
        return spec, []
    return parts[0], parts[1:]


def _value(field: str, value: str) -> Any:
    if field == "keys":
        return tuple(value.split("+"))
    if field == "weight":
        with suppress(ValueError):  # DataSource says what is wrong with it
            return float(value)
    return value


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
