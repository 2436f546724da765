"""FFNs as modules that a dense model calls, whether it has one for each or writes them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from sparse_runtime.kernels.linear import change_class
from sparse_runtime.models.ffn_forms import FFNForm
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.inline import (
    STATE,
    InlineFFN,
    InlineForward,
    attach,
    detach,
    inline_class,
)


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
