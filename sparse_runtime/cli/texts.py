"""Models with the texts that they are judged on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sparse_runtime.cli.console import note, warn
from sparse_runtime.cli.options import resolve_dtype
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.models import load_model

if TYPE_CHECKING:
    from sparse_runtime.clusters.text import CalibrationText, DataSource


def fit_sources(
    specs: list[str] | None, default: str = "wikitext2", *, sampled: bool = True
) -> list[DataSource]:
    """Sources to calibrate on; what cannot be there is refused unread.

    Args:
        specs: as given, recipes among them; says which sources these stand for.
        default: where none is given.
        sampled: as of ``expand_recipes``.

    Raises:
        ConfigError, DataError: see ``parse_source`` and ``check_source``.
    """
    from sparse_runtime.clusters.text import check_source, expand_recipes

    recipe = expand_recipes(specs or [default], sampled=sampled)
    for source in recipe.sources:
        check_source(source)
    if recipe.note:
        note(f"calibration text is {recipe.note}")
    return recipe.sources


def judged_source(spec: str) -> DataSource:
    """A text to judge by, checked in the same way; it is taken whole, and has no weight."""
    from sparse_runtime.clusters.text import check_source, parse_source

    source = parse_source(spec)
    check_source(source)
    if source.weight != 1.0:
        raise ConfigError(
            f"data source {source.name!r}: weight is {source.weight}, but each text is judged by "
            "itself; leave weight= out"
        )
    return source


def check_windows_fit(window: int, tokens: dict[str, int]) -> None:
    """Refuse options, by name, that ask for fewer tokens than one window. Raises ConfigError."""
    for option, count in tokens.items():
        if count < window:
            raise ConfigError(f"{option} is {count}; expected at least one window, {window}")


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
    from sparse_runtime.clusters.text import calibration_windows

    check_windows_fit(window, {"--max-tokens": max_tokens, "--test-tokens": test_tokens})
    sources, test_text = fit_sources(data), None if test is None else judged_source(test)
    loaded, tokenizer = load_model(model, dtype=resolve_dtype(dtype, device), device=device)
    sources, tokens = held_out_of(
        sources, test_text, tokenizer, max_tokens, test_tokens, window, loaded, seed
    )
    text = calibration_windows(
        sources, tokenizer, max_tokens=max_tokens, window=window, seed=seed, model=loaded
    )
    warn_of_overlap(test or sources[0].name, tokens, text.record)
    whole = len(tokens) // window
    if whole == 0:
        raise DataError(f"the held-out text has {len(tokens)} tokens; expected {window} or more")
    return loaded, text, tokens, tokens[: whole * window].view(whole, window)


def held_out_of(
    sources: list[DataSource],
    test: DataSource | None,
    tokenizer: Any,
    max_tokens: int,
    test_tokens: int,
    window: int,
    model: Any,
    seed: int = 0,
) -> tuple[list[DataSource], torch.Tensor]:
    """Sources to calibrate on, and the tokens of --test, or of the first source's held-out text."""
    from sparse_runtime.clusters.text import hold_out

    if test is not None:
        return sources, held_out(test, tokenizer, test_tokens, model)
    return hold_out(
        sources,
        tokenizer,
        max_tokens=max_tokens,
        test_tokens=test_tokens,
        window=window,
        seed=seed,
        model=model,
    )


def warn_of_overlap(name: str, tokens: torch.Tensor, record: Any) -> None:
    """Say so where a text to judge by is among those that something was fitted on."""
    from sparse_runtime.clusters.text import overlap_warning

    if message := overlap_warning(name, tokens, record):
        warn(message)


def held_out(source: DataSource, tokenizer: Any, max_tokens: int, model: Any) -> torch.Tensor:
    """First tokens of held-out text [n]."""
    from sparse_runtime.clusters.text import token_stream

    return token_stream(source, tokenizer, max_tokens=max_tokens, split="test", model=model)
