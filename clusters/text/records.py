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
# Space and commas between the elements of an array.
_BETWEEN = " \t\n\r,"


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
    decoder = json.JSONDecoder()
    index, position = 0, 0
    wanted = 1 << 16
    ended = False
    while True:
        while position < len(text) and text[position] in _BETWEEN:
            position += 1
        if position < len(text) and text[position] == "]":
            rest = (text[position + 1 :] + "".join(blocks)).strip()
            if rest:
                raise DataError(f"{path} has more text after its array: {rest[:40]!r}")
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            # Cut short, perhaps: read on, twice as much each time, and try again.
            if ended or isinstance(error, RecursionError):
                raise DataError(f"{path}, record {index + 1} is not JSON: {error}") from error
            more = [text[position:]]
            length = 0
            for block in blocks:
                more.append(block)
                length += len(block)
                if length >= wanted:
                    break
            else:
                ended = True
            text, position, wanted = "".join(more), 0, 2 * wanted
            continue
        wanted = 1 << 16
        index += 1
        yield value, f"{path}, record {index}"


def _not_json(path: str, line: int, error: Exception) -> DataError:
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at column {error.colno}"
    return DataError(f"{path}, line {line} is not JSON: {reason}")


def _csv_records(file: TextFile, delimiter: str) -> Iterator[Record]:
    rows = csv.reader(split_lines(file.blocks()), delimiter=delimiter)
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
    try:
        row: list[str] | None = next(rows, None)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num} is not CSV: {error}") from error
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
