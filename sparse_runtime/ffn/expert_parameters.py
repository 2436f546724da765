"""What experts' parameters were when copies of them were made, and whether they still are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_runtime.kernels.backends import KERNEL_DTYPES
from sparse_runtime.kernels.linear import has_global_hooks, has_no_hooks, version_of


def experts_problem(owner: nn.Module, names: Sequence[str], sizes: tuple[int, int]) -> str | None:
    """Why the kernels cannot read experts' parameters; None if they can.

    Args:
        owner: the experts.
        names: of gate and up in one parameter, and of down.
        sizes: neurons of all experts and H that the clusters are for.
    """
    kinds = set()
    for name in names:
        weight = owner._parameters.get(name)
        if type(weight) is not nn.Parameter:
            return f"{name} is a {type(weight).__name__}; expected a plain parameter"
        if weight.device.type == "meta":
            return f"{name} has its weights offloaded"
        if weight.layout != torch.strided or weight.dtype not in KERNEL_DTYPES:
            return f"{name} has {weight.dtype} weights of layout {weight.layout}"
        kinds.add((weight.dtype, weight.device))
    gate_up, down = (owner._parameters[name] for name in names)
    assert gate_up is not None
    assert down is not None
    found = down.shape[0] * down.shape[2], down.shape[1]
    if found != sizes or gate_up.numel() != 2 * down.numel():
        return f"it has {found[0]} neurons of size {found[1]}; the clusters are for {list(sizes)}"
    if getattr(owner, "_is_expert_parallel", False):
        return "its experts are spread over devices"
    return "its parameters differ in dtype or device" if len(kinds) > 1 else None


@dataclass(frozen=True, eq=False)
class SeenExperts:
    """Experts' parameters and modules at one moment.

    Attributes:
        owner: the experts.
        weights: name, parameter, version (None if it was made in inference mode) and address.
        others: names and modules of its children (the activation).
        own: class that it had before it was made sparse.
        forward: of that class.
        held: shares the parameters' memory, so that no other tensor gets the same address.
    """

    owner: nn.Module
    weights: tuple[tuple[str, Tensor, int | None, int], ...]
    others: tuple[tuple[str, nn.Module], ...]
    own: Any
    forward: Callable[..., Tensor]
    held: tuple[Tensor, ...]

    @classmethod
    def of(
        cls, owner: nn.Module, names: Sequence[str], besides: nn.Module, own: Any
    ) -> SeenExperts:
        """Look at experts: parameters by name, and all children but ``besides``."""
        weights: list[Any] = [owner._parameters[name] for name in names]
        entries = tuple(
            (name, weight, version_of(weight), weight.data_ptr())
            for name, weight in zip(names, weights, strict=True)
        )
        others = tuple(
            (name, child)
            for name, child in owner._modules.items()
            if child is not None and child is not besides
        )
        held = tuple(weight.detach() for weight in weights)
        return cls(owner, entries, others, own, own.forward, held)

    def is_current(self) -> bool:
        """Whether all is as it was and a call means no more than the weights say; for every call."""
        parameters, modules = self.owner._parameters, self.owner._modules
        if self.is_stale():
            return False
        for name, weight, _, _ in self.weights:
            if parameters.get(name) is not weight:
                return False
        for name, module in self.others:
            if modules.get(name) is not module or not has_no_hooks(module):
                return False
        return self.own.forward is self.forward and not has_global_hooks()

    def is_stale(self) -> bool:
        """Whether a weight was written to since, as far as torch knows."""
        return any(
            (version is not None and weight._version != version) or weight.data_ptr() != address
            for _, weight, version, address in self.weights
        )

    def change(self) -> str | None:
        """What is no longer what it was, or has hooks; None if nothing is."""
        for name, weight, _, _ in self.weights:
            if self.owner._parameters.get(name) is not weight:
                return f"{name} is another parameter than when it was made sparse"
        for name, module in self.others:
            if self.owner._modules.get(name) is not module or not has_no_hooks(module):
                return f"{name} has been replaced, or has hooks"
        if self.own.forward is not self.forward:
            return "the forward of its class has been replaced"
        return "hooks are registered for all modules" if has_global_hooks() else None
