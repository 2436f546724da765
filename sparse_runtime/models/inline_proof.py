"""The proof that an FFN is written out in the forward of a larger module (``models/inline.py``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from sparse_runtime.models.ffn_forms import (
    FFNForm,
    Proof,
    SmallLinear,
    activation_of,
    small_linears,
    small_probe,
    without_dropout,
)
from sparse_runtime.models.inline import FFN, inline_class, view_class
from sparse_runtime.models.transposed import is_linear

# Of float32 rounding, beside the largest value.
_TOLERANCE = 1e-5
# What stands beside an FFN gives states alone, or attention and cache with them.
_Answer = Callable[[Tensor], Any]
_ANSWERS: tuple[_Answer, ...] = (
    lambda x: (x, None),
    lambda x: (x, None, None),
    lambda x: x,
    lambda x: (x,),
)


def prove_inline(module: nn.Module, forms: Sequence[FFNForm], device: torch.device) -> Proof:
    """Find out whether an FFN without a gate is written out in a module's forward, and which.

    The forward of its class is run on small matrices in place of the FFN's, twice: with them, and on a
    view for which the FFN is computed apart. Whatever else the module holds stands back: norms,
    attention and the like hand on what they get, scaled.

    Args:
        module: with the linear layers of the forms.
        forms: one or more of ``forms_of``.
        device: to run on.
    """
    proofs = [_prove_form(module, form, device) for form in forms if form.kind == "plain"]
    proven = [proof for proof in proofs if proof.activation is not None]
    unlike = Proof(forms[0], None, "an FFN in a larger forward can be one without a gate only")
    return [*proven, *proofs, unlike][0]


def _prove_form(module: nn.Module, form: FFNForm, device: torch.device) -> Proof:
    best = Proof(form, None, "it raises")
    for answer in _ANSWERS:
        for filled in (False, True):
            try:
                with torch.no_grad(), torch.autocast(device.type, enabled=False):
                    proof = _Trial(module, form, device, answer, filled).proof()
            except _NoFFN as error:
                return Proof(form, None, str(error))
            except Exception as error:
                proof = Proof(form, None, f"tried on small matrices, it raises {error!r}")
            if proof.activation is not None:
                return proof
            if "raises" not in proof.reason or "raises" in best.reason:
                best = proof
    return best


class _NoFFN(Exception):
    """What is written out is no FFN, however the forward is called."""


class _Trial:
    """One way to call a module's forward on small matrices.

    Args:
        answer: what modules with linear layers of their own give.
        filled: whether arguments that have no default are hidden states; None otherwise.
    """

    def __init__(
        self,
        module: nn.Module,
        form: FFNForm,
        device: torch.device,
        answer: _Answer,
        filled: bool,
    ) -> None:
        self.module, self.form, self.filled, self.answer = module, form, filled, answer
        self.own = inline_class(module) or type(module)
        self.x, self.linears = small_linears(module, form, device)
        #: Calls between the first linear layer's and the last one's, those included.
        self.calls: list[str] = []
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def proof(self) -> Proof:
        """What came of it."""
        first, last = self.form.projections
        found = []
        for x in (self.x, self.x[:, :1]):
            self.calls.clear()
            found.append(self._run(self.own, x))
            between = tuple(self.calls[1:-1])
            once = {first, last}.isdisjoint(between)
            if not once or self.calls != [first, *dict.fromkeys(between), last]:
                return self._no(f"it calls {', '.join(self.calls) or 'neither'}")
        form = replace(self.form, inline=between)
        activation = activation_of(self.form, self.linears, self.inputs[0], self.outputs[1])
        viewed = [self._run(view_class(self.own, form), x) for x in (self.x, self.x[:, :1])]
        for whole, apart in zip(found, viewed, strict=True):
            difference = float((whole - apart).abs().max())
            if difference > _TOLERANCE * max(1.0, float(whole.abs().max())):
                text = "with the FFN computed apart, its small values differ by"
                return self._no(f"{text} {difference:.3g}")
        if activation is None:
            return self._no("its activation is none that the kernels know")
        return Proof(form, activation)

    def _no(self, reason: str) -> Proof:
        return Proof(self.form, None, f"tried on small matrices, {reason}")

    def _run(self, kind: type[nn.Module], x: Tensor) -> Tensor:
        probe = small_probe(self.module, kind, self.form)
        probe.__dict__["_modules"] = {
            name: child and self._stand_in(name, child, number)
            for number, (name, child) in enumerate(self.module._modules.items())
        }
        probe.__dict__[FFN] = (self._apart,)
        parameters = list(inspect.signature(self.own.forward).parameters.values())[2:]
        given = {
            p.name: x * 0.5 if self.filled else None
            for p in parameters
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
        output: Any = kind.forward(probe, x, **given)
        output = output if isinstance(output, Tensor) else output[0]
        if not isinstance(output, Tensor):
            raise TypeError(f"it gives {type(output).__name__}")
        return output

    def _stand_in(self, name: str, child: nn.Module, number: int) -> Any:
        small = self.linears.get(name)
        if small is not None:
            return _Noted(self, name, small)
        return _Beside(self, name, child, 1 + 0.125 * number)

    def _apart(self, x: Tensor) -> Tensor:
        first, last = self.form.projections
        h = self.linears[first](x)
        for name in self.calls[1 : self.calls.index(last)]:
            between = self.module._modules[name]
            assert between is not None
            h = without_dropout(between).forward(h)
        return self.linears[last](h)


class _Noted:
    """A small linear layer whose calls are noted."""

    def __init__(self, trial: _Trial, name: str, small: SmallLinear) -> None:
        self.trial, self.name, self.small = trial, name, small
        self.weight, self.bias = small.weight, small.bias

    def __call__(self, x: Tensor) -> Tensor:
        self.trial.calls.append(self.name)
        output = self.small(x)
        self.trial.inputs.append(x)
        self.trial.outputs.append(output)
        return output


class _Beside:
    """What else a module holds: itself between the FFN's linear layers; scaled states elsewhere."""

    def __init__(self, trial: _Trial, name: str, child: nn.Module, scale: float) -> None:
        self.trial, self.name, self.child, self.scale = trial, name, child, scale

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first, last = self.trial.form.projections
        if _open(self.trial.calls, first, last):
            self.trial.calls.append(self.name)
            if any(True for _ in self.child.parameters()):
                kind = type(self.child).__name__
                raise _NoFFN(f"{self.name} ({kind}) stands in between, which has weights")
            return without_dropout(self.child).forward(*args, **kwargs)
        if isinstance(self.child, _DropoutNd):
            return args[0]
        states = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)) * self.scale
        if any(map(is_linear, self.child.modules())):
            return self.trial.answer(states)
        return states


def _open(calls: list[str], first: str, last: str) -> bool:
    """Whether the first linear layer was called and the last was not, since."""
    return next((name == first for name in reversed(calls) if name in (first, last)), False)
