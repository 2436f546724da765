"""An FFN found in a model: where it is, its matrices, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_runtime.cost import FFNCost, PlaneCost
from sparse_runtime.kernels.planes import PlaneFormat
from sparse_runtime.models.experts import ExpertRows, chosen_experts, expert_weights
from sparse_runtime.models.ffn_forms import LLAMA, FFNForm, LinearRows
from sparse_runtime.models.int8_linears import is_int8
from sparse_runtime.models.transposed import TransposedLinear, with_rows


@dataclass(frozen=True)
class FFNLayer:
    """An FFN found in a model.

    ``index`` is its decoder layer's; an FFN that runs for every token beside a decoder layer's experts
    has one beyond those of all decoder layers, and ``depth`` is always the decoder layer's.

    ``gate`` and ``up`` have weights [I, H], ``down`` [H, I]; without a gate, ``gate`` is what the
    activation is of, and ``up`` None. ``parent`` holds ``mlp`` under the attribute ``attribute``, and
    ``form`` says which linear layers of ``mlp`` they are. Of a mixture of experts ``mlp`` holds all
    experts' matrices, ``parent`` is the block that has their router, and the neurons are those of all
    experts, one expert's after the other's. Of an FFN whose weights are packed in planes
    (``sparse_runtime.ffn.plane_modules``), ``mlp`` has none of them. Where the FFN is written out in a
    larger module (``form.inline``), ``mlp`` is that module; ``sparse_runtime.models.inline_calls`` has
    what to call.
    """

    index: int
    name: str
    parent: nn.Module
    attribute: str
    mlp: nn.Module
    gate: nn.Linear | LinearRows | ExpertRows | TransposedLinear
    up: nn.Linear | LinearRows | ExpertRows | None
    down: nn.Linear | ExpertRows | TransposedLinear
    activation: str
    form: FFNForm = LLAMA
    depth: int = 0
    #: The decoder layer; ``parent`` where that is not known.
    decoder_layer: nn.Module | None = None
    #: Number of experts, and how many of them a token has; 0 of a single FFN.
    experts: int = 0
    active: int = 0

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of its linear layers in ``mlp``, that of down last."""
        return self.form.projections

    @property
    def packed(self) -> bool:
        """Whether its weights are in planes."""
        return is_packed(self.mlp)

    @property
    def int8(self) -> bool:
        """Whether some of its projections are int8 rows with scales."""
        return any(map(is_int8, self.own_linears().values()))

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.mlp.hidden_size if self.packed else self.gate.in_features  # type: ignore[return-value]

    @property
    def intermediate_size(self) -> int:
        """I, the number of neurons."""
        return self.mlp.intermediate_size if self.packed else self.gate.out_features  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.mlp.look.device if self.packed else self.weights[0].device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, or of those that planes or int8 rows stand for."""
        if self.packed:
            return self.mlp.dtype  # type: ignore[return-value]
        if self.int8:  # of the decoder layer's norms
            return next(p.dtype for p in self.parent.parameters() if p.is_floating_point())
        return self.weights[0].dtype

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The parameters that hold its matrices; none if it is packed."""
        if self.experts and not self.packed:
            return tuple(self.mlp._parameters[name] for name in self.projections)  # type: ignore[misc]
        return tuple(linear.weight for linear in self.linears().values())

    @property
    def neurons_per_token(self) -> int:
        """Neurons that a token reads at most: those of its experts."""
        if not self.experts:
            return self.intermediate_size
        return self.intermediate_size // self.experts * self.active

    def expert_weights(self, x: Tensor) -> Tensor:
        """What each expert counts for hidden states [n, H]: [n, E] float32, 0 if it is not chosen."""
        index, weights = chosen_experts(self.parent, self.attribute, x.to(self.dtype))
        return expert_weights(index, weights, self.experts)

    @property
    def format(self) -> PlaneFormat | None:
        """Of its planes; None for float weights."""
        return self.mlp.format if self.packed else None  # type: ignore[return-value]

    @property
    def bits(self) -> int | None:
        """Of its planes; None for float weights."""
        return None if self.format is None else self.format.bits

    def linears(self) -> dict[str, Any]:
        """Its linear layers by their names, with weights [out, in]; none of experts, or if packed."""
        return {name: with_rows(module) for name, module in self.own_linears().items()}

    def own_linears(self) -> dict[str, nn.Module]:
        """The modules of :meth:`linears`, whatever they are."""
        modules: Any = self.mlp._modules
        if self.packed or self.experts:
            return {}
        return {name: modules[name] for name in self.projections}

    @property
    def parts(self) -> list[nn.Module]:
        """The modules that are the FFN's alone, each with all that it holds."""
        return [self.mlp] if self.form.inline is None else [*self.own_linears().values()]

    @property
    def holder(self) -> nn.Module:
        """The module that holds all its weights, and the router of experts."""
        return self.parent if self.experts else self.mlp

    def down_rows(self) -> Tensor:
        """The last of :meth:`rows` alone: values of gate and up would take twice its memory again."""
        if self.packed:
            return self.mlp.planes.rounded()[-1].values()  # type: ignore[union-attr,operator]
        return self.down.weight.detach().t()

    @property
    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """What is added to gate·x and up·x [I], or None."""
        if self.packed:
            return self.mlp.gate_bias, self.mlp.up_bias  # type: ignore[return-value]
        linears = self.linears().values()
        return self.form.split_bias(*(_detached(linear.bias) for linear in linears))

    @property
    def down_bias(self) -> Tensor | None:
        """What is added to the output [H], or None."""
        return self.mlp.down_bias if self.packed else _detached(self.down.bias)  # type: ignore[return-value]

    def rows(self, *, base: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gate, up and transposed down, each [I, H]: weights, or the values of planes in float32.

        Up is None without a gate.

        Args:
            base: of planes, the values of the base planes.
        """
        if self.packed:
            rounded = self.mlp.planes.rounded()  # type: ignore[union-attr,operator]
            gate, up, down_t = (
                None if part is None else part.values(base=base) for part in rounded
            )
            assert gate is not None
            assert down_t is not None
            return gate, up, down_t
        up = None if self.up is None else self.up.weight.detach()
        return self.gate.weight.detach(), up, self.down.weight.detach().t()


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def layer_cost(
    layer: FFNLayer, extra_elements: int, *, verified: bool, form: PlaneFormat | None = None
) -> FFNCost:
    """Bytes that an FFN reads for a token; floats count as bfloat16.

    Args:
        layer: float or packed.
        extra_elements: read per token besides the neurons.
        verified: whether float neurons are looked at; planes always are.
        form: of the planes that it is to be in; as it is stored if None.
    """
    form = form or layer.format
    sizes = (layer.hidden_size, layer.intermediate_size, extra_elements)
    own = layer.neurons_per_token if layer.experts else None
    if form is None:
        return FFNCost(
            *sizes, verified=verified, matrices=layer.form.matrices, neurons_per_token=own
        )
    return PlaneCost(
        *sizes,
        matrices=layer.form.matrices,
        neurons_per_token=own,
        base=form.base,
        residual=form.residual,
    )


def is_packed(module: nn.Module) -> bool:
    """Whether a module is an FFN in planes: it says so."""
    return getattr(module, "holds_planes", False) is True
