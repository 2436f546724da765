"""Linear layers: a fast one, and whether one is what the kernels take it for.

The kernels read a projection's weight past its module. That is right for a plain linear layer with a
plain weight. Whatever else a user puts there (adapters, hooks, parametrizations, quantized or offloaded
weights) means something that only the module itself knows, and the kernels must not run then.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
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
    """Whether a derivative of a call with these tensors is asked for; the kernels have none."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return is_transformed()


def is_transformed() -> bool:
    """Whether forward-mode AD or a transform of ``torch.func`` is at work; grad mode says neither."""
    # Both have no public question; torch.compile traces the first and never runs inside the second.
    if forward_ad._current_level >= 0:
        return True
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether gradient checkpointing runs a layer without gradients now, and later with them."""
    return layer.training and getattr(layer, "gradient_checkpointing", False)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether F.linear of an input would compute in the weight's dtype, on its device."""
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == weight.dtype and x.device == weight.device
    return x.dtype == weight.dtype and x.device == weight.device


# Others join them once they are proven.
_PLAIN_CLASSES = {nn.Linear, FastLinear}
_PLAIN_WEIGHTS = (nn.Parameter, Tensor)


def is_plain(linear: nn.Module) -> bool:
    """Whether the class is known and :func:`call_problem` finds nothing; cheap, for every call."""
    return linear.__class__ in _PLAIN_CLASSES and has_no_hooks(linear)


def has_no_hooks(module: nn.Module) -> bool:
    """Whether a call of a module runs its class's forward and nothing else."""
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or ("forward" in state and not runs_own_forward(module))
    )


def runs_own_forward(module: nn.Module) -> bool:
    """Whether a forward that stands on a module itself, if any, is its class's all the same.

    accelerate's ``dispatch_model`` puts one on every module; where nothing is offloaded it only
    brings the inputs to the module's device, and removed it leaves the class's own bound there.
    """
    state = module.__dict__
    forward = state.get("forward")
    if forward is None or _is_own(module, forward):
        return True
    hook: Any = state.get("_hf_hook")
    return (
        type(hook).__name__ == "AlignDevicesHook"
        and not hook.offload
        and isinstance(forward, functools.partial)
        and forward.func.__module__ == "accelerate.hooks"
        and _is_own(module, state.get("_old_forward"))
    )


def _is_own(module: nn.Module, forward: Any) -> bool:
    """Whether a function is the forward of a module's class, bound to it."""
    return (
        getattr(forward, "__self__", None) is module
        and getattr(forward, "__func__", None) is type(module).forward
    )


def change_class(module: nn.Module, to: type[nn.Module]) -> None:
    """Give a module another class; a bound forward of the old one becomes one of the new."""
    state = module.__dict__
    bound = [key for key in ("forward", "_old_forward") if _is_own(module, state.get(key))]
    module.__class__ = to
    state.update({key: to.forward.__get__(module) for key in bound})


def version_of(weight: Tensor) -> int | None:
    """How often a tensor was written to; None for one made in inference mode, which does not count."""
    return None if weight.is_inference() else weight._version


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
    if linear.__class__ not in _PLAIN_CLASSES and not _is_linear_class(_class_of(linear)):
        kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
        return f"is a {kind}; expected a plain torch.nn.Linear"
    weight = linear._parameters.get("weight")
    if weight is None:
        return "has no parameter named weight (it is parametrized or pruned)"
    if type(weight) not in _PLAIN_WEIGHTS:
        kind = f"{type(weight).__module__}.{type(weight).__qualname__}"
        return f"has a {kind} as its weight; expected a plain parameter"
    bias = linear._parameters.get("bias")
    if bias is not None and (type(bias) not in _PLAIN_WEIGHTS or bias.dtype != weight.dtype):
        found = f"{type(bias).__qualname__} of {bias.dtype}"
        return f"has a {found} as its bias; expected a plain parameter of the weight's dtype"
    if weight.layout != torch.strided or weight.dtype not in KERNEL_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES)
        found = str(weight.dtype).removeprefix("torch.")
        return f"has {found} weights of layout {weight.layout}; expected strided {names}"
    return None


def _class_of(module: nn.Module) -> Any:
    return module.__class__


@functools.cache
def _is_linear_class(kind: Any) -> bool:
    """Whether a subclass of transformers, such as Falcon's, computes the same; a few numbers tell.

    Its ``Conv1D`` does with its weight transposed. Those of others stay what they are called: they may
    hold more than a weight.
    """
    transposed = kind.__name__ == "Conv1D"
    if not kind.__module__.startswith("transformers.") or not (
        transposed or issubclass(kind, nn.Linear)
    ):
        return False
    probe = kind.__new__(kind)
    try:
        if transposed:
            kind.__init__(probe, 4, 6)
        else:
            nn.Linear.__init__(probe, 6, 4)
        x = torch.linspace(-2, 2, 18).reshape(1, 3, 6)
        with torch.no_grad():
            found = kind.forward(probe, x)
            weight = probe.weight.t() if transposed else probe.weight
            same = torch.allclose(found, F.linear(x, weight, probe.bias), atol=1e-6)
    except Exception:
        return False
    if same:
        _PLAIN_CLASSES.add(kind)
    return same


def call_problem(linear: nn.Module) -> str | None:
    """Why a call of a linear layer is more than its weight says; None if it is not."""
    if not runs_own_forward(linear):
        if getattr(linear.__dict__.get("_hf_hook"), "offload", False):
            return "has its weights moved by accelerate's hooks"
        return "has had its forward replaced"
    if any(linear.__dict__[hooks] for hooks in _HOOKS):
        return "has hooks"
    return None
