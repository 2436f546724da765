"""How much each neuron matters for each token of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
        gate: gate projection [I, H] float32.
        up: up projection [I, H] float32, or None of an FFN without a gate.
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
        x = hidden_states.float()
        if self.experts is None:
            return activations(x, self.gate, self.up, self.activation, *self.biases)
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
    return ImportanceScorer(
        gate=gate.float(),
        up=None if up is None else up.float(),
        neuron_weights=neuron_weights.to(layer.device),
        activation=layer.activation,
        biases=layer.biases,
        experts=layer.expert_weights if layer.experts else None,
    )


def chunk_slices(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Cut [0, num_rows) into slices of at most ``chunk_rows``."""
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, num_rows))


def normalized(importance: Tensor) -> Tensor:
    """Scale each token's importance [n, I] to sum to one (rows of zeros stay), float32."""
    importance = importance.float()
    return importance / importance.sum(-1, keepdim=True).clamp_min(1e-20)
