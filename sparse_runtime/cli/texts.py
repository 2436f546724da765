"""Models with the texts that they are judged on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sparse_runtime.cli.options import resolve_dtype
from sparse_runtime.errors import DataError
from sparse_runtime.models import load_model

if TYPE_CHECKING:
    from sparse_runtime.clusters.data import CalibrationText


def fit_and_test(
    model: str,
    data: list[str] | None,
    test: str | None,
    max_tokens: int,
    test_tokens: int,
    window: int,
    seed: int,
    dtype: str,
    device: str | None,
) -> tuple[Any, CalibrationText, torch.Tensor, torch.Tensor]:
    """A model, calibration text, and the tokens of held-out text, also as windows [W, window]."""
    from sparse_runtime.clusters.data import calibration_windows, parse_source

    sources = data or ["wikitext2"]
    loaded, tokenizer = load_model(model, dtype=resolve_dtype(dtype, device), device=device)
    text = calibration_windows(
        [parse_source(source) for source in sources],
        tokenizer,
        max_tokens=max_tokens,
        window=window,
        seed=seed,
        model=loaded,
    )
    tokens = held_out(test or sources[0], tokenizer, test_tokens, loaded)
    whole = len(tokens) // window
    if whole == 0:
        raise DataError(f"the held-out text has {len(tokens)} tokens; expected {window} or more")
    return loaded, text, tokens, tokens[: whole * window].view(whole, window)


def held_out(source: str, tokenizer: Any, max_tokens: int, model: Any) -> torch.Tensor:
    """First tokens of held-out text [n]."""
    from sparse_runtime.clusters.data import parse_source, token_stream

    return token_stream(
        parse_source(source), tokenizer, max_tokens=max_tokens, split="test", model=model
    )
