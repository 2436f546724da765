"""FFNs that are written out in the forward of a larger module, such as OPT's decoder layer.

There ``fc1``, the activation and ``fc2`` stand among attention, norms and residuals, and no module takes
the FFN's input and gives its output. The larger module's forward is run on a *view* of it instead: an
object that shares the module's ``__dict__``, and so is it at every moment, but whose class answers for
three names. ``fc1`` and the activation hand on what they get, and ``fc2`` asks another module for the
whole FFN. What arrives there is the FFN's input, so that a dense call can still be made of the real
modules. That a forward gives the same either way is proven by numbers before anything is patched, and
where something has changed since, or values may be dropped in between, the forward runs as it stands.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from sparse_runtime.kernels.linear import change_class, has_no_hooks
from sparse_runtime.models.ffn_forms import (
    FFNForm,
    Proof,
    SmallLinear,
    activation_of,
    small_linears,
    small_probe,
    without_dropout,
)
from sparse_runtime.models.transposed import is_linear

if TYPE_CHECKING:
    from sparse_runtime.models.ffn_layers import FFNLayer

#: Attributes of a module whose FFN another one computes: what its forward is run on, and that other
#: module, in a tuple because it is no child.
_VIEW, _FFN = "_inline_view", "_inline_ffn"
STATE = (_VIEW, _FFN)
# (class, its forward, form) -> class of its views.
_VIEWS: dict[tuple[Any, ...], type[nn.Module]] = {}
# Of float32 rounding, beside the largest value.
_TOLERANCE = 1e-5


class InlineForward(nn.Module):
    """Mixin, before a module's own class, whose forward has the FFN written out in it computed apart.

    A subclass says what it was made of as ``inline_class`` and ``inline_form``.
    """

    inline_class: type[nn.Module]
    inline_form: FFNForm

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own class."""
        view = self.__dict__.get(_VIEW)
        own = self.inline_class.forward
        if view is None or not can_stand_in(self, view):
            return own(self, *args, **kwargs)
        return own(view, *args, **kwargs)


def can_stand_in(module: nn.Module, view: Any) -> bool:
    """Whether a module's forward would do on its view what it does on the module, as far as is seen."""
    if module.training or view.proven[0] is not view.proven[1].forward:
        return False
    if not torch.compiler.is_compiling() and view.__dict__ is not module.__dict__:
        return False  # the view of another module, of which this one is a copy
    modules = module._modules
    return all(
        between is not None and not between.training and has_no_hooks(between)
        for between in map(modules.get, view.form.inline)
    )


def inline_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a module had before its FFN was computed apart; None if it is not."""
    return getattr(type(module), "inline_class", None)


def attach(module: nn.Module, form: FFNForm, ffn: nn.Module) -> None:
    """Have a module's forward, by :class:`InlineForward`, ask ``ffn`` for the FFN's output."""
    own = inline_class(module)
    assert own is not None
    view = _new_view(module, own, form)
    module.__dict__.update({_VIEW: view, _FFN: (ffn,)})


def detach(module: nn.Module) -> None:
    """Undo :func:`attach`."""
    for name in STATE:
        module.__dict__.pop(name, None)


def run_inline(module: nn.Module, form: FFNForm, hidden_states: Tensor) -> Tensor:
    """The FFN that is written out in a module: [..., H] of hidden states [..., H]."""
    first, last = form.projections
    x: Any = hidden_states
    for name in (first, *(form.inline or ()), last):
        x = module._modules[name](x)  # type: ignore[misc]
    output: Tensor = x
    return output


class InlineFFN(nn.Module):
    """An FFN that is written out in a larger module, as a module; of hidden states [..., H]."""

    def __init__(self, module: nn.Module, form: FFNForm) -> None:
        super().__init__()
        self._module = (module,)  # not a child
        self.form = form

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states [..., H] to the FFN's output [..., H]."""
        return run_inline(self._module[0], self.form, hidden_states)


def ffn_module(layer: FFNLayer) -> nn.Module:
    """What maps an FFN's hidden states to its output; the model calls it inside :func:`calling`."""
    return layer.mlp if layer.form.inline is None else InlineFFN(layer.mlp, layer.form)


@contextmanager
def calling(layers: Sequence[FFNLayer], ffns: Sequence[nn.Module]) -> Iterator[None]:
    """Let a dense model call these modules in place of its FFNs, inside the context.

    Args:
        layers: FFNs of the model.
        ffns: for each, :func:`ffn_module` of it, for hooks or another forward, or something else that
            maps hidden states [..., H] to outputs [..., H]. OPT calls it with [n, H].
    """
    undo: list[Callable[[], None]] = []
    try:
        for layer, ffn in zip(layers, ffns, strict=True):
            if layer.form.inline is not None:
                undo.append(_opened(layer.mlp, layer.form, ffn))
            elif ffn is not layer.mlp:
                setattr(layer.parent, layer.attribute, ffn)
                undo.append(_setter(layer))
        yield
    finally:
        for step in reversed(undo):
            step()


def _setter(layer: FFNLayer) -> Callable[[], None]:
    return lambda: setattr(layer.parent, layer.attribute, layer.mlp)


def _opened(module: nn.Module, form: FFNForm, ffn: nn.Module) -> Callable[[], None]:
    """Attach an FFN to a module; returns what undoes that."""
    before, kind = {name: module.__dict__.get(name) for name in STATE}, type(module)
    if inline_class(module) is None:
        fields = {"__module__": __name__, "inline_class": kind, "inline_form": form}
        change_class(module, type(kind.__name__, (InlineForward, kind), fields))
    attach(module, form, ffn)

    def undo() -> None:
        change_class(module, kind)
        detach(module)
        module.__dict__.update({name: value for name, value in before.items() if value is not None})

    return undo


def _passed(x: Tensor) -> Tensor:
    return x


def _view_class(own: type[nn.Module], form: FFNForm) -> type[nn.Module]:
    key = own, own.forward, form
    if key not in _VIEWS:
        first, last = form.projections
        names = dict.fromkeys((first, *(form.inline or ())), property(lambda view: _passed))
        _VIEWS[key] = type(
            f"{own.__name__}View",
            (own,),
            {
                **names,
                last: property(lambda view: view.__dict__[_FFN][0]),
                "__module__": __name__,
                "proven": (own.forward, own),
                "form": form,
            },
        )
    return _VIEWS[key]


def _new_view(module: nn.Module, own: type[nn.Module], form: FFNForm) -> nn.Module:
    kind = _view_class(own, form)
    view = kind.__new__(kind)
    object.__setattr__(view, "__dict__", module.__dict__)
    return view


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
    best = Proof(form, None, "it is not called with hidden states alone")
    for answer in _ANSWERS:
        for filled in (False, True):
            try:
                with torch.no_grad(), torch.autocast(device.type, enabled=False):
                    proof = _Trial(module, form, device, answer, filled).proof()
            except Exception as error:
                reason = f"tried on small matrices, it raises {error!r}"
                proof = Proof(form, None, reason)
            if proof.activation is not None:
                return proof
            if "raises" not in proof.reason or best.reason.startswith("it is not called"):
                best = proof
    return best


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
        found = [self._run(self.own, x) for x in (self.x, self.x[:, :1])]
        half = len(self.calls) // 2
        calls = self.calls[:half]
        if self.calls[half:] != calls or [calls.count(n) for n in (first, last)] != [1, 1]:
            return self._no(f"it calls {', '.join(calls) or 'neither'}")
        between = tuple(calls[1:-1])
        if calls[0] != first or calls[-1] != last or len({*between}) < len(between):
            return self._no(f"it calls {', '.join(calls)}")
        for name in between:
            if list(self.module._modules[name].parameters()):  # type: ignore[union-attr]
                kind = type(self.module._modules[name]).__name__
                return self._no(f"{name} ({kind}) stands in between, which has weights")
        form = replace(self.form, inline=between)
        activation = activation_of(self.form, self.linears, self.inputs[0], self.outputs[1])
        viewed = [self._run(_view_class(self.own, form), x) for x in (self.x, self.x[:, :1])]
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
        probe.__dict__[_FFN] = (self._apart,)
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
    """What else a module holds: run as it is between the FFN's linear layers; scaled states elsewhere."""

    def __init__(self, trial: _Trial, name: str, child: nn.Module, scale: float) -> None:
        self.trial, self.name, self.child, self.scale = trial, name, child, scale

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first, last = self.trial.form.projections
        if _open(self.trial.calls, first, last):
            self.trial.calls.append(self.name)
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
