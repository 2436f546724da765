"""Whether a text was calibrated on, told from a sketch of the calibration text's tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from sparse_runtime.artifact.build_record import recorded_sources

# Tokens of a shingle: long enough to be the text's own, short enough to survive another cut.
_SHINGLE = 16
# Shingles of a source that are kept, those of the smallest hashes, which are a random sample.
_KEPT = 128
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# Set phrases (licences, headings) are shared by texts that have nothing else in common.
_NOTEWORTHY = 0.1
# A single phrase that two texts share is not a text they share.
_FEWEST_FOUND = 3


def sketch(tokens: Tensor) -> str:
    """A small sample of a text, the same for the same text whatever its file is called.

    Args:
        tokens: [n] int64.

    Returns:
        The smallest 128 of the hashes of its runs of 16 tokens, 16 hexadecimal digits each.
    """
    return "".join(f"{value:016x}" for value in _hashes(tokens)[:_KEPT].tolist())


def overlap(tokens: Tensor, record: Any) -> dict[str, float]:
    """The share of a text that each source of a calibration text holds.

    Of the text's runs of 16 tokens, those whose hash is in the range that the source's sketch covers
    are looked up in it: an estimate from about 128 × len(tokens) ÷ (tokens of the source) lookups.
    Fewer than 3 that are found count as none, so that a text 50 times shorter goes unnoticed.

    Args:
        tokens: [n] int64.
        record: of :class:`CalibrationText`; an artifact's may be anything.

    Returns:
        Name of each source that has a sketch -> 0 to 1.
    """
    found = _hashes(tokens)
    shares: dict[str, float] = {}
    for source in recorded_sources(record):
        digits = source.get("sketch", "")
        if not digits:
            continue
        kept = np.array(
            [int(digits[at : at + 16], 16) for at in range(0, len(digits), 16)], dtype=np.uint64
        )
        # Fewer than the sketch can hold are all that there are.
        within = found[found <= kept[-1]] if len(kept) == _KEPT else found
        hits = int(np.isin(within, kept).sum())
        share = hits / len(within) if hits >= _FEWEST_FOUND else 0.0
        name = str(source.get("name"))
        shares[name] = max(share, shares.get(name, 0.0))
    return shares


def overlap_warning(name: str, tokens: Tensor, record: Any) -> str | None:
    """What to tell a user whose test text was calibrated on.

    Args:
        name: of the test text.
        tokens: its token ids [n] int64.
        record: of :class:`CalibrationText`, or an artifact's ``build["data"]``.

    Returns:
        One line; None if the text is not known from the calibration.
    """
    shares = overlap(tokens, record)
    source = max(shares, key=lambda key: shares[key], default="")
    if not shares or shares[source] < _NOTEWORTHY:
        return None
    return (
        f"{name} is no held-out text: about {shares[source]:.0%} of it is in the calibration text, by "
        f"source {source}; figures on it are too good"
    )


def _hashes(tokens: Tensor) -> np.ndarray:
    """Hashes of all runs of tokens, each once, ascending [m] uint64."""
    ids = tokens.cpu().numpy().astype(np.uint64)
    count = max(0, len(ids) - _SHINGLE + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for at in range(_SHINGLE):
        # Products and sums wrap around at 2⁶⁴; the shifts carry high bits down.
        hashes = (
            (hashes ^ (hashes >> np.uint64(29))) * _MULTIPLIER + ids[at : at + count] + np.uint64(1)
        )
    hashes = (hashes ^ (hashes >> np.uint64(32))) * _MULTIPLIER
    return np.unique(hashes ^ (hashes >> np.uint64(29)))
