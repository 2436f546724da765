"""What the stages of a build share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_runtime.clusters.buffers import Buffers
from sparse_runtime.clusters.capture import HiddenStates
from sparse_runtime.clusters.config import BuildSettings
from sparse_runtime.clusters.fisher import LayerFisher
from sparse_runtime.clusters.layer_data import LayerData, load_layer
from sparse_runtime.clusters.ranks import Ranks
from sparse_runtime.clusters.stages import Stages
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.onloading import onloaded


@dataclass(frozen=True)
class BuildContext:
    """A build after its capture.

    Attributes:
        model: dense, or packed in the planes that the build is for.
        windows: token ids [W, window] int64, held-out ones last.
        states: of these windows.
        layers: the model's FFNs.
        fisher: of each layer, if the build has it; of the first tokens.
        config: what the build runs.
        num_fit: tokens to fit on.
        domains: number of each window's text source [W].
        domain_names: of these sources.
        work: folder of intermediate results.
        progress: times the stages, and draws bars.
        base_errors: ρ² of each layer's base planes; None for float weights.
        ranks: processes that build together.
    """

    model: Any
    windows: Tensor
    states: HiddenStates
    layers: list[FFNLayer]
    fisher: list[LayerFisher] | None
    config: BuildSettings
    num_fit: int
    work: Path
    progress: Stages
    domains: Tensor
    domain_names: tuple[str, ...]
    base_errors: list[float] | None = None
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def fit_windows(self) -> Tensor:
        """Windows to fit on."""
        return self.windows[: self.num_fit // self.windows.shape[1]]

    @property
    def held_out_windows(self) -> Tensor:
        """Windows to judge by."""
        return self.windows[self.num_fit // self.windows.shape[1] :]

    @property
    def held_out_domains(self) -> Tensor:
        """Number of the source of each window to judge by."""
        return self.domains[self.num_fit // self.windows.shape[1] :]

    def fisher_of(self, position: int) -> Tensor | None:
        """Fisher weights of a layer [I], if the build has them."""
        return None if self.fisher is None else self.fisher[position].neurons

    def base_error(self, position: int) -> float | None:
        """ρ² of a layer's base planes; None for float weights."""
        return None if self.base_errors is None else self.base_errors[position]

    def buffers(self, purpose: str = "sweep") -> Buffers:
        """New buffers, of one sweep's hidden states or for another purpose."""
        return Buffers(self.config.memory_mib, self.work / f"{purpose}_{self.ranks.rank}")

    @contextmanager
    def weights_of(self, position: int) -> Iterator[FFNLayer]:
        """A layer, its FFN's weights in memory inside the context."""
        layer = self.layers[position]
        with onloaded(layer.holder):
            yield layer

    @contextmanager
    def layer(self, position: int) -> Iterator[LayerData]:
        """A layer's tokens, freed when the context ends; its weights are in memory meanwhile."""
        with self.weights_of(position), self._tokens(position) as data:
            yield data

    @contextmanager
    def _tokens(self, position: int) -> Iterator[LayerData]:
        with self.buffers("layer") as buffers:
            data = load_layer(
                self.states,
                position,
                self.layers[position],
                self.config,
                num_fit=self.num_fit,
                buffers=buffers,
                fisher=self.fisher_of(position),
            )
            try:
                yield data
            finally:
                data.free()  # callers keep the name while the next layer loads
