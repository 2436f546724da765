"""FFNs that are written out in the forward of a larger module, such as OPT's decoder layer.

There ``fc1``, the activation and ``fc2`` stand among attention, norms and residuals, and no module
takes the FFN's input and gives its output. The larger module's forward is run on a *view* of it
instead: an object that shares the module's ``__dict__``, and so is it at every moment, but whose class
answers for three names. ``fc1`` and the activation hand on what they get, and ``fc2`` asks another
module for the whole FFN. What arrives there is the FFN's input, so that a dense call can still be made
of the real modules. That a forward gives the same either way is proven by numbers before anything is
patched (``models/inline_proof.py``); where something has changed since, or values may be dropped in
between, the forward runs as it stands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_runtime.kernels.linear import has_no_hooks
from sparse_runtime.models.ffn_forms import FFNForm

#: Attributes of a module whose FFN another one computes: what its forward is run on, and that other
#: module, in a tuple because it is no child.
VIEW, FFN = "_inline_view", "_inline_ffn"
#: What is not copied with a module.
STATE = (VIEW, FFN)
# (class, its forward, form) -> class of its views.
_VIEWS: dict[tuple[Any, ...], type[nn.Module]] = {}


class InlineForward(nn.Module):
    """Mixin, before a module's own class, whose forward has the FFN written out in it computed apart.

    A subclass says what it was made of as ``inline_class`` and ``inline_form``.
    """

    inline_class: type[nn.Module]
    inline_form: FFNForm

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own class."""
        own = self.inline_class.forward
        return own(self.__dict__[VIEW] if can_stand_in(self) else self, *args, **kwargs)


def can_stand_in(module: nn.Module) -> bool:
    """Whether a module's forward does on its view what it does on the module, as far as is seen."""
    view: Any = module.__dict__.get(VIEW)
    if view is None:
        return False
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
    module.__dict__.update({VIEW: view, FFN: (ffn,)})


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


def _passed(x: Tensor) -> Tensor:
    return x


def view_class(own: type[nn.Module], form: FFNForm) -> type[nn.Module]:
    """The class of views of an ``own``: its FFN is ``__dict__[FFN][0]``."""
    key = own, own.forward, form
    if key not in _VIEWS:
        first, last = form.projections
        names = dict.fromkeys((first, *(form.inline or ())), property(lambda view: _passed))
        _VIEWS[key] = type(
            f"{own.__name__}View",
            (own,),
            {
                **names,
                last: property(lambda view: view.__dict__[FFN][0]),
                "__module__": __name__,
                "proven": (own.forward, own),
                "form": form,
            },
        )
    return _VIEWS[key]


def _new_view(module: nn.Module, own: type[nn.Module], form: FFNForm) -> nn.Module:
    kind = view_class(own, form)
    view = kind.__new__(kind)
    object.__setattr__(view, "__dict__", module.__dict__)
    return view
