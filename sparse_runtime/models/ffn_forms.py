"""What a module must be to be taken for an FFN: which matrices it has, and the proof by numbers.

Matrices are found by their shapes, not by their names, and every finding is proven: the module's own
forward, run on small matrices in place of its own, equals down(act(gate·x) ⊙ (up·x)), or
down(act(gate·x)) where there is no second matrix.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS, activations
from sparse_runtime.models.transposed import is_linear, is_transposed, linear_sizes

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
            down; ``experts``: parameters of many fused ones (``models/experts.py``).
        transposed: their weights are [in, out], as GPT-2's.
        inline: of an FFN written out in the forward of a larger module
            (``sparse_runtime.models.inline``): modules called in between, by name, in order. None of
            one that has a module for itself.
    """

    projections: tuple[str, ...]
    kind: Literal["gated", "fused", "plain", "experts"] = "gated"
    transposed: bool = False
    inline: tuple[str, ...] | None = None

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
        if self.kind == "experts":
            return None, None
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


def forms_of(module: nn.Module) -> list[FFNForm]:
    """How a module's own linear layers could be an FFN's, by their shapes."""
    linears = {name: child for name, child in module.named_children() if is_linear(child)}
    sizes = {name: linear_sizes(child) for name, child in linears.items()}
    turned = [is_transposed(child) for child in linears.values()]
    if any(turned) and not (all(turned) and len(linears) == 2):
        return []
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
                forms.append(FFNForm((first, down), "fused", transposed=any(turned)))
            if (size, rows) == sizes[down][::-1]:
                forms.append(FFNForm((first, down), "plain", transposed=any(turned)))
        return forms
    return []


class SmallLinear(NamedTuple):
    """A small matrix in place of a linear layer's, [rows, size], with a bias or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., size] to [..., rows]."""
        return F.linear(x, self.weight, self.bias)


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
    form = forms[0]
    x, given = small_linears(module, form, device)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            found = _run(module, given, form, x)
            trials = list(_trials(forms, given, x))
    except Exception as error:
        reason = f"tried on small matrices, it raises {error!r}{_extras(module, form)}"
        return Proof(form, None, reason)
    return closest(found, x, trials, form, _extras(module, form))


def closest(
    found: Any,
    x: Tensor,
    trials: Iterable[tuple[tuple[FFNForm, str], Tensor]],
    form: FFNForm,
    extras: str = "",
) -> Proof:
    """Which of some trials a module's output is that of.

    Args:
        found: the output, of hidden states ``x``.
        x: of the output's shape, if it is one of an FFN.
        trials: forms and activations, with what they give.
        form: to name if there is none.
        extras: a likely cause if it is none of them.
    """
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
        f"more with any of {', '.join(ACTIVATION_FUNCTIONS)}{extras}",
    )


def small_linears(
    module: nn.Module, form: FFNForm, device: torch.device
) -> tuple[Tensor, dict[str, SmallLinear]]:
    """Small hidden states [1, 3, H'], and a small matrix for each of an FFN's linear layers by name."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, given = random(1, 3, _H), {}
    for name in form.projections:
        rows, size = (_H, _I) if name == form.projections[-1] else (form.first_rows(_I), _H)
        biased = getattr(module._modules[name], "bias", None) is not None
        given[name] = SmallLinear(random(rows, size), random(rows) if biased else None)
    return x, given


def small_probe(module: nn.Module, kind: type[nn.Module], form: FFNForm) -> nn.Module:
    """An object of a class with a module's attributes, small sizes in place of its H and I."""
    probe = kind.__new__(kind)
    probe.__dict__.update(module.__dict__)
    sizes = _own_sizes(module, form.projections)
    for name, value in module.__dict__.items():
        if type(value) is int and value in sizes:  # which some split by
            probe.__dict__[name] = sizes[value]
    probe.__dict__["training"] = False
    return probe


def activation_of(
    form: FFNForm, given: dict[str, SmallLinear], x: Tensor, found: Tensor
) -> str | None:
    """The activation by which small matrices give what was found; None if that is none known."""
    bound = _TOLERANCE * max(1.0, float(found.abs().max()))
    return next(
        (
            activation
            for (_, activation), expected in _trials([form], given, x)
            if float((found - expected).abs().max()) <= bound
        ),
        None,
    )


def _run(module: nn.Module, linears: dict[str, SmallLinear], form: FFNForm, x: Tensor) -> Any:
    own = type(module)
    probe = small_probe(module, own, form)
    probe.__dict__["_modules"] = {
        name: child and without_dropout(child).forward for name, child in module._modules.items()
    }
    probe.__dict__["_modules"].update(linears)
    # Of a module that is sparse already, what it was before.
    return getattr(own, "dense_forward", own.forward)(probe, x)


def _own_sizes(module: nn.Module, names: Sequence[str]) -> dict[int, int]:
    """A module's H and I, each with the small one that stands for it."""
    down = module._modules[names[-1]]
    assert down is not None
    size, rows = linear_sizes(down)
    return {rows: _H, size: _I}


def without_dropout(module: nn.Module) -> nn.Module:
    """A module, or one like it for the probe that drops nothing."""
    if not (module.training and isinstance(module, _DropoutNd)):
        return module
    calm = copy.copy(module)
    calm.training = False
    return calm


def _trials(
    forms: Sequence[FFNForm], given: dict[str, SmallLinear], x: Tensor
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
