"""What is checked before a build begins its work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_runtime.clusters.config import BuildConfig, BuildSettings
from sparse_runtime.clusters.ranks import Ranks
from sparse_runtime.clusters.text import CalibrationText
from sparse_runtime.errors import ConfigError, DataError, ModelError
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.onloading import is_offloaded


def settings_for(model: Any, config: BuildConfig | None) -> BuildSettings:
    """What a build of a model runs: nothing is distilled unasked where weights are offloaded."""
    config = config or BuildConfig()
    if is_offloaded(model) and config.distill is None:
        config = replace(config, distill=0)
    return config.resolved()


def num_fit_tokens(text: CalibrationText, config: BuildConfig | BuildSettings) -> int:
    """Tokens of the windows that are fitted on; the windows after them are held out."""
    num_windows, window = text.windows.shape
    held_out = max(1, round(num_windows * config.held_out_share))
    if num_windows < 2:
        raise DataError(
            f"the calibration text gives {num_windows} window of {window} tokens; expected 2 or "
            "more, as one is held out. Give more text, raise max_tokens or lower the window"
        )
    num_fit = (num_windows - held_out) * window
    if config.num_clusters > num_fit:
        raise DataError(
            f"{config.num_clusters} clusters were asked for, but only {num_fit} calibration tokens "
            f"are there to fit them ({held_out * window} more are held out); give more text, raise "
            "max_tokens or lower the number of clusters"
        )
    return num_fit


def check_ranks(ranks: Ranks, text: CalibrationText, settings: BuildSettings) -> None:
    """That processes have the same settings, and windows for each of them."""
    others = ranks.gather(settings.record())
    for rank, other in enumerate(others):
        changed = [name for name, value in other.items() if value != others[0][name]]
        if changed:
            raise ConfigError(
                f"{changed[0]} is {other[changed[0]]!r} in process {rank} and "
                f"{others[0][changed[0]]!r} in the first; expected the same settings in all that "
                "build together"
            )
    num_fit = num_fit_tokens(text, settings) // text.windows.shape[1]
    if num_fit < ranks.count:
        raise ConfigError(
            f"{ranks.count} processes build together, but there are {num_fit} windows to fit on; "
            "expected one for each at least. Start fewer processes, or give more text"
        )


def check_in_memory(layers: list[FFNLayer]) -> None:
    """That no FFN's weights are offloaded, for a distillation. Raises ModelError."""
    for layer in layers:
        if any(weight.device.type == "meta" for weight in layer.weights):
            raise ModelError(
                f"{layer.name} has no weights in memory: they are offloaded. Distillation runs the "
                "whole model in memory; load it without offloading (device_map='cpu'), or build with "
                "distill 0"
            )
