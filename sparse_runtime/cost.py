"""Cost share: FFN bytes read per token, extras included, over the dense FFN's bytes.

The currency of this project. ``build`` turns a budget into a density with it, and the runtime counts
with it what generation really asked for, so that both mean the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

#: Bits of a weight in bfloat16, which a cost share of 1 stands for.
DENSE_BITS = 16
#: Neurons of one token, or of each of several.
Amount = TypeVar("Amount", float, Tensor)


def share_in_bits(cost_share: float) -> float:
    """Bits per FFN weight and token of a cost share: 16 × it, as of weights in bfloat16."""
    return DENSE_BITS * cost_share


def packed_size(num_neurons: int) -> int:
    """Bytes of a bitmap over ``num_neurons`` neurons: ⌈I/8⌉ (``kernels/bitmaps.py``)."""
    return (num_neurons + 7) // 8


#: Weights that share one scale.
GROUP = 64
#: Bits of the planes that float weights are looked at by.
LOOK_BITS = 4


def num_groups(size: int) -> int:
    """Groups of a row of ``size`` weights, the last one padded: ⌈size/64⌉."""
    return -(-size // GROUP)


def plane_size(size: int, bits: int) -> int:
    """Bytes of a row's plane: 8·bits for each group (``kernels/planes.py``)."""
    return 8 * bits * num_groups(size)


def scales_size(size: int) -> int:
    """Bytes of a row's scales: a bfloat16 for each group."""
    return 2 * num_groups(size)


def count_size(hidden_size: int, base: int) -> int:
    """Bytes of a neuron's count record: down's base plane of so many bits, and its scales."""
    return plane_size(hidden_size, base) + scales_size(hidden_size)


def look_size(hidden_size: int, base: int, matrices: int = 2) -> int:
    """Bytes of a neuron's look record: base planes of gate and up, or of one matrix, and scales."""
    return matrices * count_size(hidden_size, base)


def refine_size(hidden_size: int, residual: int, matrices: int = 2) -> int:
    """Bytes of a neuron's refine record: residual planes of gate and up, or of one matrix, and down."""
    return (matrices + 1) * plane_size(hidden_size, residual)


@dataclass(frozen=True)
class FFNCost:
    """Bytes that one layer's FFN reads for one token.

    Args:
        hidden_size: H.
        intermediate_size: I.
        extra_elements: elements read per token besides the neurons: router and compensation.
        element_size: bytes per weight (2 for bfloat16).
        verified: a second band of neurons is looked at.
        clustered: sets are read as bitmaps; False for methods that have none.
        matrices: before the activation: 2 (gate and up), or 1 of an FFN without a gate.
        neurons_per_token: of I, those of a token's experts; None of a single FFN, which has one of all.
    """

    hidden_size: int
    intermediate_size: int
    extra_elements: int
    element_size: int = 2
    verified: bool = False
    clustered: bool = True
    matrices: int = 2
    neurons_per_token: int | None = None

    #: Whether every neuron is looked at before it is computed.
    looks_first: ClassVar[bool] = False

    @property
    def neuron_bytes(self) -> int:
        """Bytes of one neuron: its rows of gate, up (if there is one) and transposed down."""
        return (self.matrices + 1) * self.hidden_size * self.element_size

    @property
    def count_bytes(self) -> int:
        """Bytes that computing a neuron reads."""
        return self.neuron_bytes

    @property
    def look_bytes(self) -> int:
        """Bytes of one neuron's look record."""
        return look_size(self.hidden_size, LOOK_BITS, self.matrices)

    @property
    def refine_bytes(self) -> int:
        """Bytes that are read of a neuron that matters more; float weights have none left."""
        return 0

    @property
    def neurons(self) -> int:
        """Neurons that a dense token reads: I, or those of its experts."""
        own = self.neurons_per_token
        return self.intermediate_size if own is None else own

    @property
    def dense_bytes(self) -> int:
        """Bytes of gate, up and down: 3·I·H·b; without a gate 2·I·H·b. Of a token's experts alone."""
        return self.neurons * self.neuron_bytes

    @property
    def whole_bytes(self) -> int:
        """Bytes that a token reads that runs dense."""
        return self.dense_bytes

    @property
    def overhead_bytes(self) -> int:
        """Bytes read whatever the cluster: router, compensation and the bands' bitmaps."""
        bitmaps = (2 if self.verified else 1) if self.clustered else 0
        return self.extra_elements * self.element_size + bitmaps * packed_size(self.neurons)

    def sparse_bytes(
        self,
        computed: Amount,
        looked: Amount | Literal[0] = 0,
        refined: Amount | Literal[0] = 0,
    ) -> Amount:
        """Bytes for a token that computes, looks at and refines so many neurons."""
        return (
            computed * self.count_bytes
            + looked * self.look_bytes
            + refined * self.refine_bytes
            + self.overhead_bytes
        )

    def share(
        self,
        computed: Amount,
        looked: Amount | Literal[0] = 0,
        refined: Amount | Literal[0] = 0,
    ) -> Amount:
        """Cost share of a token that computes, looks at and refines so many neurons."""
        return self.sparse_bytes(computed, looked, refined) / self.dense_bytes

    def density_for(self, budget: float) -> float:
        """Largest density whose cost share is ``budget``, if what is read is read whole.

        ≤ 0 if the overhead alone exceeds the budget.
        """
        return min(1.0, (budget * self.dense_bytes - self.overhead_bytes) / self.whole_bytes)


@dataclass(frozen=True)
class PlaneCost(FFNCost):
    """Bytes that one layer's FFN in planes reads for one token; ``dense_bytes`` are those of floats.

    Args:
        base: bits of the base planes.
        residual: bits of the residual planes.
    """

    base: int = 4
    residual: int = 0
    looks_first = True

    @property
    def count_bytes(self) -> int:
        """Bytes of down's base plane and scales."""
        return count_size(self.hidden_size, self.base)

    @property
    def look_bytes(self) -> int:
        """Bytes of base planes and scales of gate and up, or of one matrix without a gate."""
        return look_size(self.hidden_size, self.base, self.matrices)

    @property
    def refine_bytes(self) -> int:
        """Bytes of the residual planes of all three matrices, or of two without a gate."""
        return refine_size(self.hidden_size, self.residual, self.matrices)

    @property
    def whole_bytes(self) -> int:
        """Bytes that a token reads that runs dense: all planes."""
        return self.neurons * (self.look_bytes + self.count_bytes + self.refine_bytes)


def router_parameter_count(hidden_size: int, num_clusters: int, rank: int | None) -> int:
    """Elements of a router [H → K], through ``rank`` if given, with its bias."""
    if rank is None:
        return hidden_size * num_clusters + num_clusters
    return rank * (hidden_size + num_clusters) + num_clusters


@dataclass(frozen=True)
class CostReport:
    """What a sparse model's FFNs have read since the last reset.

    Token counts are per layer call: one token through 30 layers counts 30 times. Bytes are what the
    tokens asked for one by one, as in decode with one sequence; a batch that shares rows reads less.

    Attributes:
        sparse_tokens: tokens that ran sparsely.
        dense_reasons: why tokens ran dense (``sparse_runtime.ffn.rule.DENSE_REASONS``) -> how many.
        sparse_bytes: read by the sparse tokens.
        dense_bytes_of_sparse_tokens: what they would have read in dense FFNs.
        dense_bytes_of_dense_tokens: what the others would have read in dense float FFNs.
        bytes_of_dense_tokens: read by them; less where weights are in planes.
        bits_per_weight: 16 × ``cost_share`` as it is of weights in bfloat16, whatever they are in: bits
            read per FFN weight and token.
        audited_prompts: prompts, or turns of a conversation, that the guard has audited.
        guarded_prompts: of these, those that it has decode dense.
    """

    sparse_tokens: int
    dense_reasons: Mapping[str, int]
    sparse_bytes: float
    dense_bytes_of_sparse_tokens: float
    dense_bytes_of_dense_tokens: float
    bytes_of_dense_tokens: float
    bits_per_weight: float = DENSE_BITS
    audited_prompts: int = 0
    guarded_prompts: int = 0

    @property
    def dense_tokens(self) -> int:
        """Tokens that ran dense, for whatever reason."""
        return sum(self.dense_reasons.values())

    @property
    def cost_share(self) -> float:
        """Bytes read ÷ dense bytes over the tokens that went through the sparse path.

        Over the others where none did: 1, or what weights in planes take.
        """
        if self.dense_bytes_of_sparse_tokens == 0:
            return self.overall_cost_share
        return self.sparse_bytes / self.dense_bytes_of_sparse_tokens

    @property
    def overall_cost_share(self) -> float:
        """The same over all tokens, dense calls (prefill) included; 1 before any."""
        dense = self.dense_bytes_of_sparse_tokens + self.dense_bytes_of_dense_tokens
        if dense == 0:
            return 1.0
        return (self.sparse_bytes + self.bytes_of_dense_tokens) / dense

    @property
    def sparse_share_of_tokens(self) -> float:
        """Share of tokens that went through the sparse path."""
        total = self.sparse_tokens + self.dense_tokens
        return self.sparse_tokens / total if total else 0.0

    def __str__(self) -> str:
        dense = ", ".join(f"{tokens} {reason}" for reason, tokens in self.dense_reasons.items())
        return (
            f"cost share {self.cost_share:.3f} over {self.sparse_tokens} sparse tokens; "
            f"{self.dense_tokens} dense tokens" + (f" ({dense})" if dense else "") + self._guarded()
        )

    def _guarded(self) -> str:
        if not self.audited_prompts:
            return ""
        return f"; {self.guarded_prompts} of {self.audited_prompts} audited prompts decode dense"


def element_size(dtype: torch.dtype) -> int:
    """Bytes per element of a dtype."""
    return torch.empty((), dtype=dtype).element_size()
