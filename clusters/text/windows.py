"""Tokens of sources, and windows of them: for calibration, and held out from it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.clusters.text.overlap import sketch
from sparse_runtime.clusters.text.readers import text_pieces
from sparse_runtime.clusters.text.sampling import sampled_tokens
from sparse_runtime.clusters.text.sources import DataSource, expanded, shown
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.progress import ProgressReporter

# A cut text can tokenize differently from the whole only next to the cut.
_CUT_MARGIN = 64
# Of a text too short for both, the last share that is held out.
_HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class CalibrationText:
    """Calibration windows, shuffled so that the last ones are of every source, as all are.

    Attributes:
        windows: token ids [W, window] int64.
        domains: number of each window's source [W] int64.
        names: of the sources, each once.
        record: as JSON: of each source its name and options as the user wrote them, tokens and a
            sketch of its text (see :func:`overlap`); a hash over all ids.
    """

    windows: Tensor
    domains: Tensor
    names: tuple[str, ...]
    record: dict[str, Any]


def token_stream(
    source: DataSource,
    tokenizer: Any,
    *,
    max_tokens: int | None,
    split: str,
    seed: int = 0,
    model: Any = None,
    keep: Path | None = None,
    progress: ProgressReporter | None = None,
) -> Tensor:
    """Read the first tokens of a source, and no more of it than they need.

    Documents are joined by a blank line and tokenized as one text, with the tokenizer's special
    tokens at its beginning only.

    Args:
        source: where the text comes from.
        tokenizer: of the model.
        max_tokens: as many at most; None for all there are.
        split: ``train`` or ``test``; local files have none.
        seed: of sampling, for ``self``.
        model: for ``self``, and to check that it knows every token.
        keep: file for what ``self`` samples, to go on from.
        progress: reports one unit per token that ``self`` samples.

    Returns:
        Token ids [n] int64.

    Raises:
        DataError: the source is unknown, cannot be read, holds no text, or tokens that the model does
            not know.
        ConfigError: ``self`` without ``max_tokens`` or model, an option that cannot apply to the
            source, or a split that built-in texts have not.
    """
    if source.name == "self":
        options: dict[str, Any] = {"split": split, "seed": seed, "keep": keep, "progress": progress}
        return sampled_tokens(model, tokenizer, max_tokens, **options)
    target = float("inf") if max_tokens is None else 8.0 * max_tokens + 4096
    parts: list[str] = []
    length = 0
    with closing(text_pieces(source, source.split or split, tokenizer)) as pieces:
        while True:
            complete = True
            for piece in pieces:
                parts.append(piece)
                length += len(piece)
                if length >= target:
                    complete = False
                    break
            text = "".join(parts)
            parts = [text]
            if complete and not text.strip():
                raise _no_text(source)
            ids = _token_ids(text, tokenizer, source)
            if complete or (max_tokens is not None and len(ids) >= max_tokens + _CUT_MARGIN):
                ids = ids[:max_tokens]
                _check_known(ids, tokenizer, model, source)
                return ids
            target *= 2


def _token_ids(text: str, tokenizer: Any, source: DataSource) -> Tensor:
    # Chat templates write the token themselves that the tokenizer would put in front.
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=not begun, verbose=False)["input_ids"]
    if not ids:
        raise DataError(f"data source {shown(source.name)}: the tokenizer makes no tokens of it")
    return torch.tensor(ids, dtype=torch.int64)


def _no_text(source: DataSource) -> DataError:
    path = expanded(source.name)
    once = ""
    if source.is_local and not path.is_file() and not path.is_dir():
        once = ". A pipe is read once: write it to a file for more"
    return DataError(f"data source {shown(source.name)} holds no text; expected some words{once}")


def _check_known(ids: Tensor, tokenizer: Any, model: Any, source: DataSource) -> None:
    if model is None:
        return
    known = model.get_input_embeddings().weight.shape[0]
    highest = int(ids.max())
    if highest >= known:
        raise DataError(
            f"data source {shown(source.name)} has token {highest} "
            f"({tokenizer.convert_ids_to_tokens(highest)!r}), but the model's embedding has {known} "
            f"rows (the tokenizer knows {len(tokenizer)} tokens); use the tokenizer of this model, or "
            "resize the model's embeddings"
        )


def calibration_windows(
    sources: Sequence[DataSource],
    tokenizer: Any,
    *,
    max_tokens: int | None,
    window: int,
    split: str = "train",
    seed: int = 0,
    model: Any = None,
    keep: Path | None = None,
    progress: ProgressReporter | None = None,
) -> CalibrationText:
    """Mix sources by weight into shuffled windows.

    A source with less text than its share gives what it has; the record says how much.

    Args:
        sources: at least one.
        tokenizer: of the model.
        max_tokens: total over the sources; None takes all the text of each, whatever its weight.
        window: tokens per window.
        split: as in :func:`token_stream`.
        seed: of the shuffle, and of sampling from the model.
        model, keep, progress: as in :func:`token_stream`.

    Raises:
        DataError: a source cannot be read, or holds less than one window.
        ConfigError: no source, or ``max_tokens`` below one window.
    """
    if not sources:
        raise ConfigError("no data source is given; expected at least one --data")
    if max_tokens is not None and max_tokens < window:
        raise ConfigError(f"max_tokens is {max_tokens}; expected at least one window, {window}")
    total_weight = sum(source.weight for source in sources)
    windows, records = [], []
    options: dict[str, Any] = {"split": split, "seed": seed, "model": model, "keep": keep}
    options["progress"] = progress
    for source in sources:
        share = _share(source, total_weight, max_tokens, window)
        ids = token_stream(source, tokenizer, max_tokens=share, **options)
        count = len(ids) // window
        if count == 0:
            raise DataError(
                f"data source {shown(source.name)} has {len(ids)} tokens, fewer than one window of "
                f"{window}; give a longer text or a smaller window"
            )
        ids = ids[: count * window]
        windows.append(ids.view(count, window))
        records.append(_record(source, split, source.weight / total_weight, ids))
    counts = [len(own) for own in windows]
    order = _spread(counts, torch.Generator().manual_seed(seed))
    together = torch.cat(windows)[order]
    domains = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[order]
    return CalibrationText(
        together,
        domains,
        _names(sources),
        {
            "sources": records,
            "tokens": together.numel(),
            "window": window,
            "sha256": hashlib.sha256(together.numpy().tobytes()).hexdigest(),
        },
    )


def _spread(counts: Sequence[int], generator: torch.Generator) -> Tensor:
    """A shuffled order of the windows in which each source's are spread evenly [W]."""
    shuffled, places = [], []
    first = 0
    for count in counts:
        shuffled.append(first + torch.randperm(count, generator=generator))
        places.append((torch.arange(count) + 0.5) / count)
        first += count
    return torch.cat(shuffled)[torch.cat(places).argsort(stable=True)]


def _names(sources: Sequence[DataSource]) -> tuple[str, ...]:
    """Names of sources, numbered where one comes again."""
    names: list[str] = []
    for source in sources:
        before = sum(other.name == source.name for other in sources[: len(names)])
        names.append(source.name if before == 0 else f"{source.name} ({before + 1})")
    return tuple(names)


def hold_out(
    sources: Sequence[DataSource],
    tokenizer: Any,
    *,
    max_tokens: int | None,
    test_tokens: int,
    window: int,
    seed: int = 0,
    model: Any = None,
) -> tuple[list[DataSource], Tensor]:
    """Text to judge on that the calibration does not see, of the first source.

    That is its test split, or, where it has none, the tokens after those that the calibration takes: if
    there are too few for both, the last fifth of all there are.

    Args:
        sources: of the calibration, as in :func:`calibration_windows`.
        tokenizer: of the model.
        max_tokens: of the calibration.
        test_tokens: as many at most.
        window: tokens per window.
        seed: of sampling from the model.
        model: as in :func:`token_stream`.

    Returns:
        The sources to calibrate on, the first one bounded where it was split, and the held-out tokens
        [n] int64.

    Raises:
        DataError: as :func:`calibration_windows`; also where the source is too short to be split.
        ConfigError: see :func:`token_stream`.
    """
    first, *others = sources
    if first.has_test_split:
        tokens = token_stream(
            first, tokenizer, max_tokens=test_tokens, split="test", seed=seed, model=model
        )
        return [first, *others], tokens
    share = _share(first, sum(source.weight for source in sources), max_tokens, window)
    wanted = None if share is None else share + test_tokens
    ids = token_stream(first, tokenizer, max_tokens=wanted, split="train", seed=seed, model=model)
    if share is None or len(ids) < share + test_tokens:
        held_out = min(test_tokens, max(window, int(_HELD_OUT_SHARE * len(ids))))
        share = len(ids) - held_out
    if share < window:
        raise DataError(
            f"data source {shown(first.name)} has {len(ids)} tokens, too few for a window of {window} "
            "to calibrate on and one that is held out; name a text to test on with --test, or give a "
            "longer text"
        )
    return [replace(first, max_tokens=share), *others], ids[share : share + test_tokens]


def num_sampled_tokens(sources: Sequence[DataSource], max_tokens: int, window: int) -> int:
    """How many tokens :func:`calibration_windows` samples from the model; arguments as there."""
    total_weight = sum(source.weight for source in sources)
    own = [source for source in sources if source.name == "self"]
    return sum(_share(source, total_weight, max_tokens, window) or 0 for source in own)


def _share(
    source: DataSource, total_weight: float, max_tokens: int | None, window: int
) -> int | None:
    """Tokens of a source's beginning that the calibration takes; None for all."""
    share = None
    if max_tokens is not None:
        share = max(window, round(max_tokens * source.weight / total_weight))
    if source.max_tokens is not None:
        share = source.max_tokens if share is None else min(share, source.max_tokens)
    return share


def _record(source: DataSource, split: str, weight: float, ids: Tensor) -> dict[str, Any]:
    record = source.record()
    if source.has_test_split or source.split is not None:
        record["split"] = source.split or split
    return {**record, "weight": weight, "tokens": len(ids), "sketch": sketch(ids)}
