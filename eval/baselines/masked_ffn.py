"""What the opponents share: an FFN computed in full, under the masks a method would skip by.

Nothing is saved this way. It measures the quality that a method keeps and counts the bytes it would
read, as a share of the dense FFN's 3·I·H·b with bfloat16 weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_runtime.cost import FFNCost
from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.quality.forwards import Forward, after_prompt, in_sequences
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_single_ffns
from sparse_runtime.models.inline_calls import calling, ffn_module
from sparse_runtime.models.output_head import swapped_forwards


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


@runtime_checkable
class PromptMasks(Protocol):
    """The masks of one layer of a method that looks at each sequence's prompt."""

    def after(self, layer: FFNLayer, prompt: Tensor) -> Masks:
        """Masks for the tokens after a prompt of hidden states [T, H]."""
        ...


#: Name of a row -> the masks of one layer.
Variants = dict[str, Masks | PromptMasks]


class Baseline(Protocol):
    """A method to compare with."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def needs_prompt(self) -> bool:
        """Whether the masks are ``PromptMasks``."""
        ...

    def least_share(self, layer: FFNLayer) -> float:
        """Cost share of a token that skips all it may."""
        ...

    def fit(self, layer: FFNLayer, states: Tensor, budgets: list[float]) -> list[Variants]:
        """Fit one layer for cost shares above ``least_share`` and at most 1.

        Args:
            layer: of the dense model.
            states: the layer's inputs on calibration text [N, H] bfloat16.
            budgets: expected cost shares.

        Returns:
            For each budget, masks by the name of the row that they make; a method may have several
            out of one fit.
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
    model: nn.Module, masks: Mapping[int, Masks | PromptMasks], *, prompt_tokens: int = 0
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
        ConfigError: the masks are not those of the model's layers, or want a prompt and get none.
    """
    layers = find_single_ffns(model, "a baseline that masks neurons")
    expected = [layer.index for layer in layers]
    if sorted(masks) != expected:
        raise ConfigError(f"masks are for layers {sorted(masks)}; expected {expected}")
    if prompt_tokens == 0 and any(isinstance(m, PromptMasks) for m in masks.values()):
        raise ConfigError("prompt_tokens is 0; expected 1 or more for masks that follow a prompt")
    meter = CostMeter()

    def masked(layer: FFNLayer, dense: Forward) -> Forward:
        of_layer = masks[layer.index]
        if isinstance(of_layer, PromptMasks):
            return _following(layer, of_layer, meter, prompt_tokens, dense)

        def forward(hidden_states: Tensor) -> Tensor:
            x = hidden_states.reshape(-1, layer.hidden_size)
            return meter.add(of_layer(layer, x)).reshape(hidden_states.shape)

        return after_prompt(prompt_tokens, dense, forward)

    ffns = [ffn_module(layer) for layer in layers]
    with ExitStack() as stack:
        forwards = {
            ffn: in_sequences(masked(layer, ffn.forward), layer.mlp, layer.form, stack)
            for layer, ffn in zip(layers, ffns, strict=True)
        }
        stack.enter_context(calling(layers, ffns))
        stack.enter_context(swapped_forwards(forwards))
        yield meter


def _following(
    layer: FFNLayer, masks: PromptMasks, meter: CostMeter, prompt_tokens: int, dense: Forward
) -> Forward:
    def forward(hidden_states: Tensor) -> Tensor:
        prompts, rest = hidden_states[:, :prompt_tokens], hidden_states[:, prompt_tokens:]
        outputs = [
            meter.add(masks.after(layer, prompt)(layer, tokens))
            for prompt, tokens in zip(prompts, rest, strict=True)
        ]
        return torch.cat([dense(prompts.contiguous()), torch.stack(outputs)], dim=1)

    return forward


def activations(layer: FFNLayer, gate_input: Tensor, up_input: Tensor | None = None) -> Tensor:
    """h of an FFN [n, I], for inputs [n, H] of gate and, if it has another one, of up."""
    gate, up = layer.gate, layer.up
    h = ACTIVATION_FUNCTIONS[layer.activation](F.linear(gate_input, gate.weight, gate.bias))
    if up is None:
        return h
    return h * F.linear(gate_input if up_input is None else up_input, up.weight, up.bias)


def run_neurons(
    layer: FFNLayer,
    x: Tensor,
    kept: Tensor,
    *,
    h: Tensor | None = None,
    extra_elements: int = 0,
    clustered: bool = False,
) -> MaskedOutput:
    """Run an FFN of which each token computes some neurons.

    Args:
        layer: the FFN.
        x: hidden states [n, H].
        kept: bool [n, I], or [I] for all tokens alike.
        h: activations [n, I] of x, if they are known.
        extra_elements: weights read besides the neurons'.
        clustered: the set is read as a bitmap.
    """
    kept = kept.expand(len(x), -1)
    computed = kept.float().mean(-1)
    share = cost_shares(
        layer, computed, computed, computed, extra_elements=extra_elements, clustered=clustered
    )
    h = activations(layer, x) if h is None else h
    return MaskedOutput(layer.down(h * kept), share, computed)


def cost_shares(
    layer: FFNLayer,
    gate: Tensor | float,
    up: Tensor | float,
    down: Tensor,
    *,
    extra_elements: int = 0,
    clustered: bool = False,
) -> Tensor:
    """Cost shares [n] of tokens that read these shares of the three matrices, in bfloat16.

    Args:
        layer: the FFN.
        gate: share of the gate projection that is read [n], or one for all tokens.
        up: of the up projection, if there is one.
        down: of the down projection [n].
        extra_elements: weights read besides these.
        clustered: a set is read as a bitmap.
    """
    matrices = layer.form.matrices
    sizes = layer.hidden_size, layer.intermediate_size, extra_elements
    cost = FFNCost(*sizes, clustered=clustered, matrices=matrices)
    read = down + gate if matrices == 1 else down + up + gate
    return cost.share(read / (matrices + 1) * layer.intermediate_size)


def most(values: Tensor, share: float) -> Tensor:
    """Mask of each row's largest values, as large a share of them as given, at least one.

    Args:
        values: [..., I].
        share: in [0, 1].
    """
    count = max(1, round(share * values.shape[-1]))
    chosen = values.topk(count, dim=-1, sorted=False).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, chosen, True)


def threshold_for(values: Tensor, kept: float) -> float:
    """The threshold that a share of values exceeds; −∞ to keep all.

    Args:
        values: any shape, not empty.
        kept: share of the values above the threshold, in [0, 1].
    """
    skipped = round((1 - kept) * values.numel())
    if skipped <= 0:
        return float("-inf")
    flat = values.flatten().float()
    if flat.device.type == "cpu":
        # An eighth of the time that kthvalue takes.
        return float(np.partition(flat.numpy(), skipped - 1)[skipped - 1])
    return flat.kthvalue(skipped).values.item()
