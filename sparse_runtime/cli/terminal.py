"""What is typed or piped in, and text that is shown while it comes."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sparse_runtime.errors import ConfigError
from sparse_runtime.printable import printable_text


def show_text(text: str) -> None:
    """Print a piece of a text at once; control characters in it have no effect."""
    print(printable_text(text), end="", flush=True)


def read_input() -> str:
    """All of the standard input, without the line feed at its end.

    Raises:
        ConfigError: it is no UTF-8.
    """
    text = _decoded(sys.stdin.buffer.read())
    return text.removesuffix("\n").removesuffix("\r")


def read_lines(prompt: str) -> Iterator[str | None]:
    """Lines of the standard input up to its end; None for one that Ctrl-C broke off.

    Args:
        prompt: shown where a person types.

    Raises:
        ConfigError: one is no UTF-8.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  input() edits lines with it, and remembers them
    while True:
        try:
            yield input(prompt) if sys.stdin.isatty() else _piped_line()
        except UnicodeDecodeError as error:
            raise _not_utf8(error) from error
        except KeyboardInterrupt:
            print()
            yield None
        except EOFError:
            return


def _piped_line() -> str:
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return _decoded(line).rstrip("\r\n")


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from error


def _not_utf8(error: UnicodeDecodeError) -> ConfigError:
    return ConfigError(
        f"the standard input is no UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}; "
        "convert it to UTF-8"
    )


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """A question inside the context: was Ctrl-C pressed? The first time, that is all it does.

    The second one raises KeyboardInterrupt, for what does not ask. Outside the main thread, which has
    no say in signals, the answer is no.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def press(number: int, frame: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
