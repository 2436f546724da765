"""An FFN module made sparse in place: its class gets a subclass whose forward asks ``SparseFFN``.

Not a wrapper: the module keeps its place, names, parameters, hooks and state dict, and whoever walks
the model (PEFT, accelerate, torchao, a debugger) finds what was there. torch's own parametrizations
and ``fully_shard`` change classes in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.kernels.linear import has_no_hooks
from sparse_runtime.models.ffn_layers import FFNLayer

#: Name of the ``SparseFFN`` in the FFN that it makes sparse.
CHILD = "sparse_ffn"
# An FFN's own class -> its sparse subclass.
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class SparseForward(nn.Module):
    """Mixin of the classes that :func:`patch` gives to FFNs, before the FFN's own class."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states [..., H] to the FFN's output [..., H]."""
        sparse = self._modules.get(CHILD)
        if sparse is None:  # somebody kept this method beyond unsparsify
            return type(self).forward(self, hidden_states)
        call = sparse.forward if has_no_hooks(sparse) else sparse
        output: Tensor = call(hidden_states)
        return output

    def dense_forward(self, hidden_states: Tensor) -> Tensor:
        """The forward of the FFN's own class."""
        output: Tensor = super().forward(hidden_states)
        return output

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        sparse = self.__dict__.get("_modules", {}).get(CHILD)
        if sparse is not None and name in sparse.projections:
            sparse.forget()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Its class has no importable name.
        return _new, (_own_class(self),), self.__dict__

    def _apply(self, *args: Any, **kwargs: Any) -> SparseForward:
        super()._apply(*args, **kwargs)
        _adopt_anew(self)
        return self


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
            mlp.__class__ = _sparse_class(type(mlp))
            _rebind(mlp)
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
        owner.__class__ = _own_class(owner)  # type: ignore[assignment]
        _rebind(owner)
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


def _rebind(module: nn.Module) -> None:
    """Let accelerate's hooks on a module call the forward of the class that it has now."""
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = type(module).forward.__get__(module)


def _sparse_class(own: type[nn.Module]) -> type[nn.Module]:
    if own not in _CLASSES:
        _CLASSES[own] = type(
            f"Sparse{own.__name__}", (SparseForward, own), {"__module__": __name__}
        )
    return _CLASSES[own]


def _own_class(owner: nn.Module) -> type[nn.Module]:
    return type(owner).__bases__[1]


def _new(own: type[nn.Module]) -> nn.Module:
    kind = _sparse_class(own)
    return kind.__new__(kind)


def _contiguous(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """The down projection is transposed in memory; safetensors wants it as it was."""
    for name in sparse_ffn_of(module).projections:
        key = f"{prefix}{name}.weight"
        if isinstance(state_dict.get(key), Tensor):
            state_dict[key] = state_dict[key].contiguous()


def _adopt_loaded(module: nn.Module, incompatible_keys: Any) -> None:
    _adopt_anew(module)


def _adopt_anew(owner: nn.Module) -> None:
    ffn = sparse_ffn_of(owner)
    ffn.forget()
    ffn.adopt()
