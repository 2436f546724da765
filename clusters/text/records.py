"""Records of a local file, one at a time, each with its place for messages."""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections.abc import Iterator
from glob import escape
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sparse_runtime.clusters.text.files import TextFile, open_text, split_lines
from sparse_runtime.errors import DataError

#: A record and where it is.
Record = tuple[dict[str, Any], str]
# Between the elements of an array.
_SPACE = " \t\n\r"


def file_records(path: Path, name: str) -> Iterator[Record]:
    """Open a file of records and read it.

    Args:
        path: of the file.
        name: for messages.

    Yields:
        The records, as they are read.

    Raises:
        DataError: the file cannot be read, holds plain text, or a record is damaged.
    """
    with open_text(path, name) as file:
        if file.kind == "text":
            raise DataError(
                f"{name} is plain text; expected records: .jsonl, .json, .csv or .parquet"
            )
        yield from records(file, path)


def records(file: TextFile, path: Path) -> Iterator[Record]:
    """Records of an open file whose kind is not ``text``."""
    if file.kind in ("csv", "tsv"):
        return _csv_records(file, "," if file.kind == "csv" else "\t")
    if file.kind in ("json", "json lines"):
        return _objects(_json_values(file))
    return _columnar_records(file, path)


def _objects(values: Iterator[tuple[Any, str]]) -> Iterator[Record]:
    for value, where in values:
        if not isinstance(value, dict):
            raise DataError(
                f"{where} is of type {type(value).__name__}; expected an object with text fields"
            )
        yield value, where


def _json_values(file: TextFile) -> Iterator[tuple[Any, str]]:
    """Objects one a line, the elements of one array, or one object over many lines."""
    blocks = file.blocks()
    start = next((block for block in blocks if block.strip()), "")
    if start.lstrip().startswith("["):
        yield from _array_elements(file.path, start.lstrip()[1:], blocks)
        return
    lines = enumerate(split_lines(chain([start], blocks)), 1)
    number, line = next(((number, line) for number, line in lines if line.strip()), (0, ""))
    if not line:
        return
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        if file.kind == "json lines":
            raise _not_json(file.path, number, error) from error
        value = _whole(file.path, line, lines, number)
    yield value, f"{file.path}, line {number}"
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _not_json(file.path, number, error) from error
        yield value, f"{file.path}, line {number}"


def _whole(path: str, first: str, lines: Iterator[tuple[int, str]], number: int) -> Any:
    try:
        return json.loads(first + "".join(line for _, line in lines))
    except json.JSONDecodeError as error:
        raise _not_json(path, number + error.lineno - 1, error) from error
    except RecursionError as error:
        raise _not_json(path, number, error) from error


def _array_elements(path: str, text: str, blocks: Iterator[str]) -> Iterator[tuple[Any, str]]:
    """Elements of an array that may be longer than memory, decoded one by one."""
    rest = _Rest(text, blocks)
    symbol, index = rest.symbol(), 0
    while not (symbol == "]" and index == 0):
        index += 1
        try:
            value = rest.value()
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise DataError(f"{path}, record {index} is not JSON: {reason}") from error
        yield value, f"{path}, record {index}"
        symbol = rest.symbol()
        if symbol == "]":
            break
        if symbol != ",":
            found = f"{symbol!r} follows" if symbol else "the file ends"
            raise DataError(
                f"{path}: {found} after record {index}; expected a comma or the array's ]"
            )
        rest.skip()
    rest.skip()
    if further := rest.all():
        raise DataError(f"{path} has more text after its array: {further[:40]!r}")


class _Rest:
    """What is left of a text; blocks are added as they are needed, and forgotten."""

    def __init__(self, text: str, blocks: Iterator[str]) -> None:
        self._text = text
        self._position = 0
        self._blocks = blocks
        self._decoder = json.JSONDecoder()

    def symbol(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self._position < len(self._text):
                symbol = self._text[self._position]
                if symbol not in _SPACE:
                    return symbol
                self._position += 1
            if not self._read_on(1):
                return ""

    def skip(self) -> None:
        """Go past that character."""
        self._position += 1

    def value(self) -> Any:
        """Decode a value. Raises ValueError or RecursionError where there is none."""
        self.symbol()
        wanted = 1 << 16
        while True:
            try:
                value, self._position = self._decoder.raw_decode(self._text, self._position)
                return value
            except ValueError:
                # Cut short, perhaps: read on, twice as much each time, and try again.
                if not self._read_on(wanted):
                    raise
                wanted *= 2

    def all(self) -> str:
        """All of it, without space around."""
        return (self._text[self._position :] + "".join(self._blocks)).strip()

    def _read_on(self, wanted: int) -> bool:
        parts, length = [self._text[self._position :]], 0
        while length < wanted and (block := next(self._blocks, "")):
            parts.append(block)
            length += len(block)
        self._text, self._position = "".join(parts), 0
        return length > 0


def _not_json(path: str, line: int, error: Exception) -> DataError:
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at column {error.colno}"
    return DataError(f"{path}, line {line} is not JSON: {reason}")


def _csv_records(file: TextFile, delimiter: str) -> Iterator[Record]:
    rows = csv.reader(split_lines(file.blocks()), delimiter=delimiter, strict=True)
    names = _next_row(rows, file.path)
    if names is None:
        return
    while (row := _next_row(rows, file.path)) is not None:
        where = f"{file.path}, line {rows.line_num}"
        if len(row) > len(names):
            raise DataError(
                f"{where} has {len(row)} fields; expected {len(names)}, as in the first line: "
                f"{', '.join(names)}. Quote fields that hold a {delimiter!r}"
            )
        if row:
            yield dict(zip(names, row, strict=False)), where


def _next_row(rows: Any, path: str) -> list[str] | None:
    # The limit is the process's: it is raised for one row, and put back.
    limit = csv.field_size_limit(sys.maxsize)
    first_line = rows.line_num + 1
    try:
        row: list[str] | None = next(rows, None)
    except csv.Error as error:
        if str(error) == "unexpected end of data":
            raise DataError(
                f"{path}, line {first_line} is not CSV: a quote of the record that begins there is "
                'never closed; write "" for a quote inside a field'
            ) from error
        raise DataError(
            f"{path}, line {rows.line_num} is not CSV: {error}; quote the whole field, and write "
            '"" for a quote inside it'
        ) from error
    finally:
        csv.field_size_limit(limit)
    return row


def _columnar_records(file: TextFile, path: Path) -> Iterator[Record]:
    """By the readers of ``datasets``, whose locks go to a folder that does not outlive the call."""
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.parquet.parquet import Parquet

    reader = {"parquet": Parquet, "arrow": Arrow}[file.kind]
    log = logging.getLogger("datasets")
    level = log.level
    with TemporaryDirectory() as folder:
        log.setLevel(logging.CRITICAL)  # what it logs before it raises is in the error below
        try:
            files = {"train": [escape(str(path.absolute()))]}
            builder = reader(cache_dir=folder, data_files=files)
            rows = builder.as_streaming_dataset(split="train")
            for number, row in enumerate(rows, 1):
                yield row, f"{file.path}, record {number}"
        except (OSError, ValueError) as error:  # Arrow's own errors are ValueErrors
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise DataError(f"{file.path} cannot be read as {file.kind}: {reason}") from error
        finally:
            log.setLevel(level)
