"""Text from strangers (artifacts, models, figures), made fit for a terminal."""

from __future__ import annotations

import re
import reprlib

_LONGEST = 200
# Escape sequences of terminals: strings such as OSC 8 hyperlinks up to their end, then control
# sequences such as colors, then all else that begins with an escape; with their 8-bit forms.
_ESCAPES = re.compile(
    r"(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f]).*?(?:\x07|\x1b\\|\x9c|$)"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|\x1b[ -/]*.?",
    re.DOTALL,
)
# Control characters but tab and line feed, and those that turn the direction of text.
_CONTROLS = {
    code: "�"
    for code in (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    if chr(code) not in "\t\n"
} | {ord("\r"): ""}
_shorter = reprlib.Repr()
_shorter.maxstring = _shorter.maxother = _LONGEST // 2


def printable(value: object, *, longest: int = _LONGEST) -> str:
    """A value as one line: no escape sequences, control or format characters, ``longest`` characters.

    A lone surrogate and a character that turns the direction of text become ``�``, white space of any
    kind one space.
    """
    text = _ESCAPES.sub("", value if isinstance(value, str) else shown(value))
    text = " ".join(text[: 2 * longest].split())
    text = "".join(symbol if symbol.isprintable() else "�" for symbol in text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def printable_text(text: str) -> str:
    """Text of any length and number of lines, in which no control character has a meaning.

    For pieces of a text as well: each becomes what it would in the whole.
    """
    return text.translate(_CONTROLS)


def markup(value: object, *, longest: int = _LONGEST) -> str:
    """The same, to be put into text that Rich renders: ``[`` begins no markup."""
    from rich.markup import escape

    return escape(printable(value, longest=longest))


def shown(value: object) -> str:
    """A value as ``repr`` writes it, shortened, for error messages."""
    return _shorter.repr(value)
