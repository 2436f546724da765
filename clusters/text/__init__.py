"""Text for calibration and evaluation: sources → documents → tokens → windows."""

from sparse_runtime.clusters.text.overlap import overlap, overlap_warning
from sparse_runtime.clusters.text.recipes import Recipe, expand_recipes
from sparse_runtime.clusters.text.sources import (
    DataSource,
    check_source,
    parse_source,
    recorded_source,
)
from sparse_runtime.clusters.text.windows import (
    CalibrationText,
    calibration_windows,
    hold_out,
    num_sampled_tokens,
    token_stream,
)

__all__ = [
    "CalibrationText",
    "DataSource",
    "Recipe",
    "calibration_windows",
    "check_source",
    "expand_recipes",
    "hold_out",
    "num_sampled_tokens",
    "overlap",
    "overlap_warning",
    "parse_source",
    "recorded_source",
    "token_stream",
]
