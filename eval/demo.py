"""The whole path on the bundled small model: build, generate side by side, judge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparse_runtime.api import sparsify, unsparsify
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.format import CONFIG_FILE
from sparse_runtime.clusters import BuildConfig, build_clusters
from sparse_runtime.clusters.text import parse_source, token_stream
from sparse_runtime.eval.latency.host import host_record
from sparse_runtime.eval.quality.artifact_quality import evaluate_quality
from sparse_runtime.models import load_model
from sparse_runtime.progress import ProgressReporter

DATA = "pydoc"
PROMPTS = (
    "In Python, a list comprehension is",
    "The with statement is used to wrap the execution of a block",
)
# Sized for ten minutes on two cores; `build` without options spends more on quality.
BUILD = BuildConfig(budget=0.5, max_tokens=24_576, router="32", distill=20)
_EVALUATION_TOKENS = 4096
_NEW_TOKENS = 48


def run_demo(
    folder: Path,
    console: Console,
    progress: ProgressReporter,
    generate: Callable[..., dict[str, Any]],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Build (or reuse) ``folder/clusters`` and compare sparse with dense.

    Args:
        folder: where the artifact is kept.
        console: prints the continuations.
        progress: draws bars.
        generate: continues a text, ``(model, tokenizer, prompt, variant, max_new_tokens=…) ->
            figures``.
        dtype: of the model.

    Returns:
        ``quality`` as of ``evaluate_quality`` on topics left out of the calibration,
        ``generations``, ``build`` and ``host``.
    """
    model, tokenizer = load_model("demo", dtype=dtype)
    clusters = _reusable(folder / "clusters")
    if clusters is None:
        clusters = build_clusters(
            model,
            tokenizer,
            [DATA],
            BUILD,
            output=folder / "clusters",
            model_name="demo",
            progress=progress,
        )
    generations = []
    sparsify(model, clusters)
    for prompt in PROMPTS:
        # Unmeasured runs: the first call of a length sets up threads, caches and the fastest path.
        for variant in ("dense", "sparse"):
            generate(model, tokenizer, prompt, variant, max_new_tokens=4)
        runs = {
            variant: generate(model, tokenizer, prompt, variant, max_new_tokens=_NEW_TOKENS)
            for variant in ("dense", "sparse")
        }
        _print_side_by_side(console, prompt, runs)
        generations.append({"prompt": prompt, **runs})
    unsparsify(model)
    tokens = token_stream(
        parse_source(DATA), tokenizer, max_tokens=_EVALUATION_TOKENS, split="test"
    )
    quality = evaluate_quality(model, clusters, tokens, progress=progress)
    return {
        "quality": quality,
        "generations": generations,
        "dtype": str(dtype).removeprefix("torch."),
        "build": clusters.build,
        "host": host_record(),
    }


def _reusable(folder: Path) -> ClusterSet | None:
    if not (folder / CONFIG_FILE).exists():
        return None
    clusters = ClusterSet.from_pretrained(folder)
    return clusters if clusters.build.get("config") == BUILD.resolved().record() else None


def _print_side_by_side(console: Console, prompt: str, runs: dict[str, dict[str, Any]]) -> None:
    table = Table(title=escape(prompt), show_lines=True)
    for variant, run in runs.items():
        share = 1.0 if variant == "dense" else run["cost_share"]
        rate = run["tokens_per_second"]
        speed = "no rate" if rate is None else f"{rate:.1f} tokens/s"
        table.add_column(f"{variant}: {speed}, FFN cost share {share:.2f}", ratio=1)
    table.add_row(*(escape(run["text"].strip()) for run in runs.values()))
    console.print(table)
    if runs["sparse"]["nothing_sparse"]:
        console.print(escape(f"nothing ran sparse: {runs['sparse']['nothing_sparse']}"))
