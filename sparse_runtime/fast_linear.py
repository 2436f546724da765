"""Linear layers at the memory's speed in calls of few tokens, for what is left of a decode step.

torch reads a bfloat16 weight at 0.3 to 0.7 of the memory's bandwidth when there is one token; the
kernels of the sparse FFN read it at 0.9 and more. Nothing is copied and nothing is skipped: outputs
differ by rounding only. Independent of sparsity, and reported apart from it.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_runtime.errors import NothingMatchedError
from sparse_runtime.kernels import cpu_problem
from sparse_runtime.sparse_ffn import SparseFFN

ModelT = TypeVar("ModelT", bound=nn.Module)
#: Calls of more tokens are left to torch.
MAX_TOKENS = 8


class FastLinear(nn.Linear):
    """A linear layer that runs calls of at most ``MAX_TOKENS`` tokens by the CPU kernels."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features], rounding apart as ``nn.Linear``."""
        num_tokens = input.shape[:-1].numel()
        fits = input.dtype == self.weight.dtype and self.weight.is_contiguous()
        if num_tokens > MAX_TOKENS or not fits:
            return F.linear(input, self.weight, self.bias)
        x = input.reshape(-1, self.in_features)
        output: Tensor = torch.ops.sparse_runtime.cpu_linear(x, self.weight, self.bias)
        return output.reshape(*input.shape[:-1], self.out_features)


def fast_linear(model: ModelT) -> ModelT:
    """Run a model's linear layers, those of its FFNs apart, by the CPU kernels; in place.

    ``sparsify(model, clusters, fast_linear=True)`` does the same. On a dense model this is all there
    is to do; undo it with :func:`slow_linear`.

    Args:
        model: on the CPU, in bfloat16, float16 or float32.

    Returns:
        The same model. Where the kernels cannot run it is left as it was, with a warning.

    Raises:
        NothingMatchedError: the model holds no plain ``nn.Linear`` outside its FFNs.
    """
    weight = next(model.parameters())
    problem = cpu_problem(weight.device, weight.dtype)
    if problem is not None:
        warnings.warn(f"linear layers stay as they are: {problem}", stacklevel=2)
        return model
    found = _linears(model, nn.Linear)
    if not found:
        raise NothingMatchedError(
            f"{type(model).__name__} holds no plain nn.Linear outside its FFNs; quantized and adapted "
            "layers stay as they are"
        )
    for linear in found:
        # Not a wrapper: names, state dict and hooks stay those of the layer.
        linear.__class__ = FastLinear
    return model


def slow_linear(model: ModelT) -> ModelT:
    """Undo :func:`fast_linear`, in place; nothing happens to a model without it."""
    for linear in _linears(model, FastLinear):
        linear.__class__ = nn.Linear
    return model


def _linears(model: nn.Module, kind: type[nn.Linear]) -> list[nn.Linear]:
    inside = {
        id(linear)
        for module in model.modules()
        if isinstance(module, SparseFFN)
        for linear in module.modules()
    }
    return [m for m in model.modules() if type(m) is kind and id(m) not in inside]
