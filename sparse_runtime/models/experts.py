"""Mixtures of experts: modules that hold the matrices of many FFNs, and run those that a router chose.

Taken are the experts of transformers' own interface (``transformers.integrations.moe``): gate and up of
all experts in one parameter [E, 2·I, H] and down in another [E, H, I], called with hidden states [n, H]
and index and weights [n, k] of each token's experts. That their forward computes

    y = Σ_j w_j · down_e(act(gate_e·x) ⊙ (up_e·x)),  e = index_j,

is proven on small matrices, as it is of other FFNs (``models/ffn_forms.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_runtime.errors import UnsupportedArchitectureError
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS, activations
from sparse_runtime.models.ffn_forms import FFNForm, Proof, closest, forms_of

#: The parameters of experts.
EXPERTS = FFNForm(("gate_up_proj", "down_proj"), "experts")

# Sizes of the small matrices, and experts of a token.
_E, _H, _I, _CHOSEN = 3, 6, 10, 2
# Names of stacked experts' matrices [E, …] in transformers.
_STACKED = (*EXPERTS.projections, "gate_proj", "up_proj", "w1", "w2", "input_linear")


def holds_experts(module: nn.Module) -> bool:
    """Whether a module holds the matrices of many experts in one parameter, or is a list of experts."""
    return any(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in _STACKED)


class ExpertRows:
    """Rows of all experts, one expert's after the other's, read as a linear layer's.

    Attributes:
        module: of the experts.
        part: ``gate``, ``up`` or ``down``.
    """

    bias = None

    def __init__(self, module: nn.Module, part: str) -> None:
        self.module, self.part = module, part

    @property
    def in_features(self) -> int:
        """H, or E·I of down."""
        experts, hidden, neurons = self._down.shape
        return experts * neurons if self.part == "down" else hidden

    @property
    def out_features(self) -> int:
        """E·I, or H of down."""
        experts, hidden, neurons = self._down.shape
        return hidden if self.part == "down" else experts * neurons

    @property
    def weight(self) -> Tensor:
        """[E·I, H], a copy; of down [H, E·I], which is a view where neurons are rows in memory."""
        if self.part == "down":
            return self._down.mT.flatten(0, 1).t()
        gate_up: Any = self.module._parameters[EXPERTS.projections[0]]
        return gate_up.chunk(2, dim=1)[self.part == "up"].flatten(0, 1)

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self._down.device

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Some values of ``weight`` [n], by their places [n] int64; nothing is copied for it."""
        size = self._down.shape[2]
        neurons, others = (columns, rows) if self.part == "down" else (rows, columns)
        expert, neuron = neurons // size, neurons % size
        if self.part == "down":
            return self._down.detach()[expert, others, neuron]
        gate_up: Any = self.module._parameters[EXPERTS.projections[0]]
        return gate_up.detach()[expert, neuron + size * (self.part == "up"), others]

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out], with all experts' rows."""
        return F.linear(x, self.weight)

    @property
    def _down(self) -> Tensor:
        down: Any = self.module._parameters[EXPERTS.projections[1]]
        return down


def prove_experts(module: nn.Module, device: torch.device) -> Proof:
    """Find out whether a module computes what its experts' interface says, and by which activation.

    Args:
        module: with stacked matrices (:func:`holds_experts`).
        device: to run on.
    """
    problem = _unlike(module)
    if problem is not None:
        return Proof(EXPERTS, None, problem)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, gate_up, down = random(4, _H), random(_E, 2 * _I, _H), random(_E, _H, _I)
    index = torch.tensor([[2, 0], [1, 2], [0, 1], [2, 1]], device=device)
    weights = torch.rand(4, _CHOSEN, generator=generator).to(device)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            found = _run(module, (gate_up, down), x, index, weights)
    except Exception as error:
        return Proof(EXPERTS, None, f"tried on small matrices, it raises {error!r}")
    trials = (
        ((EXPERTS, activation), _expected(x, gate_up, down, index, weights, activation))
        for activation in ACTIVATION_FUNCTIONS
    )
    return closest(found, x, trials, EXPERTS)


def _unlike(module: nn.Module) -> str | None:
    """How a module's matrices lie otherwise than those that are taken; None if they do not."""
    parameters = module._parameters
    names = sorted(name for name, parameter in parameters.items() if parameter is not None)
    if names != sorted(EXPERTS.projections):
        return f"its parameters are {', '.join(names)}; expected gate_up_proj and down_proj"
    gate_up, down = (parameters[name] for name in EXPERTS.projections)
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        return "its matrices are transposed, or gate and up interleaved"
    assert gate_up is not None
    assert down is not None
    experts, rows, hidden = gate_up.shape
    if down.shape != (experts, hidden, rows // 2):
        return f"down_proj is {list(down.shape)}; expected {[experts, hidden, rows // 2]}"
    if rows // 2 % 8:
        return f"its experts have {rows // 2} neurons; expected a multiple of 8"
    return None


def _run(
    module: nn.Module, matrices: tuple[Tensor, Tensor], x: Tensor, index: Tensor, weights: Tensor
) -> Any:
    own = type(module)
    probe = own.__new__(own)
    probe.__dict__.update(module.__dict__)
    probe.__dict__["_parameters"] = dict(zip(EXPERTS.projections, matrices, strict=True))
    probe.__dict__["training"] = False
    probe.__dict__["num_experts"] = _E
    if hasattr(module, "config"):  # the module's own loop, whatever the model runs by
        config = SimpleNamespace(**{**vars(module.config), "_experts_implementation": "eager"})
        probe.__dict__["config"] = config
    return getattr(own, "dense_forward", own.forward)(probe, x, index, weights)


def _expected(
    x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weights: Tensor, activation: str
) -> Tensor:
    y = torch.zeros_like(x)
    for token, row in enumerate(index.tolist()):
        for expert, weight in zip(row, weights[token], strict=True):
            gate, up = gate_up[expert].chunk(2)
            h = activations(x[token : token + 1], gate, up, activation)
            y[token] += weight * F.linear(h, down[expert])[0]
    return y


def chosen_experts(block: nn.Module, attribute: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which experts a block's router chooses for hidden states, without running any.

    Args:
        block: holds router and experts; its forward takes hidden states alone.
        attribute: of the experts in the block.
        x: hidden states [n, H], on the block's device.

    Returns:
        Index int64 and weights float32 of each token's experts, both [n, k].

    Raises:
        UnsupportedArchitectureError: the block hands something else to its experts.
    """
    taken: list[tuple[Tensor, Tensor]] = []

    def take(states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if states.numel() == x.numel() and (x.is_meta or torch.equal(states.reshape(x.shape), x)):
            taken.append((index, weights))
        return torch.zeros_like(states)

    own = type(block)
    probe: Any = own.__new__(own)
    probe.__dict__.update(block.__dict__)
    # What runs beside the experts would take time, and count it if it is sparse.
    beside = {name: torch.zeros_like for name, child in block._modules.items() if _is_ffn(child)}
    probe.__dict__["_modules"] = {**block._modules, **beside, attribute: take}
    probe.__dict__["training"] = False
    try:
        with torch.no_grad():
            own.forward(probe, x.unsqueeze(0))
    except Exception as error:
        raise UnsupportedArchitectureError(
            f"{own.__name__} cannot say which experts it chooses for hidden states alone: {error!r}"
        ) from error
    if len(taken) != 1:
        raise UnsupportedArchitectureError(
            f"{own.__name__} does not hand its input as it is to its experts, once"
        )
    index, weights = taken[0]
    return index.reshape(len(x), -1), weights.reshape(len(x), -1).float()


def _is_ffn(module: nn.Module | None) -> bool:
    """Whether a module maps hidden states to as many values by two matrices or three, or by planes."""
    return module is not None and (
        getattr(module, "holds_planes", False) is True or bool(forms_of(module))
    )


def expert_weights(index: Tensor, weights: Tensor, experts: int) -> Tensor:
    """What each expert counts for each token, 0 if it is not chosen: float32 [n, E].

    Args:
        index: of each token's experts [n, k] int64.
        weights: of them [n, k].
        experts: E.
    """
    dense = torch.zeros(len(index), experts, device=weights.device)
    return dense.scatter_(1, index, weights.float())


def expert_activations(
    x: Tensor,
    chosen: Tensor,
    one: Callable[[Tensor, int], Tensor],
    neurons: int,
) -> Tensor:
    """w·h of all experts' neurons, 0 of those that are not chosen: [n, E·I] float32.

    Args:
        x: hidden states [n, H].
        chosen: of :func:`expert_weights` [n, E].
        one: h [m, I] of hidden states [m, H] in the expert of a number.
        neurons: I, of one expert.
    """
    h = torch.zeros(len(x), chosen.shape[1] * neurons, device=x.device)
    for expert in range(chosen.shape[1]):
        rows = chosen[:, expert].nonzero().squeeze(-1)
        if len(rows):
            own = one(x[rows], expert) * chosen[rows, expert].unsqueeze(-1)
            h[rows, expert * neurons : (expert + 1) * neurons] = own.float()
    return h
