"""Bytes of a file or pipe, decompressed and decoded as they are asked for."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from sparse_runtime.clusters.text.kinds import COLUMNAR, compression, kind_of, kind_of_name
from sparse_runtime.errors import DataError

_BLOCK = 1 << 16
# Enough for every magic number, and for the first line of most records.
_HEAD = 4096


class TextFile:
    """A file or pipe that is open for reading, from its beginning, once.

    Attributes:
        path: as the user wrote it.
        kind: see ``kinds.SUFFIXES``.
    """

    def __init__(self, path: str, kind: str, head: bytes, stream: IO[bytes]) -> None:
        self.path = path
        self.kind = kind
        self._head = head
        self._stream = stream

    def blocks(self) -> Iterator[str]:
        """The text, decoded as UTF-8 without a byte order mark, every line end as ``\\n``.

        Raises:
            DataError: it is no UTF-8, or cannot be read or decompressed.
        """
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        newlines = io.IncrementalNewlineDecoder(decoder, translate=True)
        size, lines = 0, 1
        block = self._head
        while True:
            try:
                text = newlines.decode(block, final=not block)
            except UnicodeDecodeError as error:
                pending = len(error.object) - len(block)
                lines += error.object[: error.start].count(b"\n")
                at = size - pending + error.start
                raise DataError(
                    f"{self.path}, line {lines} is not UTF-8 text: byte {at} is "
                    f"{error.object[error.start]:#04x}; convert it to UTF-8"
                ) from error
            if text:
                yield text
            if not block:
                return
            size += len(block)
            lines += text.count("\n")
            with _named(self.path):
                block = self._stream.read(_BLOCK)


def split_lines(blocks: Iterable[str]) -> Iterator[str]:
    """A text line by line, each with its ``\\n``; other separators do not end a line."""
    begun: list[str] = []
    for block in blocks:
        first, *further = block.split("\n")
        begun.append(first)
        for part in further:
            yield "".join(begun) + "\n"
            begun = [part]
    if last := "".join(begun):
        yield last


@contextmanager
def open_text(path: Path, name: str) -> Iterator[TextFile]:
    """Open a file or pipe, and see what it holds.

    Args:
        path: of the file.
        name: for messages.

    Raises:
        DataError: it cannot be opened or decompressed, or holds no text that could be read.
    """
    kind_of_name(name)  # a name that is refused is refused without a look inside
    with _named(name):
        raw = path.open("rb")
    with raw:
        with _named(name):
            head = raw.read(_HEAD)
        packed = compression(head)
        stream: IO[bytes] = raw
        if packed is not None:
            stream = _decompressed(_rejoined(head, raw), packed)
            with _named(name):
                head = stream.read(_HEAD)
        kind = kind_of(name, head)
        if packed is not None and kind in COLUMNAR:
            raise DataError(
                f"{name} is {packed} around {kind}, which is compressed inside already; decompress it"
            )
        if kind in COLUMNAR and not path.is_file():
            raise DataError(f"{name} is {kind} in a pipe; expected a file. Write it to one")
        yield TextFile(name, kind, head, stream)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors of reading and decompressing, with the file's name."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{name} is damaged: {error}; fetch or compress it anew") from error
    except OSError as error:
        # bz2 and Arrow's decompression raise one without an error number.
        if error.errno is None:
            raise DataError(f"{name} is damaged: {error}; fetch or compress it anew") from error
        raise DataError(f"{name} cannot be read: {error.strerror}") from error


def _decompressed(stream: io.BufferedReader, packed: str) -> IO[bytes]:
    if packed == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    if packed == "bzip2":
        return bz2.BZ2File(stream)
    if packed == "xz":
        return lzma.LZMAFile(stream)
    import pyarrow  # comes with datasets

    source = pyarrow.PythonFile(stream, mode="r")
    return cast(IO[bytes], pyarrow.CompressedInputStream(source, "zstd"))


class _Head(io.RawIOBase):
    """A stream with the bytes in front again that were read to see what it is."""

    def __init__(self, head: bytes, stream: IO[bytes]) -> None:
        self._parts = [head]
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._parts.pop() if self._parts else self._stream.read(len(buffer))
        if len(block) > len(buffer):
            self._parts.append(block[len(buffer) :])
            block = block[: len(buffer)]
        buffer[: len(block)] = block
        return len(block)


def _rejoined(head: bytes, stream: IO[bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Head(head, stream))
