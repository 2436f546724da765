"""One layer's tokens: hidden states, importance, and how many neurons a budget buys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparse_runtime.clusters.buffers import Buffer
from sparse_runtime.clusters.capture import HiddenStates
from sparse_runtime.clusters.config import BuildSettings
from sparse_runtime.clusters.importance import chunk_rows, chunk_slices, importance_scorer
from sparse_runtime.clusters.paper.binary_patterns import PackedPatterns, percentile_threshold
from sparse_runtime.cost import FFNCost, router_parameter_count
from sparse_runtime.errors import ConfigError
from sparse_runtime.kernels.bitmaps import pack_bits
from sparse_runtime.kernels.planes import PlaneFormat
from sparse_runtime.models.ffn_layer import FFNLayer, layer_cost


@dataclass
class LayerData:
    """A layer's calibration tokens, the last of them held out.

    Attributes:
        hidden_states: [N, H] float32.
        importance: [N, I] bfloat16.
        num_fit: tokens to fit on; the rest are held out.
        present: of a mixture of experts, which of them each token has, bool [N, E].
    """

    hidden_states: Tensor
    importance: Tensor
    num_fit: int
    present: Tensor | None = None

    def free(self) -> None:
        """Let go of the tensors."""
        self.hidden_states = self.importance = torch.empty(0)

    def at_most(self, tokens: int) -> LayerData:
        """The same with so many tokens to fit on, at most."""
        kept = min(tokens, self.num_fit)
        parts = (slice(0, kept), self.held_out)
        return LayerData(
            torch.cat([self.hidden_states[part] for part in parts]),
            torch.cat([self.importance[part] for part in parts]),
            kept,
            None if self.present is None else torch.cat([self.present[part] for part in parts]),
        )

    @property
    def present_in_fit(self) -> Tensor | None:
        """``present`` of the tokens to fit on."""
        return None if self.present is None else self.present[self.fit]

    @property
    def fit(self) -> slice:
        """Rows to fit on."""
        return slice(0, self.num_fit)

    @property
    def held_out(self) -> slice:
        """Rows to judge by."""
        return slice(self.num_fit, len(self.hidden_states))


def routed_cost(
    layer: FFNLayer, config: BuildSettings, rank: int | None, correction_rank: int = 0
) -> FFNCost:
    """Cost of a layer with a router of this rank, in the format that the build is for."""
    extra = router_parameter_count(layer.hidden_size, config.num_clusters, rank)
    extra += (config.cluster_bias + 2 * correction_rank) * layer.hidden_size
    form = None if config.weights is None else PlaneFormat.of_bits(config.weights)
    return layer_cost(layer, extra, verified=config.verify, form=form)


def set_size_for(
    layer: FFNLayer, config: BuildSettings, rank: int | None, correction_rank: int = 0
) -> int:
    """Neurons per active set that the budget allows beside a router, and a correction, of these ranks.

    Raises:
        ConfigError: they alone exceed the budget.
    """
    cost = routed_cost(layer, config, rank, correction_rank)
    size = int(cost.density_for(config.budget) * layer.intermediate_size)
    if size < 1:
        kind = "linear router" if rank is None else f"router of rank {rank}"
        correction = f" with a correction of rank {correction_rank}" if correction_rank else ""
        raise ConfigError(
            f"budget is {config.budget}, but the {kind} for {config.num_clusters} clusters{correction} "
            f"alone costs {cost.share(0):.3f} of the FFN; expected a larger budget, fewer clusters or "
            "smaller ranks"
        )
    return size


def load_layer(
    states: HiddenStates,
    position: int,
    layer: FFNLayer,
    config: BuildSettings,
    *,
    num_fit: int,
    spill_file: Path,
    fisher: Tensor | None = None,
) -> tuple[LayerData, Buffer]:
    """Read a layer's hidden states and score its neurons.

    ``fisher`` is the layer's ``fisher_weights`` [I], used for importance ``fisher``.

    Returns:
        The data and the matrix behind its importance, to be closed after use.
    """
    hidden_states = states.layer(position)
    matrix = Buffer(
        (len(hidden_states), layer.intermediate_size),
        torch.bfloat16,
        memory_mib=config.memory_mib,
        spill_file=spill_file,
    )
    scorer = importance_scorer(layer, fisher if config.importance == "fisher" else None)
    device = layer.device
    present = []
    rows_at_once = chunk_rows(layer.intermediate_size, device)
    for rows in chunk_slices(len(hidden_states), rows_at_once):
        chunk = hidden_states[rows].to(device)
        matrix.values[rows] = scorer(chunk).to("cpu", torch.bfloat16)
        present.append(scorer.present(chunk))
    if config.percentile is not None:
        chunks = (matrix.values[r] for r in chunk_slices(num_fit, rows_at_once))
        threshold = percentile_threshold(chunks, config.percentile)
        for rows in chunk_slices(len(hidden_states), rows_at_once):
            matrix.values[rows] = (matrix.values[rows] > threshold).to(torch.bfloat16)
    known = (
        torch.cat([part.cpu() for part in present if part is not None]) if layer.experts else None
    )
    return LayerData(hidden_states, matrix.values, num_fit, known), matrix


def packed_patterns(importance: Tensor) -> PackedPatterns:
    """Bit-pack binary importance [N, I]."""
    rows_at_once = chunk_rows(importance.shape[1])
    bits = [pack_bits(importance[r] > 0) for r in chunk_slices(len(importance), rows_at_once)]
    return PackedPatterns(torch.cat(bits), importance.shape[1])
