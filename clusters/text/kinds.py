"""What kind of file a name and the first bytes promise, and which kinds are refused."""

from __future__ import annotations

import json
from pathlib import PurePath

from sparse_runtime.errors import DataError

#: Kinds: ``text`` is text as it stands; ``parquet`` and ``arrow`` are read by ``datasets``.
SUFFIXES = {
    ".txt": "text",
    ".raw": "text",
    ".tokens": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COLUMNAR = ("parquet", "arrow")
COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstandard"}
#: What people bring that is no text -> what to do.
_TO_TEXT = "convert it to text"
_UNPACK = "unpack it and name a file inside"
_RECORDS = "export the text as .jsonl or .parquet"
REFUSED = {
    **dict.fromkeys((".html", ".htm", ".xhtml", ".xml"), "extract its text first"),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub"), _TO_TEXT),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), "export it as .csv"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz", ".ipynb"), _RECORDS),
    **dict.fromkeys((".db", ".sqlite", ".safetensors", ".gguf"), _RECORDS),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), _UNPACK),
}
_COMPRESSION_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
}
_COLUMNAR_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow"}
_REFUSED_MAGIC = {
    b"%PDF": ("a PDF document", _TO_TEXT),
    b"PK\x03\x04": ("a zip archive or an office document", _UNPACK),
    b"\x80\x02": ("a pickle", _RECORDS),
    b"\x80\x03": ("a pickle", _RECORDS),
    b"\x80\x04": ("a pickle", _RECORDS),
    b"\x80\x05": ("a pickle", _RECORDS),
    b"\xff\xfe": ("UTF-16 text", "convert it to UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "convert it to UTF-8"),
}
_BOM = b"\xef\xbb\xbf"
READABLE = "text (.txt, .md), .json, .jsonl, .csv, .tsv, .parquet or .arrow"


def suffixes(name: str) -> tuple[str, str]:
    """The suffix of what is inside, and that of the compression; empty where there is none."""
    ends = [suffix.lower() for suffix in PurePath(name).suffixes[-2:]]
    if ends and ends[-1] in COMPRESSED:
        return (ends[-2] if len(ends) == 2 else ""), ends[-1]
    return (ends[-1] if ends else ""), ""


def has_known_suffix(name: str) -> bool:
    """Whether a name ends as that of a file: one that is read, or refused by name."""
    inner, outer = suffixes(name)
    return outer != "" or inner in SUFFIXES or inner in REFUSED


def compression(head: bytes) -> str | None:
    """The compression that the first bytes tell, whatever the name says."""
    return next(
        (name for magic, name in _COMPRESSION_MAGIC.items() if head.startswith(magic)), None
    )


def kind_of_name(name: str) -> str | None:
    """The kind that the name promises; None if it promises none.

    Raises:
        DataError: files of this name hold no text that could be read.
    """
    suffix, _ = suffixes(name)
    if suffix in REFUSED:
        raise DataError(f"{name} is a {suffix} file; expected {READABLE}: {REFUSED[suffix]}")
    return SUFFIXES.get(suffix)


def kind_of(name: str, head: bytes) -> str:
    """The kind of a file.

    Args:
        name: its name.
        head: its first bytes, decompressed.

    Raises:
        DataError: it holds no text that could be read.
    """
    kind = kind_of_name(name)
    for magic, columnar in _COLUMNAR_MAGIC.items():
        if head.startswith(magic):
            return columnar
    if kind in COLUMNAR:
        # An Arrow stream, unlike an Arrow file, begins with no magic bytes.
        return kind
    for magic, (what, remedy) in _REFUSED_MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{name} is {what}; expected {READABLE}: {remedy}")
    if b"\0" in head:
        raise DataError(
            f"{name} holds binary data (byte {head.index(0)} is 0); expected {READABLE}"
        )
    return kind or _kind_of_content(name, head.removeprefix(_BOM).lstrip())


def _kind_of_content(name: str, head: bytes) -> str:
    """Of a pipe, or a file whose suffix says nothing."""
    if head[:15].lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(f"{name} is HTML; expected {READABLE}: extract its text first")
    if head.startswith(b"[") and head[1:].lstrip().startswith(b"{"):
        return "json"
    if head.startswith(b"{"):
        line, end, _ = head.partition(b"\n")
        try:
            json.loads(line)
        except ValueError:
            # Longer than the head: a record, if it begins as one.
            return "text" if end or not head[1:].lstrip().startswith(b'"') else "json lines"
        return "json lines"
    return "text"
