"""``general``: calibration text of many kinds, from the Hub or from what a machine has without it.

What a build does not calibrate on, a sparse model is worse at: built on Wikipedia alone, the demo model
lost four times as much on programs and mathematics (docs/LOG.md has the weights' measurements).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparse_runtime.clusters.text.sources import RECIPES, DataSource, parse_source
from sparse_runtime.hub import why_unreachable

# Prose, web, programs, mathematics, dialogue, and what the model says itself.
_FROM_HUB = (
    "wikitext2,weight=3",
    "c4,weight=4",
    "codeparrot/codeparrot-clean-valid,split=train,key=content,weight=3",
    "openai/gsm8k:main,key=question+answer,weight=2",
    "HuggingFaceH4/ultrachat_200k,split=train_sft,key=messages,weight=2",
    "self,weight=2",
)
_OFFLINE = ("self,weight=5", "stdlib,weight=2", "pydoc,weight=1")


@dataclass(frozen=True)
class Recipe:
    """What sources came of those that were named.

    Attributes:
        sources: without recipes.
        note: which sources a recipe stood for and why, in words; None where none was named.
    """

    sources: list[DataSource]
    note: str | None = None


def expand_recipes(sources: Sequence[DataSource | str], *, sampled: bool = True) -> Recipe:
    """Put a recipe's sources in its place, their weights parts of its own.

    Args:
        sources: parsed, or as written on the command line.
        sampled: with the text that a recipe has sampled from the model.

    Raises:
        ConfigError, DataError: see ``parse_source``.
    """
    parsed = [parse_source(source) if isinstance(source, str) else source for source in sources]
    expanded: list[DataSource] = []
    note = None
    for source in parsed:
        if source.name not in RECIPES:
            expanded.append(source)
            continue
        reason = why_unreachable()
        parts = [parse_source(spec) for spec in (_OFFLINE if reason else _FROM_HUB)]
        if not sampled:
            parts = [part for part in parts if part.name != "self"]
        whole = sum(part.weight for part in parts)
        expanded += [replace(p, weight=source.weight * p.weight / whole) for p in parts]
        names = ", ".join(f"{part.name} {part.weight / whole:.0%}" for part in parts)
        note = f"{source.name}: {names}" + (f", as {reason}" if reason else "")
    return Recipe(expanded, note)
