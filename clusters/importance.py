"""How much each neuron matters for each token of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_runtime.kernels.reference import activations
from sparse_runtime.models.experts import expert_activations
from sparse_runtime.models.ffn_layer import FFNLayer

#: ``norm``: |h_i|·‖down_i‖₂, the length of what a neuron adds to the FFN's output. ``fisher``:
#: |h_i|·w_i with the loss's sensitivity w_i (``clusters/fisher.py``). ``binary``: whether the norm
#: importance is above a percentile of its layer.
IMPORTANCE_KINDS = ("norm", "fisher", "binary")


@dataclass(frozen=True)
class ImportanceScorer:
    """Scores the neurons of one FFN for given hidden states.

    Attributes:
        gate: gate projection [I, H] in the dtype that is computed in: float32, or bfloat16 as the
            model.
        up: up projection [I, H], or None of an FFN without a gate.
        neuron_weights: weight of each neuron's |h| [I] float32.
        activation: kernel name of the activation.
        biases: of gate and up [I], or None.
        experts: of a mixture of experts, whose neurons are one expert's after the other's: what each
            counts for hidden states [n, H], float32 [n, E], 0 if it is not chosen.
    """

    gate: Tensor
    up: Tensor | None
    neuron_weights: Tensor
    activation: str
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    experts: Callable[[Tensor], Tensor] | None = None

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Score hidden states [n, H]: e(t, i) = |h(t, i)|·w(i), float32 [n, I], ≥ 0."""
        return self.activations(hidden_states).abs_().mul_(self.neuron_weights)

    def activations(self, hidden_states: Tensor) -> Tensor:
        """h of hidden states [n, H], float32 [n, I]; of experts times what they count, 0 of others."""
        x = hidden_states.to(self.gate.dtype)
        if self.experts is None:
            return activations(x, self.gate, self.up, self.activation, *self.biases).float()
        counts = self.experts(hidden_states)
        neurons = len(self.gate) // counts.shape[1]

        def one(x: Tensor, expert: int) -> Tensor:
            rows = slice(expert * neurons, (expert + 1) * neurons)
            assert self.up is not None
            return activations(x, self.gate[rows], self.up[rows], self.activation)

        return expert_activations(x, counts, one, neurons)

    def present(self, hidden_states: Tensor) -> Tensor | None:
        """Which experts hidden states [n, H] have, bool [n, E]; None of a single FFN."""
        return None if self.experts is None else self.experts(hidden_states) != 0


def importance_scorer(layer: FFNLayer, neuron_weights: Tensor | None = None) -> ImportanceScorer:
    """Make the scorer of a layer from its weights, or the full values of its planes.

    Args:
        layer: an FFN found by ``find_ffn_layers``.
        neuron_weights: [I], as of ``fisher_weights``; ‖down_i‖₂ (``norm``) if None.
    """
    gate, up, down_t = layer.rows()
    if neuron_weights is None:
        neuron_weights = down_t.float().norm(dim=1)
    dtype = product_dtype(layer.device, layer.dtype)
    return ImportanceScorer(
        gate=gate.to(dtype),
        up=None if up is None else up.to(dtype),
        neuron_weights=neuron_weights.to(layer.device),
        activation=layer.activation,
        biases=layer.biases,
        experts=layer.expert_weights if layer.experts else None,
    )


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What products of matrices of a dtype are computed in: bfloat16 if it is that, and the device has
    units for it, else float32."""
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native and dtype == torch.bfloat16 else torch.float32


def chunk_slices(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Cut [0, num_rows) into slices of at most ``chunk_rows``."""
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, num_rows))


def chunk_rows(width: int, device: torch.device | None = None) -> int:
    """Rows of so many values to work on at a time: they stay in a CPU's cache, or fill a GPU."""
    values = 1 << 20 if device is None or device.type == "cpu" else 1 << 25
    return max(64, values // width)


def normalized(importance: Tensor) -> Tensor:
    """Scale each token's importance [n, I] to sum to one (rows of zeros stay), float32."""
    importance = importance.float()
    return importance / importance.sum(-1, keepdim=True).clamp_min(1e-20)
