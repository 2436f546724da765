"""The text of a source, piece by piece, as much of it as is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from sparse_runtime.clusters.text.built_in import BUILT_IN_TEXTS, built_in_texts
from sparse_runtime.clusters.text.chat import DEFAULT_KEYS, record_text
from sparse_runtime.clusters.text.files import open_text
from sparse_runtime.clusters.text.kinds import kind_of_name
from sparse_runtime.clusters.text.records import Record, records
from sparse_runtime.clusters.text.sources import (
    HUB_DATA,
    DataSource,
    check_source,
    expanded,
    shown,
)
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.hub import hub_failure

# Records without the field that are read before that is an error.
_PATIENCE = 1000
_BETWEEN = "\n\n"


def text_pieces(source: DataSource, split: str, tokenizer: Any) -> Generator[str, None, None]:
    """Read a source.

    Args:
        source: not ``self``.
        split: of data sets and built-in texts.
        tokenizer: has the chat template.

    Yields:
        Pieces of the text; records are joined by a blank line.

    Raises:
        DataError: the source is unknown, cannot be read, or holds no such field.
        ConfigError: an option of the source cannot apply.
    """
    check_source(source)
    if source.is_local:
        return _path_pieces(source, expanded(source.name), source.name, tokenizer)
    if source.name in BUILT_IN_TEXTS:
        return _joined(built_in_texts(source.name, split))
    return _joined(_texts(_hub_records(source, split), source, source.name, tokenizer))


def _joined(documents: Iterable[str]) -> Generator[str, None, None]:
    for number, document in enumerate(documents):
        yield _BETWEEN + document if number else document


def _path_pieces(
    source: DataSource, path: Path, name: str, tokenizer: Any
) -> Generator[str, None, None]:
    if path.is_dir():
        for number, inside in enumerate(_files_of(path, name)):
            if number:
                yield _BETWEEN
            yield from _path_pieces(source, inside, f"{name.rstrip('/')}/{inside.name}", tokenizer)
        return
    with open_text(path, name) as file:
        if file.kind != "text":
            yield from _joined(_texts(records(file, path), source, name, tokenizer))
            return
        if source.keys:
            raise ConfigError(
                f"data source {shown(name)} is plain text, but key={'+'.join(source.keys)} is given; "
                "leave it out, or name a file of records .jsonl, .json or .csv"
            )
        yield from file.blocks()


def _files_of(folder: Path, name: str) -> list[Path]:
    """Files of a folder in the order of their names; all must be of one kind."""
    files = sorted(
        file
        for file in folder.iterdir()
        if not file.name.startswith((".", "README")) and not file.is_dir()
    )
    kinds = {kind_of_name(file.name) or "others" for file in files}
    if len(kinds) != 1 or kinds == {"others"}:
        found = f"{', '.join(sorted(kinds))} files" if kinds else "no files"
        raise DataError(
            f"data source {shown(name)} is a folder with {found}; expected files of one kind, such as "
            "shards in .parquet or .jsonl. Name one file, give --data again for others"
        )
    return files


def _texts(found: Iterable[Record], source: DataSource, name: str, tokenizer: Any) -> Iterator[str]:
    """Texts of records; those without one count as empty, which is said once, at the end."""
    empty, with_field, number = 0, 0, 0
    present: dict[str, None] = {}
    try:
        for number, (record, where) in enumerate(found, 1):
            text = record_text(record, source.keys, where, tokenizer)
            with_field += text is not None
            if text:
                yield text
                continue
            empty += 1
            present.update(dict.fromkeys(record))
            if number == _PATIENCE and not with_field:
                break
        if number and not with_field:
            raise _no_field(source, name, number, present)
    finally:
        if empty and with_field:
            warnings.warn(
                f"{name}: {empty} of the {number} records that were read have no text and count as "
                "empty",
                stacklevel=2,
            )


def _no_field(source: DataSource, name: str, number: int, present: Iterable[str]) -> DataError:
    wanted = " or ".join(source.keys) or f"{', '.join(DEFAULT_KEYS)} with completion"
    return DataError(
        f"{name}: none of the {number} records that were read has text under {wanted}; they have "
        f"{', '.join(present)}: name the fields with ,key=A+B, or ,key=A.B inside one"
    )


def _hub_records(source: DataSource, split: str) -> Iterator[Record]:
    from datasets import load_dataset

    name, configuration, test_split = HUB_DATA.get(source.name, (source.name, None, "test"))
    if ":" in name:
        name, _, configuration = name.partition(":")
    chosen = test_split if split == "test" and source.split is None else split
    where = f"data set {source.name!r}, split {chosen!r}"
    try:
        loaded = load_dataset(name, configuration, split=chosen, streaming=True)
        for number, record in enumerate(loaded, 1):
            yield record, f"{where}, record {number}"
    except Exception as error:
        # datasets, huggingface_hub, fsspec and httpx raise their own types here.
        first_line = next((line for line in str(error).splitlines() if line.strip()), "no details")
        reason = hub_failure(error) or f"{type(error).__name__}: {first_line}"
        raise DataError(
            f"{where} could not be read from the Hub ({reason}). Check the name and the network, or "
            "give a local .txt or .jsonl file, or 'pydoc' or 'stdlib', which need no network"
        ) from error
