"""What the opponents share: an FFN computed in full, under the masks a method would skip by.

Nothing is saved this way. It measures the quality that a method keeps and counts the bytes it would
read, as a share of the dense FFN's 3·I·H·b with bfloat16 weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from sparse_runtime.architectures import FFNLayer, find_ffn_layers
from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.forwards import Forward, after_prompt, swapped_forwards


class MaskedOutput(NamedTuple):
    """What a masked FFN makes of n tokens.

    Attributes:
        output: [n, H].
        cost_shares: bytes that each token reads over the dense FFN's [n] float32.
        computed: share of the neurons computed for each token [n] float32; None where a method does
            not skip whole neurons.
    """

    output: Tensor
    cost_shares: Tensor
    computed: Tensor | None


class Masks(Protocol):
    """The fitted masks of one layer."""

    def __call__(self, layer: FFNLayer, x: Tensor) -> MaskedOutput:
        """Run the layer's FFN on hidden states [n, H]."""
        ...


class Baseline(Protocol):
    """A method to compare with."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    def least_share(self, layer: FFNLayer) -> float:
        """Cost share of a token that skips all it may."""
        ...

    def fit(self, layer: FFNLayer, states: Tensor, budgets: list[float]) -> list[Masks]:
        """Fit one layer for cost shares above ``least_share`` and at most 1.

        Args:
            layer: of the dense model.
            states: the layer's inputs on calibration text [N, H] bfloat16.
            budgets: expected cost shares.

        Returns:
            Masks for each budget.
        """
        ...


@dataclass
class CostMeter:
    """Adds up what masked FFNs read, over all tokens and layers.

    Attributes:
        calls: tokens times layers.
    """

    calls: int = 0
    _cost_shares: float = 0.0
    _computed: float | None = 0.0

    def add(self, masked: MaskedOutput) -> Tensor:
        """Count the tokens of one call and return their output [n, H]."""
        self.calls += len(masked.cost_shares)
        self._cost_shares += masked.cost_shares.double().sum().item()
        if masked.computed is None or self._computed is None:
            self._computed = None
        else:
            self._computed += masked.computed.double().sum().item()
        return masked.output

    @property
    def cost_share(self) -> float:
        """Mean cost share; 1 where nothing ran."""
        return self._cost_shares / self.calls if self.calls else 1.0

    @property
    def computed(self) -> float | None:
        """Mean share of the neurons computed; None for a method that does not skip neurons."""
        return None if self._computed is None or not self.calls else self._computed / self.calls


@contextmanager
def masked_ffns(
    model: nn.Module, masks: Mapping[int, Masks], *, prompt_tokens: int = 0
) -> Iterator[CostMeter]:
    """Run a dense model's FFNs under masks inside the context; afterwards it is what it was.

    Args:
        model: a dense causal language model.
        masks: layer index -> masks, for every layer.
        prompt_tokens: tokens of each sequence that run without masks and are not counted (see
            :func:`after_prompt`).

    Yields:
        The meter of the run.

    Raises:
        ConfigError: the masks are not those of the model's layers.
    """
    layers = find_ffn_layers(model)
    expected = [layer.index for layer in layers]
    if sorted(masks) != expected:
        raise ConfigError(f"masks are for layers {sorted(masks)}; expected {expected}")
    meter = CostMeter()

    def masked(layer: FFNLayer) -> Forward:
        def forward(hidden_states: Tensor) -> Tensor:
            x = hidden_states.reshape(-1, layer.hidden_size)
            output = meter.add(masks[layer.index](layer, x))
            return output.reshape(hidden_states.shape)

        return forward

    with swapped_forwards(
        {
            layer.mlp: after_prompt(prompt_tokens, layer.mlp.forward, masked(layer))
            for layer in layers
        }
    ):
        yield meter


def threshold_for(values: Tensor, kept: float) -> float:
    """The threshold that a share of values exceeds; −∞ to keep all.

    Args:
        values: any shape, not empty.
        kept: share of the values above the threshold, in [0, 1].
    """
    skipped = round((1 - kept) * values.numel())
    return float("-inf") if skipped <= 0 else values.flatten().kthvalue(skipped).values.item()
