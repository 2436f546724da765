"""An FFN module made sparse in place: its class gets a subclass whose forward asks ``SparseFFN``.

Not a wrapper: the module keeps its place, names, parameters, hooks and state dict, and whoever walks
the model (PEFT, accelerate, torchao, a debugger) finds what was there. torch's own parametrizations
and ``fully_shard`` change classes in the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from sparse_runtime.ffn.projections import drops_values, own_class
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.kernels.linear import change_class, has_no_hooks
from sparse_runtime.models.ffn_forms import FFNForm
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.inline import (
    STATE,
    InlineForward,
    attach,
    can_stand_in,
    detach,
    run_inline,
)

#: Name of the ``SparseFFN`` in the FFN that it makes sparse.
CHILD = "sparse_ffn"
# An FFN's own class, and its form if it is written out in a larger module -> its sparse subclass.
_CLASSES: dict[tuple[type[nn.Module], FFNForm | None], type[nn.Module]] = {}


class SparseForward(nn.Module):
    """Mixin of the classes that :func:`patch` gives to FFNs, before the FFN's own class."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Map hidden states [..., H], under whatever name, to the FFN's output [..., H]."""
        sparse = self._modules.get(CHILD)
        if sparse is None:  # somebody kept this method beyond unsparsify
            return type(self).forward(self, *args, **kwargs)
        if kwargs or len(args) not in (1, 3):  # of experts three
            bound = inspect.signature(own_class(self).forward).bind(self, *args, **kwargs)
            args = tuple(bound.arguments.values())[1:]
        call = sparse.forward if has_no_hooks(sparse) else sparse
        output: Tensor = call(*args)
        return output

    def dense_forward(self, hidden_states: Tensor, *choice: Tensor) -> Tensor:
        """The forward of the FFN's own class; experts have index and weights, too."""
        output: Tensor = super().forward(hidden_states, *choice)
        return output

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        sparse = self.__dict__.get("_modules", {}).get(CHILD)
        if sparse is not None and name in sparse.form.projections:
            sparse.forget()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Its class has no importable name.
        form = getattr(type(self), "inline_form", None)
        state = {name: value for name, value in self.__dict__.items() if name not in STATE}
        return _new, (own_class(self), form), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _adopt_anew(self)  # a copy looks at its own projections, and a compiled call cannot

    def _apply(self, *args: Any, **kwargs: Any) -> SparseForward:
        sparse_ffn_of(self).forget()  # lets go of the weights, which torch may want to swap
        super()._apply(*args, **kwargs)
        _adopt_anew(self)
        return self


class SparseInlineForward(SparseForward, InlineForward):
    """Of a larger module that has its FFN written out in its forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own class."""
        if CHILD in self._modules and not can_stand_in(self):
            given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            self._note_dense(next(given).shape[:-1].numel())
        return InlineForward.forward(self, *args, **kwargs)

    def _note_dense(self, num_tokens: int) -> None:
        """Say why a call runs as it stands, as the FFN does where it has a module for itself."""
        sparse, reason = sparse_ffn_of(self), "patched"
        if sparse.state.switch.depth > 0:
            reason = "dense()"
        elif self.training or drops_values(self, self.inline_form):  # or may, where no one sees it
            reason = "dropout"
        else:
            sparse.stand_back()
        sparse.count_dense(reason, num_tokens)

    def dense_forward(self, hidden_states: Tensor, *choice: Tensor) -> Tensor:
        """The FFN by the modules it is made of."""
        return run_inline(self, self.inline_form, hidden_states)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        attach(self, self.inline_form, sparse_ffn_of(self))


def patch(layers: Sequence[FFNLayer], ffns: Sequence[SparseFFN]) -> None:
    """Make FFNs sparse, all of them or, if anything is raised, none."""
    done: list[nn.Module] = []
    try:
        for layer, ffn in zip(layers, ffns, strict=True):
            mlp = layer.mlp
            done.append(mlp)
            mlp.add_module(CHILD, ffn)
            ffn.train(mlp.training)
            mlp.register_state_dict_post_hook(_contiguous)
            mlp.register_load_state_dict_post_hook(_adopt_loaded)
            inline = None if layer.form.inline is None else layer.form
            change_class(mlp, _sparse_class(type(mlp), inline))
            if inline is not None:
                attach(mlp, inline, ffn)
            ffn.adopt()
    except BaseException:
        for mlp in done:
            unpatch(mlp)
        raise


def unpatch(owner: nn.Module) -> None:
    """Make a sparse FFN again what it was."""
    ffn = owner._modules.pop(CHILD, None)
    for hooks in (owner._state_dict_hooks, owner._load_state_dict_post_hooks):
        for key, hook in list(hooks.items()):
            if hook in (_contiguous, _adopt_loaded):
                del hooks[key]
    if isinstance(owner, SparseForward):
        change_class(owner, own_class(owner))
        detach(owner)
    if isinstance(ffn, SparseFFN):
        ffn.release()


def owners(model: nn.Module) -> Iterator[nn.Module]:
    """The sparse FFN modules of a model, in its order."""
    return (module for module in model.modules() if isinstance(module, SparseForward))


def sparse_ffn_of(owner: nn.Module) -> SparseFFN:
    """The part of a sparse FFN module that makes it sparse."""
    ffn = owner._modules[CHILD]
    assert isinstance(ffn, SparseFFN)
    return ffn


def ffn_parts(owner: nn.Module) -> list[nn.Module]:
    """The modules that are a sparse FFN's alone, each with all that it holds."""
    form = getattr(type(owner), "inline_form", None)
    if form is None:
        return [owner]
    return [part for name in form.projections if (part := owner._modules.get(name)) is not None]


def _sparse_class(own: type[nn.Module], inline: FFNForm | None) -> type[nn.Module]:
    key = own, inline
    if key not in _CLASSES:
        name, fields = f"Sparse{own.__name__}", {"__module__": __name__}
        if inline is None:
            _CLASSES[key] = type(name, (SparseForward, own), fields)
        else:
            more = {"inline_class": own, "inline_form": inline}
            _CLASSES[key] = type(name, (SparseInlineForward, own), fields | more)
    return _CLASSES[key]


def _new(own: type[nn.Module], inline: FFNForm | None) -> nn.Module:
    kind = _sparse_class(own, inline)
    return kind.__new__(kind)


def _contiguous(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """The down projection is transposed in memory; safetensors wants it as it was."""
    ffn = sparse_ffn_of(module)
    for key, value in state_dict.items():
        # Whatever its name: an adapter on the projection has moved it.
        if key.startswith(prefix) and isinstance(value, Tensor) and ffn.has_transposed(value):
            state_dict[key] = value.contiguous()


def _adopt_loaded(module: nn.Module, incompatible_keys: Any) -> None:
    _adopt_anew(module)


def _adopt_anew(owner: nn.Module) -> None:
    ffn = sparse_ffn_of(owner)
    ffn.forget()
    ffn.adopt()
