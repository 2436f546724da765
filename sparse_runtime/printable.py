"""Strings from strangers: artifacts and figures that were made elsewhere."""

from __future__ import annotations


def printable(text: str) -> str:
    """Drop what a terminal or a page would obey instead of show; line ends become spaces.

    Control characters, escapes, and marks that change the direction of text are dropped.
    """
    return "".join(
        character if character.isprintable() else " "
        for character in text
        if character.isprintable() or character.isspace()
    )
