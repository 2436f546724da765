"""What the projections of an FFN were when copies of them were made, and whether they still are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from sparse_runtime.ffn.expert_parameters import SeenExperts, experts_problem
from sparse_runtime.kernels.linear import (
    call_problem,
    has_global_hooks,
    has_no_hooks,
    is_plain,
    version_of,
    weight_problem,
)
from sparse_runtime.models.ffn_forms import FFNForm


def own_class(owner: nn.Module) -> type[nn.Module]:
    """The class that a sparse FFN module had before (``sparse_runtime.ffn.patch``)."""
    return type(owner).__bases__[1]


def projection_tensors(owner: nn.Module, form: FFNForm, *names: str) -> list[Tensor | None]:
    """An FFN's weights [out, in], or biases, or both one after the other, in the form's order."""
    if form.kind == "experts":  # which have none of the latter
        own = owner._parameters
        return [
            own[part] if name == "weight" else None for name in names for part in form.projections
        ]
    linears: Any = [owner._modules[linear] for linear in form.projections]
    tensors = [linear._parameters[name] for name in names for linear in linears]
    if not form.transposed:
        return tensors
    return [tensor.t() if tensor is not None and tensor.ndim == 2 else tensor for tensor in tensors]


def weight_by_columns(owner: nn.Module, form: FFNForm) -> Tensor:
    """The weight that has a neuron in a column: that of down, or transposed ones that of the first."""
    if form.kind == "experts":
        down: Any = owner._parameters[form.projections[-1]]
        return down
    linear: Any = owner._modules[form.projections[0 if form.transposed else -1]]
    weight: Tensor = linear._parameters["weight"]
    return weight


def projection_problem(owner: nn.Module, form: FFNForm, sizes: tuple[int, int]) -> str | None:
    """Why the kernels cannot read an FFN's projections; None if they can.

    Args:
        owner: the FFN.
        form: its linear layers.
        sizes: I and H that the clusters are for.
    """
    if form.kind == "experts":
        return experts_problem(owner, form.projections, sizes)
    kinds, rows = set(), form.first_rows(sizes[0])
    for name in form.projections:
        linear = owner._modules.get(name)
        problem = "is not there" if linear is None else weight_problem(linear)
        if problem is not None:
            return f"{name} {problem}"
        assert linear is not None
        weight = linear._parameters["weight"]
        assert weight is not None
        if weight.device.type == "meta":
            return f"{name} has its weights offloaded"
        expected = sizes[::-1] if name == form.projections[-1] else (rows, sizes[1])
        expected = expected[::-1] if form.transposed else expected
        if weight.shape != expected:
            return f"{name} has weights {list(weight.shape)}; the clusters are for {list(expected)}"
        kinds.add((weight.dtype, weight.device))
    return "its projections differ in dtype or device" if len(kinds) > 1 else None


def drops_values(owner: nn.Module, form: FFNForm) -> bool:
    """Whether dropout is at work in an FFN, of which the kernels know nothing."""
    children = owner._modules if form.inline is None else form.inline
    if any(_is_dropping(owner._modules.get(name)) for name in children):
        return True
    return owner.training and any(
        type(value) is float and value > 0 and "drop" in name for name, value in vars(owner).items()
    )


def _is_dropping(module: nn.Module | None) -> bool:
    return isinstance(module, _DropoutNd) and module.training and module.p > 0


def _problem(linear: nn.Module | None) -> str | None:
    return "is not there" if linear is None else weight_problem(linear) or call_problem(linear)


@dataclass(frozen=True, eq=False)
class Seen:
    """An FFN's modules and weights at one moment.

    Attributes:
        owner: the FFN.
        weights: name, module, weight, version (None for tensors made in inference mode, which have
            none), address and bias of each projection.
        biases: of those that have one: bias, version and address.
        others: names and modules of its other children (the activation); of an FFN written out in a
            larger module, of what is called between its projections.
        own: class that the FFN had before it was made sparse.
        forward: of that class.
        held: shares the weights' memory, so that no other tensor gets the same address.
    """

    owner: nn.Module
    weights: tuple[tuple[str, nn.Module, Tensor, int | None, int, Tensor | None], ...]
    biases: tuple[tuple[Tensor, int | None, int], ...]
    others: tuple[tuple[str, nn.Module], ...]
    own: type[nn.Module]
    forward: Callable[..., Tensor]
    held: tuple[Tensor, ...]

    @classmethod
    def of(cls, owner: nn.Module, form: FFNForm, besides: nn.Module) -> Seen | SeenExperts:
        """Look at a sparse FFN: its projections, and all its other modules but ``besides``."""
        if form.kind == "experts":
            return SeenExperts.of(owner, form.projections, besides, own_class(owner))
        modules = owner._modules
        weights, biases = [], []
        for name in form.projections:
            linear = modules[name]
            assert linear is not None
            weight = linear._parameters["weight"]
            assert weight is not None
            bias = linear._parameters["bias"]
            weights.append((name, linear, weight, version_of(weight), weight.data_ptr(), bias))
            if bias is not None:
                biases.append((bias, version_of(bias), bias.data_ptr()))
        others = tuple(
            (name, module)
            for name in (modules if form.inline is None else form.inline)
            if (module := modules.get(name)) is not None
            and name not in form.projections
            and module is not besides
        )
        held = tuple(entry[2].detach() for entry in weights)
        held += tuple(bias.detach() for bias, _, _ in biases)
        own: Any = own_class(owner)
        return cls(owner, tuple(weights), tuple(biases), others, own, own.forward, held)

    def is_current(self) -> bool:
        """Whether all is as it was and a call means no more than the weights say; for every call."""
        modules = self.owner._modules
        for name, linear, weight, version, address, bias in self.weights:
            if (
                modules.get(name) is not linear
                or not is_plain(linear)
                or linear._parameters.get("weight") is not weight
                or linear._parameters.get("bias") is not bias
                or (version is not None and weight._version != version)
                or weight.data_ptr() != address
            ):
                return False
        for bias, version, address in self.biases:
            if (version is not None and bias._version != version) or bias.data_ptr() != address:
                return False
        for name, module in self.others:
            if modules.get(name) is not module or not has_no_hooks(module) or _is_dropping(module):
                return False
        return self.own.forward is self.forward and not has_global_hooks()

    def is_stale(self) -> bool:
        """Whether a weight was written to since, as far as torch knows.

        Writing through ``weight.data`` in place is the one thing that it does not know.
        """
        seen = [(weight, version, address) for _, _, weight, version, address, _ in self.weights]
        return any(
            (version is not None and tensor._version != version) or tensor.data_ptr() != address
            for tensor, version, address in (*seen, *self.biases)
        )

    def change(self) -> str | None:
        """What is no longer what it was, or has hooks; None if nothing is."""
        modules = self.owner._modules
        for name, linear, weight, _, _, bias in self.weights:
            found = modules.get(name)
            if found is not linear or not is_plain(found):
                return f"{name} {_problem(found) or 'has been replaced'}"
            if found._parameters.get("weight") is not weight:
                return f"{name} has another weight than when it was made sparse"
            if found._parameters.get("bias") is not bias:
                return f"{name} has another bias than when it was made sparse"
        for name, module in self.others:
            if modules.get(name) is not module or not has_no_hooks(module):
                return f"{name} has been replaced, or has hooks"
        if self.own.forward is not self.forward:
            return "the forward of its class has been replaced"
        return "hooks are registered for all modules" if has_global_hooks() else None
