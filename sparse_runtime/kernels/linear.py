"""Linear layers: a fast one, and whether one is what the kernels take it for.

The kernels read a projection's weight past its module. That is right for a plain linear layer with a
plain weight. Whatever else a user puts there (adapters, hooks, parametrizations, quantized or offloaded
weights) means something that only the module itself knows, and the kernels must not run then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from sparse_runtime.kernels.backends import KERNEL_DTYPES

#: Calls of more tokens are left to torch.
MAX_TOKENS = 8
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FastLinear(nn.Linear):
    """A linear layer that runs calls of at most ``MAX_TOKENS`` tokens by the CPU kernels.

    Whatever the kernels are not for (more tokens, gradients, autocast, weights that are no plain CPU
    tensor) runs as ``nn.Linear`` does.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features], rounding apart as ``nn.Linear``."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        if (
            input.shape[:-1].numel() > MAX_TOKENS
            or input.dtype != weight.dtype
            or weight.dtype not in KERNEL_DTYPES
            or type(weight) not in _PLAIN_WEIGHTS
            or weight.device.type != "cpu"
            or not weight.is_contiguous()
            or torch.is_autocast_enabled("cpu")
            or needs_gradient(input, weight, bias)
        ):
            return F.linear(input, weight, bias)
        x = input.reshape(-1, self.in_features)
        output: Tensor = torch.ops.sparse_runtime.cpu_linear(x, weight, bias)
        return output.reshape(*input.shape[:-1], self.out_features)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call with these tensors; the kernels have no backward."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


_PLAIN_CLASSES = (nn.Linear, FastLinear)
_PLAIN_WEIGHTS = (nn.Parameter, Tensor)


def is_plain(linear: nn.Module) -> bool:
    """Whether the class is known and :func:`call_problem` finds nothing; cheap, for every call."""
    state = linear.__dict__
    return (
        linear.__class__ in _PLAIN_CLASSES
        and not state["_forward_hooks"]
        and not state["_forward_pre_hooks"]
        and not state["_backward_hooks"]
        and not state["_backward_pre_hooks"]
        and ("forward" not in state or only_moves_inputs(linear))
    )


def only_moves_inputs(module: nn.Module) -> bool:
    """Whether a forward that stands on a module itself is accelerate's, and offloads nothing.

    ``dispatch_model`` puts one on every module, which only brings the inputs to its device.
    """
    hook = module.__dict__.get("_hf_hook")
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload


def has_global_hooks() -> bool:
    """Whether hooks are registered for all modules of the process."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def weight_problem(linear: nn.Module) -> str | None:
    """Why the kernels cannot read a linear layer's weight in its place; None if they can.

    The answer completes "the gate projection …".
    """
    if linear.__class__ not in _PLAIN_CLASSES:
        kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
        return f"is a {kind}; expected a plain torch.nn.Linear"
    weight = linear._parameters.get("weight")
    if weight is None:
        return "has no parameter named weight (it is parametrized or pruned)"
    if type(weight) not in _PLAIN_WEIGHTS:
        kind = f"{type(weight).__module__}.{type(weight).__qualname__}"
        return f"has a {kind} as its weight; expected a plain parameter"
    if linear._parameters.get("bias") is not None:
        return "has a bias, which the sparse FFN operation does not compute"
    if weight.layout != torch.strided or weight.dtype not in KERNEL_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES)
        found = str(weight.dtype).removeprefix("torch.")
        return f"has {found} weights of layout {weight.layout}; expected strided {names}"
    return None


def call_problem(linear: nn.Module) -> str | None:
    """Why a call of a linear layer is more than its weight says; None if it is not."""
    if "forward" in linear.__dict__ and not only_moves_inputs(linear):
        if hasattr(linear, "_hf_hook"):
            return "has its weights moved by accelerate's hooks"
        return "has had its forward replaced"
    if any(linear.__dict__[hooks] for hooks in _HOOKS):
        return "has hooks"
    return None
