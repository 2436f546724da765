"""Weights that accelerate keeps out of memory (``device_map`` with ``disk``), module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparse_runtime.errors import ModelError, UnsupportedArchitectureError
from sparse_runtime.models.ffn_layers import decoder_layers

#: What accelerate leaves on a module that it dispatched; bound to that module.
DISPATCHED = ("forward", "_old_forward", "_hf_hook")


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights somewhere in a module are not in memory."""
    return any(parameter.is_meta for parameter in module.parameters())


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Have all weights of a module in memory inside the context, as if none had been offloaded.

    They are loaded once, where accelerate's own hooks load them in every call, and these hooks do
    not run inside the context: the modules may be patched as any others. Of a module in memory, and of
    one that a context around this one has loaded, nothing changes.

    Args:
        module: a decoder layer, or an FFN.

    Raises:
        ModelError: some weights are nowhere.
    """
    if not is_offloaded(module):
        yield
        return
    loaded: list[tuple[nn.Module, Any]] = []
    try:
        for part in _dispatched(module):
            if any(parameter.is_meta for parameter in part.parameters(recurse=False)):
                loaded.append((part, part.__dict__["_hf_hook"]))
                loaded[-1][1].pre_forward(part)
        if is_offloaded(module):
            name = next(name for name, weight in module.named_parameters() if weight.is_meta)
            raise ModelError(
                f"{name} of a {type(module).__name__} has no values: it is on the meta device, and "
                "accelerate does not know where they are; load the model with from_pretrained"
            )
        with undispatched(module):
            yield
    finally:
        for part, hook in loaded:
            hook.post_forward(part, None)


@contextmanager
def undispatched(module: nn.Module) -> Iterator[None]:
    """Have a module without accelerate's hooks inside the context; nothing is loaded."""
    before: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for part in _dispatched(module):
            state = {n: part.__dict__.pop(n) for n in DISPATCHED if n in part.__dict__}
            before.append((part, state))
            own = state.get("_old_forward")
            if getattr(own, "__func__", None) is not type(part).forward:
                part.__dict__["forward"] = own
        yield
    finally:
        for part, state in before:
            part.__dict__.pop("forward", None)
            part.__dict__.update(state)


def has_values(module: nn.Module) -> bool:
    """Whether a module's weights are in memory, or accelerate knows where they are."""
    return all(
        "_hf_hook" in part.__dict__
        for part in module.modules()
        if any(parameter.is_meta for parameter in part.parameters(recurse=False))
    )


def _dispatched(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if "_hf_hook" in part.__dict__]


def layers_on_disk(model: nn.Module, device: str = "cpu") -> dict[str, str]:
    """A ``device_map`` that leaves a model's decoder layers on the disk, and all else on a device.

    Args:
        model: a causal language model, on the meta device for one.
        device: of what is not in a decoder layer.

    Raises:
        UnsupportedArchitectureError: the model has no list of decoder layers.
    """
    layers = set(decoder_layers(model))
    if not layers:
        raise UnsupportedArchitectureError(
            f"this {type(model).__name__} has no list of decoder layers that could stay on the disk; "
            "load it whole (--no-offload)"
        )
    places: dict[str, str] = {}

    def assign(module: nn.Module, name: str) -> None:
        if module in layers:
            places[name] = "disk"
        elif layers.isdisjoint(module.modules()):
            places[name] = device
        else:
            prefix = f"{name}." if name else ""
            places.update(
                {f"{prefix}{own}": device for own in (*module._parameters, *module._buffers)}
            )
            for child, part in module.named_children():
                assign(part, f"{prefix}{child}")

    assign(model, "")
    return places


def size_in_memory(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that a model's parameters take in a dtype."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
