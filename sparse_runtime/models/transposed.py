"""Linear layers by their sizes, those with weights [in, out] (GPT-2's ``Conv1D``) among them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_transposed(module: nn.Module | None) -> bool:
    """Whether a module is transformers' ``Conv1D``, a linear layer with weights [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module maps vectors by a matrix, as ``nn.Linear`` and what stands in for it do."""
    if is_transposed(module):
        return True
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def linear_sizes(linear: nn.Module) -> tuple[int, int]:
    """Sizes of what a linear layer takes and gives."""
    if is_transposed(linear):
        return linear.nx, linear.nf  # type: ignore[return-value]
    return linear.in_features, linear.out_features  # type: ignore[return-value]


class TransposedLinear:
    """A linear layer with weights [in, out], read as ``nn.Linear`` without a copy.

    Attributes:
        linear: the layer.
    """

    def __init__(self, linear: nn.Module) -> None:
        self.linear = linear

    @property
    def in_features(self) -> int:
        """Size of what it takes."""
        return linear_sizes(self.linear)[0]

    @property
    def out_features(self) -> int:
        """Size of what it gives."""
        return linear_sizes(self.linear)[1]

    @property
    def weight(self) -> Tensor:
        """[out, in], a view."""
        weight: Any = self.linear.weight
        rows: Tensor = weight.t()
        return rows

    @property
    def bias(self) -> Tensor | None:
        """[out]."""
        return self.linear.bias  # type: ignore[return-value]

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        output: Tensor = self.linear(x)
        return output


def with_rows(linear: Any) -> Any:
    """A linear layer, or one in its place whose weights are [out, in]."""
    return TransposedLinear(linear) if is_transposed(linear) else linear
