"""Binary patterns of the three projections of each FFN, as the AWC paper collects them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_runtime.clusters.paper.binary_patterns import (
    MagnitudeHistogram,
    PackedPatterns,
    binarize,
)
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_ffn_layers, find_single_ffns
from sparse_runtime.progress import ProgressReporter, SilentProgress

PROJECTIONS = ("gate", "up", "down")

#: Layer index -> projection -> one value.
ByLayer = dict[int, dict[str, float]]


@dataclass(frozen=True, eq=False)
class PaperPatterns:
    """Binary patterns of a text.

    Attributes:
        thresholds: layer index -> projection -> threshold on |value|.
        patterns: layer index -> projection -> patterns of N tokens over I (gate, up) or H (down)
            values.
    """

    thresholds: ByLayer
    patterns: dict[int, dict[str, PackedPatterns]]

    def pooled(self, projection: str) -> PackedPatterns:
        """Patterns of all layers in one set [L · N, width], a copy."""
        return PackedPatterns.concat([layer[projection] for layer in self.patterns.values()])


def pattern_bytes(model: nn.Module, num_tokens: int) -> int:
    """Memory that the patterns of a text take: L · tokens · (2⌈I/8⌉ + ⌈H/8⌉) bytes.

    32 k tokens are 0.45 GB for SmolLM2-135M and 4.3 GB for Mistral-7B.
    """
    return sum(
        num_tokens * (2 * -(-layer.intermediate_size // 8) + -(-layer.hidden_size // 8))
        for layer in find_ffn_layers(model)
    )


def collect_paper_patterns(
    model: nn.Module,
    windows: Sequence[Tensor] | Tensor,
    percentile: float = 50.0,
    *,
    thresholds: ByLayer | None = None,
    enforce: bool = True,
    progress: ProgressReporter | None = None,
) -> PaperPatterns:
    """Collect the patterns of all three projections in two passes over a text.

    Pass 1, through the dense model, sets the thresholds; pass 2 records the patterns. Memory:
    6 MiB of histograms a layer in pass 1, :func:`pattern_bytes` (twice that at the end, for a
    moment) in pass 2.

    Args:
        model: causal language model with gated FFNs; it is left as it was.
        windows: token ids int64, [W, T], or W tensors [T] or [B, T]. Read twice.
        percentile: of |value|, per layer and projection; 50 keeps half of the values.
        thresholds: thresholds of an earlier call, for held-out text; skips pass 1.
        enforce: zero the values below their threshold during pass 2, as the paper's artifact
            does: the patterns are then those of the thresholded model, and in later layers not
            exactly ``percentile`` % are zero. False records the dense model's patterns.
        progress: reports one unit per window and pass.

    Raises:
        ConfigError: ``percentile`` is not in [0, 100), or ``thresholds`` are for other layers.
        DataError: there are no windows, or activations are not finite.
        UnsupportedArchitectureError, NothingMatchedError: see ``find_ffn_layers``.
    """
    if len(windows) == 0:
        raise DataError("no windows of text to collect patterns from; pass at least one")
    layers = find_single_ffns(model, "the paper's evaluation")
    progress = progress or SilentProgress()
    if thresholds is None:
        thresholds = _collect_thresholds(model, layers, windows, percentile, progress)
    check_layers(layers, thresholds, "thresholds")
    bitmaps: dict[tuple[int, str], list[Tensor]] = {
        (layer.index, projection): [] for layer in layers for projection in PROJECTIONS
    }

    def record(layer: FFNLayer, projection: str) -> Callable[[Tensor], Tensor]:
        threshold = thresholds[layer.index][projection]

        def edit(output: Tensor) -> Tensor:
            bitmaps[layer.index, projection].append(binarize(output, threshold).cpu())
            return above(output, threshold) if enforce else output

        return edit

    with edited_outputs(layers, record):
        _run(model, windows, "patterns", progress)
    patterns = {}
    for layer in layers:
        widths = {"gate": layer.intermediate_size, "up": layer.intermediate_size}
        patterns[layer.index] = {
            projection: PackedPatterns(
                torch.cat(bitmaps.pop((layer.index, projection))),
                widths.get(projection, layer.hidden_size),
            )
            for projection in PROJECTIONS
        }
    return PaperPatterns(thresholds, patterns)


def _collect_thresholds(
    model: nn.Module,
    layers: Sequence[FFNLayer],
    windows: Sequence[Tensor] | Tensor,
    percentile: float,
    progress: ProgressReporter,
) -> ByLayer:
    histograms: dict[int, dict[str, MagnitudeHistogram]] = {
        layer.index: {projection: MagnitudeHistogram() for projection in PROJECTIONS}
        for layer in layers
    }
    if not 0 <= percentile < 100:  # before the pass over the text, not after it
        raise ConfigError(f"percentile is {percentile}; expected 0 <= percentile < 100")

    def count(layer: FFNLayer, projection: str) -> Callable[[Tensor], Tensor]:
        histogram = histograms[layer.index][projection]

        def edit(output: Tensor) -> Tensor:
            histogram.add(output)
            return output

        return edit

    with edited_outputs(layers, count):
        _run(model, windows, "thresholds", progress)
    return {
        index: {name: histogram.percentile(percentile) for name, histogram in row.items()}
        for index, row in histograms.items()
    }


def above(output: Tensor, threshold: float) -> Tensor:
    """Zero the values with ``|value| <= threshold``, any shape."""
    return output.masked_fill(output.float().abs() <= threshold, 0)


@contextmanager
def edited_outputs(
    layers: Sequence[FFNLayer], make_edit: Callable[[FFNLayer, str], Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Replace each projection's output by an edit of it while the context is open.

    Args:
        layers: FFNs to hook.
        make_edit: (layer, projection) -> function of the output [n, width] that returns what the
            model goes on with, of the same shape.
    """
    with ExitStack() as hooks:
        for layer in layers:
            for projection in PROJECTIONS:
                edit = make_edit(layer, projection)
                handle = getattr(layer, projection).register_forward_hook(_output_hook(edit))
                hooks.callback(handle.remove)
        yield


def _output_hook(edit: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    # The last dimension holds the neurons; batch and time are tokens alike.
    return lambda module, args, output: edit(output.flatten(0, -2)).view_as(output)


def check_layers(layers: Sequence[FFNLayer], values: ByLayer, what: str) -> None:
    """Check that ``values`` are for exactly these layers, else raise ConfigError."""
    expected = [layer.index for layer in layers]
    if sorted(values) != expected:
        raise ConfigError(
            f"the {what} are for layers {sorted(values)}; this model has {expected}. "
            f"Use {what} of this model"
        )


def _run(
    model: nn.Module,
    windows: Sequence[Tensor] | Tensor,
    description: str,
    progress: ProgressReporter,
) -> None:
    device = next(model.parameters()).device
    with torch.inference_mode(), progress.task(description, len(windows)) as advance:
        for window in windows:
            input_ids = torch.atleast_2d(window).to(device)
            # Logits of the last position only: the head is not what is measured.
            model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
            advance(1)
