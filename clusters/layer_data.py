"""One layer's tokens: hidden states, importance, and how many neurons a budget buys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_runtime.clusters.buffers import Buffers
from sparse_runtime.clusters.capture import HiddenStates
from sparse_runtime.clusters.config import BuildSettings
from sparse_runtime.clusters.importance import chunk_rows, chunk_slices, importance_scorer
from sparse_runtime.clusters.paper.binary_patterns import PackedPatterns, percentile_threshold
from sparse_runtime.cost import FFNCost, router_parameter_count
from sparse_runtime.errors import ConfigError
from sparse_runtime.kernels.bitmaps import pack_bits
from sparse_runtime.kernels.planes import PlaneFormat
from sparse_runtime.models.ffn_layer import FFNLayer, layer_cost

# Tokens whose states are read at a time.
_READ_TOKENS = 8192


@dataclass
class LayerData:
    """A layer's calibration tokens, the last of them held out, on the layer's device.

    Attributes:
        hidden_states: [N, H], any float dtype; bfloat16 as they are captured.
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
    buffers: Buffers,
    fisher: Tensor | None = None,
) -> LayerData:
    """Read a layer's hidden states and score its neurons.

    Args:
        states: of all layers.
        position: of the layer among them.
        layer: its FFN, in memory.
        config: settings.
        num_fit: tokens to fit on.
        buffers: for the states and the importance of a layer on the CPU, each of which may go through
            a file; on a GPU they are in its memory, and so clusters and router are fitted there.
        fisher: the layer's ``fisher_weights`` [I], used for importance ``fisher``.
    """

    def room(width: int) -> Tensor:
        shape = states.num_tokens, width
        if layer.device.type == "cpu":
            return buffers.new(shape, torch.bfloat16)
        return torch.empty(*shape, dtype=torch.bfloat16, device=layer.device)

    own = room(layer.hidden_size)
    for rows, part in zip(
        own.split(_READ_TOKENS), states.chunks(position, _READ_TOKENS), strict=True
    ):
        rows.copy_(part)
    scores = room(layer.intermediate_size)
    return scored(own, layer, config, num_fit=num_fit, scores=scores, fisher=fisher)


def scored(
    hidden_states: Tensor,
    layer: FFNLayer,
    config: BuildSettings,
    *,
    num_fit: int,
    scores: Tensor,
    fisher: Tensor | None = None,
) -> LayerData:
    """Score a layer's neurons for its hidden states [N, H].

    Other arguments as of :func:`load_layer`; ``scores`` [N, I] bfloat16 become the importance.
    """
    scorer = importance_scorer(layer, fisher if config.importance == "fisher" else None)
    present = []
    rows_at_once = chunk_rows(layer.intermediate_size, layer.device)
    for rows in chunk_slices(len(hidden_states), rows_at_once):
        chunk = hidden_states[rows].float()
        scores[rows] = scorer(chunk).to(torch.bfloat16)
        present.append(scorer.present(chunk))
    if config.percentile is not None:
        chunks = (scores[r] for r in chunk_slices(num_fit, rows_at_once))
        threshold = percentile_threshold(chunks, config.percentile)
        for rows in chunk_slices(len(hidden_states), rows_at_once):
            scores[rows] = (scores[rows] > threshold).to(torch.bfloat16)
    known = torch.cat([part for part in present if part is not None]) if layer.experts else None
    return LayerData(hidden_states, scores, num_fit, known)


def packed_patterns(importance: Tensor) -> PackedPatterns:
    """Bit-pack binary importance [N, I]."""
    rows_at_once = chunk_rows(importance.shape[1])
    bits = [pack_bits(importance[r] > 0) for r in chunk_slices(len(importance), rows_at_once)]
    return PackedPatterns(torch.cat(bits), importance.shape[1])
