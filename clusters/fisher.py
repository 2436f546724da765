"""Diagonal Fisher information of FFN activations, by neuron and by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from sparse_runtime.clusters.buffers import Buffers
from sparse_runtime.clusters.memory import is_out_of_memory
from sparse_runtime.clusters.ranks import Ranks
from sparse_runtime.clusters.sweep import Sweep
from sparse_runtime.cost import element_size
from sparse_runtime.errors import ModelError, SparseRuntimeError
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.output_head import output_head
from sparse_runtime.progress import ProgressReporter, SilentProgress

# A window's sum of squared gradients counts up to so many times the median window's.
_MOST_OF_MEDIAN = 5.0
# Tokens that the layer's usual gradients count for beside an expert's own.
_EXPERT_TOKENS = 32.0
# Above it decoder layers run again in the backward pass.
_KEPT_BYTES = 4 * 2**30


class NoBackwardPassError(SparseRuntimeError):
    """A backward pass over the model cannot run: memory does not suffice, or weights are offloaded."""


@dataclass(frozen=True, eq=False)
class LayerFisher:
    """How much the model's predictions depend on an FFN.

    Attributes:
        neurons: w_i = sqrt(mean_t (∂loss/∂h_i(t))²) [I] float32. Of experts, by what is left of h when
            the router's weight is in it, and over the tokens that have the expert.
        tokens: ‖∂loss/∂y(t)‖² of each token's output [n] float32; NaN where a window is left out.
    """

    neurons: Tensor
    tokens: Tensor


def fisher_weights(
    model: Any,
    windows: Tensor,
    *,
    buffers: Buffers | None = None,
    ranks: Ranks | None = None,
    progress: ProgressReporter | None = None,
) -> list[LayerFisher]:
    """Fisher information of every layer, by one backward pass per window.

    With it, ½·Σ (h_i·w_i)² over the neurons left out estimates the divergence of the predictions, in
    the same unit for all layers: the second-order term, for which labels are drawn from the
    predictions themselves (Martens, New Insights and Perspectives on the Natural Gradient Method, JMLR
    2020, tells them from the text's own labels); the draw depends on the window alone. A window in
    which gradients explode is left out of the mean: one token in 8,192 multiplied the early layers'
    weights by six (docs/LOG.md).

    Parameters get no gradient, and one decoder layer runs at a time (:class:`Sweep`): memory is then
    that of one layer, the windows' hidden states between layers, and one window's logits.

    Args:
        model: a dense causal language model.
        windows: token ids [W, window] int64.
        buffers: for the hidden states; some of 1 GiB and a temporary folder if None.
        ranks: processes that each take a part of the windows; all get the same result.
        progress: reports one unit per window and decoder layer, twice.

    Returns:
        Of each layer, on the CPU.

    Raises:
        NoBackwardPassError: memory does not suffice.
        ModelError: no window has finite gradients.
        UnsupportedArchitectureError, NothingMatchedError: see ``find_ffn_layers``.
    """
    ranks, reporter = ranks or Ranks(), progress or SilentProgress()
    layers = find_ffn_layers(model)
    mine = windows[ranks.rows(len(windows))]

    def watched() -> list[_Gradients]:
        try:
            with without_gradients(model), buffers or Buffers() as own:
                return _watched(model, layers, mine, own, reporter)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            raise NoBackwardPassError(
                f"memory does not suffice for a backward pass ({reason})"
            ) from error

    parts = ranks.together(watched)
    return [
        same[0].joined(same[1:]).fisher(layer.name, model.dtype)
        for layer, same in zip(layers, zip(*parts, strict=True), strict=True)
    ]


def _watched(
    model: Any,
    layers: Sequence[FFNLayer],
    windows: Tensor,
    buffers: Buffers,
    progress: ProgressReporter,
) -> list[_Gradients]:
    """The squared gradients of every layer."""
    watched = [_ExpertGradients(layer) if layer.experts else _Gradients() for layer in layers]
    if not len(windows):
        return watched
    sweep = Sweep(model, windows, buffers)
    owned, head = sweep.owners(layers), output_head(model)

    @contextmanager
    def watching(number: int) -> Iterator[None]:
        handles = []
        for position in owned[number]:
            layer = layers[position]
            module = layer.mlp if layer.experts else [*layer.own_linears().values()][-1]
            handles.append(module.register_forward_hook(watched[position].watch))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def loss(window: int, states: Tensor) -> Tensor:
        logits = head(states).float()
        # Summed, not averaged: each token's own loss, as the Fisher information wants.
        return F.cross_entropy(logits, _drawn(logits, windows[window]), reduction="sum")

    with progress.task("fisher", 2 * sweep.steps) as advance:
        sweep.forward(keep=True, advance=advance)
        sweep.backward(loss, watching, advance=advance)
    return watched


class _Gradients:
    """Squared gradients of one layer, window by window."""

    def __init__(self) -> None:
        self._neurons: list[Tensor] = []
        self._tokens: list[Tensor] = []

    def joined(self, others: Sequence[Any]) -> _Gradients:
        """With those of further windows."""
        for other in others:
            self._neurons += other._neurons
            self._tokens += other._tokens
        return self

    def watch(self, down: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Hook of the layer's down projection."""
        inputs[0].register_hook(
            lambda gradient: self._neurons.append(gradient.float().square().flatten(0, -2).mean(0))
        )
        output.register_hook(self._note_tokens)

    def _note_tokens(self, gradient: Tensor) -> None:
        self._tokens.append(gradient.float().square().sum(-1).flatten())

    def fisher(self, name: str, dtype: torch.dtype) -> LayerFisher:
        """Of all windows with usual gradients. Raises ModelError if none has finite ones."""
        values = torch.stack(self._neurons)
        if not values.sum(-1).isfinite().any():
            raise ModelError(
                f"{name}: the gradients of all {len(values)} windows hold infinities or NaN, computed "
                f"in {dtype}; build in bfloat16 or float32 (--dtype), or with importance 'norm', "
                "loop_weights off and distill 0, which need no gradients"
            )
        kept = usual_windows(values)
        tokens = torch.stack(self._tokens).masked_fill(~kept.unsqueeze(-1), float("nan"))
        return LayerFisher(self._mean_squares(values, kept).sqrt().cpu(), tokens.flatten().cpu())

    def _mean_squares(self, values: Tensor, kept: Tensor) -> Tensor:
        """Over the tokens of the windows that are kept, bool [W], of values [W, I]: [I]."""
        return values[kept].mean(0)


class _ExpertGradients(_Gradients):
    """Of a layer of experts: ∂loss/∂(w·h) of a token is its output's gradient times down's row."""

    def __init__(self, layer: FFNLayer) -> None:
        super().__init__()
        self._layer = layer
        self._lengths = torch.empty(0)
        self._counts: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        # What goes to other processes has no use for the layer.
        return self.__dict__ | {"_layer": None}

    def joined(self, others: Sequence[Any]) -> _Gradients:
        """With those of further windows."""
        for other in others:
            self._counts += other._counts
            self._lengths = self._lengths if self._lengths.numel() else other._lengths
        return super().joined(others)

    def watch(self, down: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Hook of the experts, which are called with hidden states, index and weights."""
        index = inputs[1]
        down = self._layer.weights[-1].detach()  # [E, H, I]
        if not self._lengths.numel():
            self._lengths = down.float().square().sum(1)

        def note(gradient: Tensor) -> None:
            sums = torch.zeros(len(down), down.shape[2], device=gradient.device)
            for expert in index.unique().tolist():
                own = gradient[(index == expert).any(-1)] @ down[expert]
                sums[expert] = own.float().square().sum(0)
            self._neurons.append(sums.flatten())
            self._counts.append(torch.bincount(index.flatten(), minlength=len(sums)))
            self._note_tokens(gradient)

        output.register_hook(note)

    def _mean_squares(self, values: Tensor, kept: Tensor) -> Tensor:
        """Shrunk, of an expert with few tokens, toward the layer's usual for rows of that length."""
        counts = torch.stack(self._counts)[kept].sum(0).float().unsqueeze(-1)
        sums = values[kept].sum(0).view(len(counts), -1)
        lengths = self._lengths
        usual = lengths * (sums.sum() / (counts * lengths).sum().clamp_min(1e-30))
        return ((sums + _EXPERT_TOKENS * usual) / (counts + _EXPERT_TOKENS)).flatten()


def _drawn(logits: Tensor, window: Tensor) -> Tensor:
    """Labels [n] out of what is predicted [n, V]."""
    generator = torch.Generator().manual_seed(int(window.sum()))
    shares = logits.detach().softmax(-1).cpu().nan_to_num(nan=1.0)
    return torch.multinomial(shares, 1, generator=generator).squeeze(-1).to(logits.device)


def usual_windows(values: Tensor) -> Tensor:
    """Windows [W, I] whose sum is not far beyond the median window's, bool [W].

    On text, windows differ by a factor of two or three; one with an exploding gradient by thirty,
    one whose gradients overflow by any.
    """
    totals = values.sum(-1)
    return totals <= _MOST_OF_MEDIAN * totals[totals.isfinite()].median()


@contextmanager
def without_gradients(model: Any) -> Iterator[None]:
    """No parameter of a model needs a gradient inside the context."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        model.requires_grad_(False)
        yield
    finally:
        # By name: offloaded weights that were in memory meanwhile are parameters anew.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)


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
    config = model.config.get_text_config()
    size: int = config.hidden_size
    # Of older types the latter may be missing.
    values = 6 * (getattr(config, "intermediate_size", None) or 4 * size) + 12 * size
    layers: int = config.num_hidden_layers
    return tokens * values * layers * element_size(model.dtype)
