"""Linear layers at the memory's speed in calls of few tokens, for what is left of a decode step.

torch reads a bfloat16 weight at 0.3 to 0.7 of the memory's bandwidth when there is one token; the
kernels of the sparse FFN read it at 0.9 and more. Nothing is copied and nothing is skipped: outputs
differ by rounding only. Independent of sparsity, and reported apart from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from sparse_runtime.errors import NothingMatchedError
from sparse_runtime.ffn.patch import ffn_parts, owners
from sparse_runtime.ffn.plane_modules import PlaneLinear
from sparse_runtime.kernels import cpu_problem
from sparse_runtime.kernels.linear import FastLinear, change_class

ModelT = TypeVar("ModelT", bound=nn.Module)


def fast_linear(model: ModelT, *, bits: int | None = None) -> ModelT:
    """Run a model's linear layers, those of its sparse FFNs apart, by the CPU kernels; in place.

    ``sparsify(model, clusters, fast_linear=True)`` does the same, and ``unsparsify`` undoes that. On a
    dense model this is all there is to do; undo it with :func:`slow_linear`.

    Args:
        model: on the CPU, in bfloat16, float16 or float32.
        bits: also pack attention and head in planes of so many bits: 3, 4, 5, 6, 7 or 8; they run on
            any device then. What ``sparsify(…, linear_weights=…)`` or ``from_pretrained`` has packed in
            these bits is left as it is. A head that is tied to the embedding is packed, and the
            embedding stays. FFNs are for ``sparsify(…, weights=…)`` or ``PlaneConfig``.

    Returns:
        The same model. Where the kernels cannot run it is left as it was, with a warning.

    Raises:
        NothingMatchedError: the model holds no plain ``nn.Linear`` outside its sparse FFNs.
        ConfigError, UnsupportedArchitectureError, ModelError: the linear layers cannot be packed, or
            are packed in other bits.
    """
    if bits is not None:
        _pack(model, bits)
        if next(model.parameters()).device.type != "cpu":
            return model
    swap(slow_linears(model, [part for owner in owners(model) for part in ffn_parts(owner)]))
    return model


def _pack(model: nn.Module, bits: int) -> None:
    # They import transformers, for those who ask for it only.
    from sparse_runtime.ffn.plane_packing import pack_model
    from sparse_runtime.ffn.plane_restoring import Packing, still_to_pack

    if still_to_pack(model, None, bits)[1] is None:
        return
    packing = Packing()
    pack_model(model, None, linears=bits, packing=packing)
    for module in packing.modules:
        assert isinstance(module, PlaneLinear)
        module.by_fast_linear = True


def slow_linears(model: nn.Module, ffns: Iterable[nn.Module]) -> list[nn.Linear]:
    """The linear layers that :func:`fast_linear` would swap: none of those inside ``ffns``.

    Raises:
        NothingMatchedError: there is none.
    """
    weight = next(model.parameters(), None)
    problem = None if weight is None else cpu_problem(weight.device, weight.dtype)
    if problem is not None:
        warnings.warn(f"linear layers stay as they are: {problem}", stacklevel=3)
        return []
    inside = {id(linear) for ffn in ffns for linear in ffn.modules()}
    linears = [m for m in model.modules() if id(m) not in inside]
    found = [m for m in linears if type(m) is nn.Linear]
    if not found and not any(isinstance(m, FastLinear | PlaneLinear) for m in linears):
        raise NothingMatchedError(
            f"{type(model).__name__} holds no plain nn.Linear outside its FFNs; quantized and adapted "
            "layers stay as they are"
        )
    return found


def swap(linears: Iterable[nn.Linear]) -> None:
    """Make linear layers fast. Not wrapped: names, state dict and hooks stay those of the layer."""
    for linear in linears:
        change_class(linear, FastLinear)


def slow_linear(model: ModelT) -> ModelT:
    """Undo :func:`fast_linear`, in place; nothing happens to a model without it.

    Layers that it packed become floats of the packed values, with a warning.
    """
    restore(m for m in model.modules() if type(m) is FastLinear)
    packed = [m for m in model.modules() if isinstance(m, PlaneLinear) and m.by_fast_linear]
    if packed:
        from sparse_runtime.ffn.plane_restoring import Packing

        Packing([*packed]).undo(model)
        warnings.warn(
            "the linear layers' weights are floats of the packed values now; load the model again for "
            "the checkpoint's own",
            stacklevel=2,
        )
    return model


def restore(linears: Iterable[nn.Module]) -> None:
    """Undo :func:`swap` for those that are still fast."""
    for linear in linears:
        if type(linear) is FastLinear:
            change_class(linear, nn.Linear)
