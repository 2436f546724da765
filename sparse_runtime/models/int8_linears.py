"""Linear layers of int8 rows with scales, and the float weights that they stand for.

torchao's ``Int8Tensor`` (an ``nn.Linear`` with such a weight) and bitsandbytes' ``Linear8bitLt``. Both
are told by their names and attributes: neither package is needed here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Largest code of bitsandbytes' rows, which their scales are the largest value of.
_LARGEST_CODE = 127


def is_int8(linear: nn.Module) -> bool:
    """Whether a module is one of the two."""
    return _is_bitsandbytes(linear) or _is_torchao(linear)


def int8_problem(linear: nn.Module) -> str | None:
    """Why the weights of an int8 linear layer cannot be read; None if they can.

    The answer completes "the gate projection …".
    """
    weight: Any = linear._parameters["weight"]
    if _is_bitsandbytes(linear):
        if weight.dtype != torch.int8:
            return (
                f"is a {type(linear).__qualname__} whose weight is {weight.dtype}; expected int8: move "
                "the model to its device, which is when bitsandbytes rounds it"
            )
        if _row_maxima(linear) is None:
            return (
                f"is a {type(linear).__qualname__} without SCB; expected each row's largest value"
            )
        return None
    if getattr(weight, "act_pre_scale", None) is not None:
        return "has an Int8Tensor with act_pre_scale, by which inputs are scaled; expected none"
    if weight.qdata.dtype != torch.int8 or weight.qdata.ndim != 2:
        found = f"{weight.qdata.dtype} {list(weight.qdata.shape)}"
        return f"has an Int8Tensor of {found}; expected int8 [N, K]"
    return None


def float_linear(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """A plain linear layer of the values of an int8 one, of which it has the bias.

    Args:
        linear: int8 [N, K], without a problem.
        dtype: of the weights.
    """
    weight: Any = linear.weight
    if _is_bitsandbytes(linear):
        scales = _row_maxima(linear)
        assert scales is not None
        values = weight.data.float() * (scales.float() / _LARGEST_CODE)[:, None]
    else:
        values = _blocks(weight)
    result = nn.utils.skip_init(
        *(nn.Linear, linear.in_features, linear.out_features),
        bias=False,
        dtype=dtype,
        device=values.device,
    )
    result.weight = nn.Parameter(values.to(dtype), requires_grad=False)
    result.bias = linear.bias
    return result.train(linear.training)


def _blocks(weight: Any) -> Tensor:
    """Values [N, K] float32 of an Int8Tensor: each block of codes has one scale and zero point."""
    (rows, columns), codes = weight.block_size, weight.qdata.float()
    shape = (codes.shape[0] // rows, 1, codes.shape[1] // columns, 1)
    blocks = codes.view(shape[0], rows, shape[2], columns)
    if getattr(weight, "zero_point", None) is not None:
        blocks = blocks - weight.zero_point.float().reshape(shape)
    return (blocks * weight.scale.float().reshape(shape)).view(codes.shape)


def _row_maxima(linear: Any) -> Tensor | None:
    found = getattr(linear.weight, "SCB", None)
    return getattr(getattr(linear, "state", None), "SCB", None) if found is None else found


def _is_bitsandbytes(linear: nn.Module) -> bool:
    return isinstance(linear, nn.Linear) and type(linear).__name__ == "Linear8bitLt"


def _is_torchao(linear: nn.Module) -> bool:
    weight = linear._parameters.get("weight")
    return (
        type(linear) is nn.Linear
        and type(weight).__name__ == "Int8Tensor"
        and all(hasattr(weight, name) for name in ("qdata", "scale", "block_size"))
    )
