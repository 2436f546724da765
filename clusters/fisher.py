"""Diagonal empirical Fisher information of FFN activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from sparse_runtime.cost import element_size
from sparse_runtime.errors import ModelError, SparseRuntimeError
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.progress import ProgressReporter, SilentProgress

# A window's sum of squared gradients counts up to so many times the median window's.
_MOST_OF_MEDIAN = 5.0
# Above it decoder layers run again in the backward pass.
_KEPT_BYTES = 4 * 2**30


class NoBackwardPassError(SparseRuntimeError):
    """A backward pass over the model cannot run: memory does not suffice, or weights are offloaded."""


def fisher_weights(
    model: Any, windows: Tensor, *, progress: ProgressReporter | None = None
) -> list[Tensor]:
    """w_i = sqrt(mean_t (∂loss/∂h_i(t))²) of every neuron, by one backward pass per window.

    With it, ½·Σ (h_i·w_i)² over the neurons left out estimates the rise of a token's loss, in the same
    unit for all layers (the second-order term with the empirical Fisher as curvature; LeCun et al.,
    Optimal Brain Damage, 1989). A window in which gradients explode is left out of the mean: one
    token in 8,192 multiplied the early layers' weights by six (docs/LOG.md).

    Parameters get no gradient, and decoder layers are checkpointed where a window's activations are
    large (see :func:`checkpointed`): memory is then those of one layer, and the hidden states between
    layers.

    Args:
        model: a dense causal language model.
        windows: token ids [W, window] int64.
        progress: reports one unit per window.

    Returns:
        Per layer, weights [I] float32 on the CPU.

    Raises:
        NoBackwardPassError: memory does not suffice, or weights are offloaded.
        ModelError: no window has finite gradients.
    """
    layers = find_ffn_layers(model)
    offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if offloaded:
        raise NoBackwardPassError(f"weights are offloaded, {offloaded[0]} among them")
    means: list[list[Tensor]] = [[] for _ in layers]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [model.get_input_embeddings().register_forward_hook(_require_grad)]

    def watch(position: int) -> Any:
        def hook(module: Any, arguments: tuple[Tensor, ...]) -> None:
            def add(gradient: Tensor) -> None:
                means[position].append(gradient.float().square().flatten(0, -2).mean(0))

            arguments[0].register_hook(add)

        return hook

    for position, layer in enumerate(layers):
        handles.append(layer.down.register_forward_pre_hook(watch(position)))
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with (
            checkpointed(model, windows.shape[1]),
            (progress or SilentProgress()).task("fisher", len(windows)) as advance,
        ):
            for row in windows.split(1):
                ids = row.to(model.device)
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                # Summed, not averaged: each token's own loss, as the empirical Fisher wants.
                torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
                advance(1)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise NoBackwardPassError(
            f"memory does not suffice for a backward pass ({reason})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return [
        _weights(torch.stack(of_windows), layer.name, model.dtype)
        for layer, of_windows in zip(layers, means, strict=True)
    ]


def _weights(values: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """w [I] of a layer from its windows' mean squared gradients [W, I]."""
    if not values.sum(-1).isfinite().any():
        raise ModelError(
            f"{name}: the gradients of all {len(values)} windows hold infinities or NaN, computed in "
            f"{dtype}; build in bfloat16 or float32 (--dtype), or with importance 'norm', "
            "loop_weights off and distill 0, which need no gradients"
        )
    return robust_mean(values).sqrt().cpu()


def _out_of_memory(error: BaseException) -> bool:
    # On a CPU torch has no error type of its own for it.
    words = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "DefaultCPUAllocator" in words or "not enough memory" in words
    )


def robust_mean(values: Tensor) -> Tensor:
    """Mean over windows [W, I] without those whose sum is far beyond the median window's: [I].

    On text, windows differ by a factor of two or three; one with an exploding gradient by thirty,
    one whose gradients overflow by any.
    """
    values = values[values.sum(-1).isfinite()]
    totals = values.sum(-1)
    return values[totals <= _MOST_OF_MEDIAN * totals.median()].mean(0)


@contextmanager
def checkpointed(model: Any, tokens: int) -> Iterator[None]:
    """Run decoder layers again in the backward pass where keeping their activations takes over 4 GiB.

    transformers checkpoints in training mode only, and its own switch leaves a hook on the embeddings.
    So the flags are set on the decoder layers alone; what is inside stays in eval mode.

    Args:
        model: whose backward passes run inside the context.
        tokens: of one backward pass.
    """
    if _kept_bytes(model, tokens) <= _KEPT_BYTES:
        yield
        return
    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    names = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")
    before = [[getattr(layer, name, None) for name in names] for layer in layers]
    try:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(layer, name, value)


def _kept_bytes(model: Any, tokens: int) -> int:
    """About what a backward pass over so many tokens keeps of the forward pass."""
    config = model.config
    values: int = 6 * config.intermediate_size + 12 * config.hidden_size
    return tokens * values * config.num_hidden_layers * element_size(model.dtype)


def _require_grad(module: Any, arguments: Any, output: Tensor) -> Tensor:
    return output.requires_grad_(True)
