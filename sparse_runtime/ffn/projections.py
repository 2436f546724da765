"""What the projections of an FFN were when copies of them were made, and whether they still are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparse_runtime.kernels.linear import (
    call_problem,
    has_global_hooks,
    is_plain,
    weight_problem,
)


def projection_problem(owner: nn.Module, projections: Sequence[str]) -> str | None:
    """Why the kernels cannot read an FFN's projections; None if they can."""
    kinds = set()
    for name in projections:
        linear = owner._modules.get(name)
        problem = "is not there" if linear is None else weight_problem(linear)
        if problem is not None:
            return f"{name} {problem}"
        assert linear is not None
        weight = linear._parameters["weight"]
        assert weight is not None
        if weight.device.type == "meta":
            return f"{name} has its weights offloaded"
        kinds.add((weight.dtype, weight.device))
    return "its projections differ in dtype or device" if len(kinds) > 1 else None


def _problem(linear: nn.Module | None) -> str | None:
    return "is not there" if linear is None else weight_problem(linear) or call_problem(linear)


@dataclass(frozen=True, eq=False)
class _SeenWeight:
    name: str
    linear: nn.Module
    weight: Tensor
    version: int | None
    address: int

    @classmethod
    def of(cls, name: str, linear: nn.Module, weight: Tensor) -> _SeenWeight:
        # Tensors made in inference mode have no version.
        version = None if weight.is_inference() else weight._version
        return cls(name, linear, weight, version, weight.data_ptr())


@dataclass(frozen=True, eq=False)
class Seen:
    """An FFN's modules and weights at one moment.

    Attributes:
        owner: the FFN.
        weights: of the projections.
        others: its other children (the activation).
    """

    owner: nn.Module
    weights: tuple[_SeenWeight, ...]
    others: tuple[tuple[str, nn.Module], ...]

    @classmethod
    def of(cls, owner: nn.Module, projections: Sequence[str], besides: nn.Module) -> Seen:
        """Look at an FFN: its projections by name, and all children but ``besides``."""
        modules = owner._modules
        weights = []
        for name in projections:
            linear = modules[name]
            assert linear is not None
            weight = linear._parameters["weight"]
            assert weight is not None
            weights.append(_SeenWeight.of(name, linear, weight))
        others = tuple(
            (name, module)
            for name, module in modules.items()
            if module is not None and name not in projections and module is not besides
        )
        return cls(owner, tuple(weights), others)

    @property
    def stale(self) -> bool:
        """Whether a weight was written to since, as far as torch knows.

        Writing through ``weight.data`` in place is the one thing that it does not know.
        """
        for seen in self.weights:
            weight = seen.weight
            if seen.version is not None and weight._version != seen.version:
                return True
            if weight.data_ptr() != seen.address:
                return True
        return False

    def change(self) -> str | None:
        """What is no longer what it was, or has hooks; None if nothing is."""
        modules = self.owner._modules
        for seen in self.weights:
            linear = modules.get(seen.name)
            if linear is not seen.linear or not is_plain(linear):
                return f"{seen.name} {_problem(linear) or 'has been replaced'}"
            if linear._parameters.get("weight") is not seen.weight:
                return f"{seen.name} has another weight than when it was made sparse"
        for name, module in self.others:
            found = modules.get(name)
            if found is not module or found._forward_hooks or found._forward_pre_hooks:
                return f"{name} has been replaced, or has hooks"
        return "hooks are registered for all modules" if has_global_hooks() else None
