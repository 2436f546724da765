"""What the operation works on: tensors that belong together.

They are flattened into single tensors in one place, ``kernels/op.py``, because torch.library knows only
those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FFNWeights:
    """An FFN's weights, a neuron being one row in each.

    Attributes:
        gate: gate projection [I, H], bfloat16, float16 or float32, as the next two; or the one matrix
            of an FFN without a gate, down(act(gate·x)).
        up: up projection [I, H], or None without a gate.
        down_t: transposed down projection [I, H].
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu`` or ``relu2`` (relu squared).
        look: records [I, R] uint8 of :func:`sparse_runtime.kernels.looks.look_records`, or None.
        gate_bias: added to gate·x [I] float32, or None.
        up_bias: added to up·x [I] float32, or None.
    """

    gate: Tensor
    up: Tensor | None
    down_t: Tensor
    activation: str = "silu"
    look: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ExpertChoice:
    """The experts of each token, in a mixture of experts.

    Its :class:`FFNWeights` hold the neurons of all experts, one expert's after the other's: ``gate``
    has each expert's rows of gate and then of up [E·2·I, H], ``up`` is None, and all else is of E·I
    neurons.

    Attributes:
        index: [n, k] int64.
        weights: what they count [n, k] float32.
        experts: E. I is a multiple of eight.
    """

    index: Tensor
    weights: Tensor
    experts: int

    @classmethod
    def of(cls, experts: int, index: Tensor, weights: Tensor) -> ExpertChoice:
        """Of index and weights in whatever dtype and layout."""
        return cls(index.to(torch.int64).contiguous(), weights.float().contiguous(), experts)

    def parts(self, neurons: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Of each chosen expert: its rows, the tokens [m] that have it, what it counts for them [m].

        Args:
            neurons: of all experts.
        """
        size = neurons // self.experts
        for expert in self.index.unique().tolist():
            tokens, place = (self.index == expert).nonzero(as_tuple=True)
            rows = slice(expert * size, (expert + 1) * size)
            yield rows, tokens, self.weights[tokens, place]


@dataclass(frozen=True, eq=False)
class ClusterTables:
    """Which neurons each cluster computes.

    Attributes:
        active_sets: bitmaps [K, ⌈I/8⌉] uint8 (see :mod:`sparse_runtime.kernels.bitmaps`).
        maybe_sets: bitmaps [K, ⌈I/8⌉] uint8 of the neurons that a look decides on, or
            None. Neurons that are in ``active_sets`` too are computed.
        factors: such a neuron is computed where |h̃|·factor > 1 [I] float32; None without
            ``maybe_sets``.
        cluster_weights: what a cluster's tokens count; their factors are so many times as large
            [K] float32. None: all count alike.
    """

    active_sets: Tensor
    maybe_sets: Tensor | None = None
    factors: Tensor | None = None
    cluster_weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Stages:
    """How far the neurons of a token are read, by e = |h̃|·factor.

    Attributes:
        factors: [I] float32; times the weight of the token's cluster, if clusters have weights.
        tau: a neuron is counted from its base planes where 1 < e ≤ tau, and refined by its residual
            planes beyond; ∞: never refined, 1: always.
        width: of the ramp over which a neuron's share grows from 0 to 1; 0: a step.
    """

    factors: Tensor
    tau: float = 1.0
    width: float = 0.0


@dataclass(frozen=True, eq=False)
class RouterWeights:
    """A map from hidden states to cluster ids: argmax of up·(down·x) + bias, or of up·x + bias.

    Attributes:
        up: [K, r], or [K, H] without ``down``.
        bias: [K].
        down: [r, H] or None.
    """

    up: Tensor
    bias: Tensor
    down: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Compensation:
    """Added to the output for what the neurons leave out.

    Attributes:
        cluster_bias: a vector for each cluster [K, H], or None.
        correction_down: with ``correction_up``, both [c, H], adds correction_upᵀ·(correction_down·x);
            None without it.
        correction_up: see ``correction_down``.
    """

    cluster_bias: Tensor | None = None
    correction_down: Tensor | None = None
    correction_up: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Counters:
    """What calls have read so far; every call adds to them.

    Attributes:
        clusters: tokens of each cluster [K] int64.
        rows: neurons computed and neurons looked at, over all tokens [2] int64.
        programs: zeros that the Triton kernels count finished programs in, int32; None for other
            backends.
    """

    clusters: Tensor
    rows: Tensor
    programs: Tensor | None = None
