"""Plain and calibrated rounding of one model in planes, side by side: distance to the float model."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sparse_runtime.clusters.calibrated_packing import pack_calibrated
from sparse_runtime.eval.quality.perplexity import score_text
from sparse_runtime.eval.quality.rows import distance
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.progress import ProgressReporter

#: Name of a rounding -> options of ``pack_calibrated``; None is ``pack_model``.
ROUNDINGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "mean-squares": {"compensate": False},
    "compensated": {"compensate": True},
}


def compare_roundings(
    load: Callable[[], Any],
    windows: Tensor,
    tokens: Tensor,
    *,
    bits: Sequence[int],
    roundings: Sequence[str] = tuple(ROUNDINGS),
    linears: int | None = None,
    window: int = 512,
    progress: ProgressReporter | None = None,
) -> list[dict[str, Any]]:
    """Pack a model by each rounding and measure it.

    Args:
        load: gives the float model, anew on every call: packing takes it.
        windows: calibration windows [W, window] int64.
        tokens: held-out text [n] int64.
        bits: of the FFNs' weights, one or more.
        roundings: names of ``ROUNDINGS``.
        linears: bits of attention and head; None leaves them in float.
        window: tokens per window of the held-out text.
        progress: reports one unit per window of each run.

    Returns:
        For each number of bits one row per rounding: its ``distance`` from the float model
        (``sparse_runtime.eval.quality.rows``) and ``seconds`` that packing took.
    """
    options: dict[str, Any] = {"window": window, "progress": progress}

    def load_alone() -> Any:
        gc.collect()  # models refer to themselves: two would be in memory
        return load()

    reference = score_text(load_alone(), tokens, description="float", keep=True, **options)
    rows = []
    for number in bits:
        for name in roundings:
            model, calibrated, started = load_alone(), ROUNDINGS[name], time.perf_counter()
            if calibrated is None:
                pack_model(model, number, linears=linears)
            else:
                pack_calibrated(
                    model, windows, number, linears=linears, progress=progress, **calibrated
                )
            seconds = time.perf_counter() - started
            score = score_text(
                model, tokens, description=f"{number} bits, {name}", reference=reference, **options
            )
            rows.append(
                {
                    "weights": number,
                    "linear_weights": linears,
                    "rounding": name,
                    **distance(score, reference),
                    "seconds": seconds,
                }
            )
            del model
    return rows
