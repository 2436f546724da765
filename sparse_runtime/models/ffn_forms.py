"""What a module must be to be taken for an FFN: which matrices it has, and the proof by numbers.

Matrices are found by their shapes, not by their names, and every finding is proven: the module's own
forward, run on small matrices in place of its own, equals down(act(gate·x) ⊙ (up·x)), or
down(act(gate·x)) where there is no second matrix.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS, activations

# Sizes of the small matrices; no multiple of each other, and unlike any real size.
_H, _I = 6, 10
# Of float32 rounding, beside the largest value. gelu and its approximation by tanh differ by 2e-4.
_TOLERANCE = 2e-5


@dataclass(frozen=True)
class FFNForm:
    """The linear layers of an FFN.

    Attributes:
        projections: their names in its module, that of down last.
        kind: ``gated``: gate, up and down; ``fused``: one whose first half of rows is gate and the
            second up, and down; ``plain``: one, called gate like those that the activation is of, and
            down.
    """

    projections: tuple[str, ...]
    kind: Literal["gated", "fused", "plain"] = "gated"

    @property
    def matrices(self) -> int:
        """Matrices before the activation: 2, or 1 without a gate."""
        return 1 if self.kind == "plain" else 2

    def first_rows(self, neurons: int) -> int:
        """Rows of the first linear layer of an FFN of so many neurons."""
        return 2 * neurons if self.kind == "fused" else neurons

    def split(self, *weights: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gate, up [I, H] (None of a plain FFN) and down [H, I] of its matrices, as views."""
        if self.kind == "plain":
            return weights[0], None, weights[1]
        if self.kind == "fused":
            return *weights[0].chunk(2), weights[1]  # type: ignore[return-value]
        return weights[0], weights[1], weights[2]

    def split_bias(self, *biases: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Biases of gate and up [I], of those of its linear layers."""
        if self.kind == "plain":
            return biases[0], None
        if self.kind == "fused":
            return (None, None) if biases[0] is None else biases[0].chunk(2)  # type: ignore[return-value]
        return biases[0], biases[1]

    def join_bias(
        self, gate: Tensor | None, up: Tensor | None, down: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Biases of its linear layers, of those of gate and up [I] and down [H]."""
        if self.kind == "plain":
            return gate, down
        if self.kind == "fused":
            return None if gate is None or up is None else torch.cat([gate, up]), down
        return gate, up, down


#: As of Llama and most others.
LLAMA = FFNForm(("gate_proj", "up_proj", "down_proj"))


class LinearRows:
    """Half of the rows of a linear layer, read as a layer of its own without a copy.

    Attributes:
        linear: the whole layer, [2·I, H].
        second: which half.
    """

    def __init__(self, linear: nn.Linear, second: bool) -> None:
        self.linear, self.second = linear, second

    @property
    def in_features(self) -> int:
        """H."""
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        """I."""
        return self.linear.out_features // 2

    @property
    def weight(self) -> Tensor:
        """[I, H]."""
        return self.linear.weight[self._rows]

    @property
    def bias(self) -> Tensor | None:
        """[I]."""
        return None if self.linear.bias is None else self.linear.bias[self._rows]

    @property
    def _rows(self) -> slice:
        size = self.out_features
        return slice(size, None) if self.second else slice(size)

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., H] to [..., I]."""
        return F.linear(x, self.weight, self.bias)


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module maps vectors by a matrix, as ``nn.Linear`` and what stands in for it do."""
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def forms_of(module: nn.Module) -> list[FFNForm]:
    """How a module's own linear layers could be an FFN's, by their shapes."""
    linears = {name: child for name, child in module.named_children() if is_linear(child)}
    sizes: dict[str, tuple[int, int]] = {
        name: (child.in_features, child.out_features)  # type: ignore[misc]
        for name, child in linears.items()
    }
    if len(linears) == 3:
        return [
            FFNForm((gate, up, down))
            for gate, up, down in itertools.permutations(linears)
            if sizes[gate] == sizes[up] == sizes[down][::-1]
        ]
    if len(linears) == 2:
        forms = []
        for first, down in itertools.permutations(linears):
            size, rows = sizes[first]
            if (size, rows) == (sizes[down][1], 2 * sizes[down][0]):
                forms.append(FFNForm((first, down), "fused"))
            if (size, rows) == sizes[down][::-1]:
                forms.append(FFNForm((first, down), "plain"))
        return forms
    return []


# Weight and bias.
_Linear = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Proof:
    """What a module's forward was found to be.

    Attributes:
        form: whose names are the right way round.
        activation: by the kernels' name, or None if it is no FFN.
        reason: why it is not.
    """

    form: FFNForm
    activation: str | None
    reason: str = ""


def prove(module: nn.Module, forms: Sequence[FFNForm], device: torch.device) -> Proof:
    """Find out whether a module computes an FFN, and which.

    The forward of its class is run on small matrices in place of its projections: their hooks, and
    its own, are for the user's calls.

    Args:
        module: with the linear layers of the forms.
        forms: one or more of :func:`forms_of`.
        device: to run on.
    """
    # Where H is I, shapes do not say which matrix is down.
    proofs = []
    for last in dict.fromkeys(form.projections[-1] for form in forms):
        proofs.append(_prove(module, [f for f in forms if f.projections[-1] == last], device))
        if proofs[-1].activation is not None:
            return proofs[-1]
    return proofs[0]


def _prove(module: nn.Module, forms: Sequence[FFNForm], device: torch.device) -> Proof:
    generator = torch.Generator().manual_seed(0)
    form = forms[0]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, given = random(1, 3, _H), {}
    for name in form.projections:
        rows, size = (_H, _I) if name == form.projections[-1] else (form.first_rows(_I), _H)
        biased = getattr(module._modules[name], "bias", None) is not None
        given[name] = random(rows, size), random(rows) if biased else None
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            found = _run(module, given, x)
            trials = list(_trials(forms, given, x))
    except Exception as error:
        reason = f"tried on small matrices, it raises {error!r}{_extras(module, form)}"
        return Proof(form, None, reason)
    if not isinstance(found, Tensor) or found.shape != x.shape:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        return Proof(form, None, f"it gives {shape} for hidden states {list(x.shape)}")
    differences = [(float((found - expected).abs().max()), *trial) for trial, expected in trials]
    difference, best, activation = min(differences, key=lambda entry: entry[0])
    largest = float(found.abs().max())
    if difference <= _TOLERANCE * max(1.0, largest):
        return Proof(best, activation)
    return Proof(
        best,
        None,
        f"tried on small matrices, its values of up to {largest:.3g} differ by {difference:.3g} or "
        f"more with any of {', '.join(ACTIVATION_FUNCTIONS)}{_extras(module, best)}",
    )


def _run(module: nn.Module, linears: dict[str, _Linear], x: Tensor) -> Any:
    own = type(module)
    probe = own.__new__(own)
    probe.__dict__.update(module.__dict__)
    sizes = _own_sizes(module, list(linears))
    for name, value in module.__dict__.items():
        if type(value) is int and value in sizes:  # which some split by
            probe.__dict__[name] = sizes[value]
    probe.__dict__["training"] = False
    probe.__dict__["_modules"] = {
        name: child and child.forward for name, child in module._modules.items()
    }
    for name, (weight, bias) in linears.items():
        probe._modules[name] = functools.partial(F.linear, weight=weight, bias=bias)  # type: ignore[assignment]
    # Of a module that is sparse already, what it was before.
    return getattr(own, "dense_forward", own.forward)(probe, x)


def _own_sizes(module: nn.Module, names: Sequence[str]) -> dict[int, int]:
    """A module's H and I, each with the small one that stands for it."""
    down: Any = module._modules[names[-1]]
    return {down.out_features: _H, down.in_features: _I}


def _trials(
    forms: Sequence[FFNForm], given: dict[str, _Linear], x: Tensor
) -> Iterator[tuple[tuple[FFNForm, str], Tensor]]:
    for form in forms:
        weights, biases = zip(*(given[name] for name in form.projections), strict=True)
        gate, up, down = form.split(*weights)
        for activation in ACTIVATION_FUNCTIONS:
            h = activations(x, gate, up, activation, *form.split_bias(*biases))
            yield (form, activation), F.linear(h, down, biases[-1])


def _extras(module: nn.Module, form: FFNForm) -> str:
    """What a module holds beside its projections and an activation, as a likely cause."""
    extras = [
        f"{name} ({type(child).__name__})"
        for name, child in module.named_children()
        if name not in form.projections and not is_linear(child) and list(child.parameters())
    ]
    extras += [
        name
        for name, value in vars(module).items()
        if type(value) is float and value not in (0.0, 1.0)
    ]
    return f". Beside its projections it has {', '.join(extras)}" if extras else ""
