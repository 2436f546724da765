"""Text sources for calibration and evaluation.

A source is written ``NAME[,weight=W][,key=A+B][,split=S]``, where NAME is a local text or .jsonl file,
a data set known by a short name, any Hub data set ``owner/name[:config]``, ``pydoc`` (the language
reference inside every Python, offline) or ``self`` (text sampled from the model itself).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.models import hub_failure

TEXT_SUFFIXES = (".txt", ".raw", ".tokens", ".md")
#: Short name -> (Hub id, configuration, split for evaluation).
HUB_DATA = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": ("allenai/c4", "en", "validation"),
}
_PYDOC_TEST_EVERY = 10
_SELF_SEQUENCE = 256
_SELF_BATCH = 16
# A cut text can tokenize differently from the whole only next to the cut.
_CUT_MARGIN = 64


@dataclass(frozen=True)
class DataSource:
    """A text source.

    Attributes:
        name: file, data set, ``pydoc`` or ``self``.
        weight: share of the calibration text, relative to the other sources.
        keys: fields of a record whose values, joined by a newline, are its text.
        split: overrides the split that the caller asks for.
    """

    name: str
    weight: float = 1.0
    keys: tuple[str, ...] = ("text",)
    split: str | None = None


@dataclass(frozen=True)
class CalibrationText:
    """Calibration windows, shuffled.

    Attributes:
        windows: token ids [W, window] int64.
        record: names, splits and token counts of the sources and a hash over the ids, as JSON.
    """

    windows: Tensor
    record: dict[str, Any]


def parse_source(spec: str) -> DataSource:
    """Read a source as written on the command line.

    Raises:
        ConfigError: an option is unknown or has a value that cannot be used.
    """
    if Path(spec).exists():
        return DataSource(spec)
    name, *options = spec.split(",")
    if not name:
        raise ConfigError(f"data source {spec!r} has no name; expected NAME[,weight=W]…")
    fields: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key == "weight":
            fields["weight"] = _weight(spec, value)
        elif key == "key" and value:
            fields["keys"] = tuple(value.split("+"))
        elif key == "split" and value:
            fields["split"] = value
        else:
            raise ConfigError(
                f"data source {spec!r}: option {option!r} is not known; expected weight=W, key=A+B or "
                "split=S"
            )
    return DataSource(name, **fields)


def _weight(spec: str, value: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise ConfigError(f"data source {spec!r}: weight is {value!r}; expected a number above 0")
    return weight


def token_stream(
    source: DataSource,
    tokenizer: Any,
    *,
    max_tokens: int | None,
    split: str,
    seed: int = 0,
    model: Any = None,
) -> Tensor:
    """Read the first tokens of a source.

    Documents are joined by a blank line and tokenized as one text, with the tokenizer's special
    tokens at its beginning only.

    Args:
        source: where the text comes from.
        tokenizer: of the model.
        max_tokens: as many at most; None for all there are.
        split: ``train`` or ``test``; local files have none.
        seed: of sampling, for ``self``.
        model: for ``self``.

    Returns:
        Token ids [n] int64.

    Raises:
        DataError: the source is unknown, cannot be read, or holds no text.
        ConfigError: ``self`` without ``max_tokens`` or model, or a split that ``pydoc`` has not.
    """
    if source.name == "self":
        return _sample_from_model(model, tokenizer, max_tokens, seed)
    text, complete = "", False
    documents = _documents(source, source.split or split)
    target = float("inf") if max_tokens is None else 8.0 * max_tokens + 4096
    parts: list[str] = []
    length = 0
    while True:
        for document in documents:
            parts.append(document)
            length += len(document) + 2
            if length >= target:
                break
        else:
            complete = True
        text = "\n\n".join(parts)
        # A single long file is one document: tokenize no more of it than is wanted.
        cut = len(text) <= target and complete
        piece = text if cut else text[: int(target)]
        if cut and not text.strip():
            raise DataError(f"data source {source.name!r} holds no text; expected some words")
        ids = tokenizer(piece, return_tensors="pt", verbose=False)["input_ids"][0]
        if cut or (max_tokens is not None and len(ids) >= max_tokens + _CUT_MARGIN):
            return ids[:max_tokens]
        target *= 2


def calibration_windows(
    sources: Sequence[DataSource],
    tokenizer: Any,
    *,
    max_tokens: int | None,
    window: int,
    split: str = "train",
    seed: int = 0,
    model: Any = None,
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
        model: for ``self``.

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
    for source in sources:
        share = None
        if max_tokens is not None:
            share = max(window, round(max_tokens * source.weight / total_weight))
        ids = token_stream(source, tokenizer, max_tokens=share, split=split, seed=seed, model=model)
        count = len(ids) // window
        if count == 0:
            raise DataError(
                f"data source {source.name!r} has {len(ids)} tokens, fewer than one window of "
                f"{window}; give a longer text or a smaller window"
            )
        windows.append(ids[: count * window].view(count, window))
        records.append(
            {
                "name": source.name,
                "split": source.split or split,
                "weight": source.weight / total_weight,
                "tokens": count * window,
            }
        )
    together = torch.cat(windows)
    order = torch.randperm(len(together), generator=torch.Generator().manual_seed(seed))
    together = together[order]
    return CalibrationText(
        together,
        {
            "sources": records,
            "tokens": together.numel(),
            "window": window,
            "sha256": hashlib.sha256(together.numpy().tobytes()).hexdigest(),
        },
    )


def _documents(source: DataSource, split: str) -> Iterator[str]:
    path = Path(source.name).expanduser()
    if path.is_dir():
        raise DataError(
            f"data source {source.name!r} is a folder; expected a {', '.join(TEXT_SUFFIXES)} or "
            ".jsonl file"
        )
    if path.is_file():
        return _read_jsonl(path, source.keys) if path.suffix == ".jsonl" else _read_text(path)
    if path.suffix in (*TEXT_SUFFIXES, ".jsonl"):
        raise DataError(f"data source {source.name!r}: there is no such file")
    if source.name == "pydoc":
        return _pydoc_topics(split)
    if source.name in HUB_DATA or "/" in source.name:
        return _hub_documents(source, split)
    raise DataError(
        f"data source {source.name!r} is not known; expected a {', '.join(TEXT_SUFFIXES)} or .jsonl "
        f"file, one of {', '.join((*HUB_DATA, 'pydoc', 'self'))}, or a Hub data set owner/name"
    )


def _read_text(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}; "
            "convert it to UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _read_jsonl(path: Path, keys: tuple[str, ...]) -> Iterator[str]:
    lines = next(_read_text(path)).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        yield _record_text(record, keys, f"{path}, line {number}")


def _record_text(record: Any, keys: tuple[str, ...], where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(
            f"{where} is a {type(record).__name__}; expected an object with text fields"
        )
    missing = [key for key in keys if not isinstance(record.get(key), str)]
    if missing:
        raise DataError(
            f"{where} has no text under {missing[0]!r}; it has {', '.join(record)}. Name the fields "
            "with ,key=A+B"
        )
    return "\n".join(record[key] for key in keys)


def _pydoc_topics(split: str) -> Iterator[str]:
    if split not in ("train", "test"):
        raise ConfigError(f"data source 'pydoc' has no split {split!r}; expected train or test")
    from pydoc_data.topics import topics

    for number, name in enumerate(sorted(topics)):
        if (number % _PYDOC_TEST_EVERY == 0) == (split != "train"):
            yield topics[name].strip()


def _hub_documents(source: DataSource, split: str) -> Iterator[str]:
    from datasets import load_dataset

    name, configuration, test_split = HUB_DATA.get(source.name, (source.name, None, "test"))
    if ":" in name:
        name, _, configuration = name.partition(":")
    chosen = test_split if split == "test" and source.split is None else split
    where = f"data set {source.name!r}, split {chosen!r}"
    try:
        for record in load_dataset(name, configuration, split=chosen, streaming=True):
            yield _record_text(record, source.keys, where)
    except DataError:
        raise
    except Exception as error:
        # datasets, huggingface_hub, fsspec and httpx raise their own types here.
        first_line = next((line for line in str(error).splitlines() if line.strip()), "no details")
        reason = hub_failure(error) or f"{type(error).__name__}: {first_line}"
        raise DataError(
            f"{where} could not be read from the Hub ({reason}). Check the "
            "name and the network, or give a local .txt or .jsonl file, or 'pydoc', which needs no "
            "network"
        ) from error


def _sample_from_model(model: Any, tokenizer: Any, max_tokens: int | None, seed: int) -> Tensor:
    if model is None:
        raise ConfigError("data source 'self' needs the model to sample from; pass model")
    if max_tokens is None:
        raise ConfigError("data source 'self' needs a number of tokens to sample; set max_tokens")
    start = next(
        token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if token is not None
    )
    length = min(_SELF_SEQUENCE, max_tokens)
    sequences: list[Tensor] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        while sum(len(s) for s in sequences) < max_tokens:
            prompt = torch.full((_SELF_BATCH, 1), start, device=model.device)
            sampled = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=length,
                min_new_tokens=length,
                pad_token_id=start,
            )
            sequences += list(sampled[:, 1:].cpu())
    return torch.cat(sequences)[:max_tokens].clone()
