"""Packing a model into planes with statistics of its layers' inputs, one decoder layer at a time.

Each layer is rounded by what it sees in the packed model: its inputs are those that the packed layers
before it compute. Held in memory are one hidden state per calibration token, and second moments of one
layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparse_runtime.clusters.buffers import Buffers
from sparse_runtime.clusters.capture import not_finite
from sparse_runtime.clusters.sweep import Sweep
from sparse_runtime.errors import ConfigError, UnsupportedArchitectureError
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.ffn.plane_restoring import Packing
from sparse_runtime.kernels.planes import PlaneFormat
from sparse_runtime.kernels.rounding import InputStatistics
from sparse_runtime.models.ffn_layers import decoder_layers
from sparse_runtime.progress import Advance, ProgressReporter, SilentProgress

ModelT = TypeVar("ModelT", bound=nn.Module)


def pack_calibrated(
    model: ModelT,
    windows: Tensor,
    bits: int | PlaneFormat | None = 6,
    *,
    linears: int | PlaneFormat | None = None,
    modules_to_not_convert: Sequence[str] = (),
    compensate: bool = True,
    packing: Packing | None = None,
    progress: ProgressReporter | None = None,
) -> ModelT:
    """Pack a model's weights into planes in place, rounded by statistics of their inputs over text.

    An interrupted or failed call after the checks leaves a model that is packed in part: load it again.

    Args:
        model: a float causal language model. Its FFNs, and only these, may be packed while decoder
            layers are on the disk (accelerate's offload), one of which is in memory at a time.
        windows: token ids of calibration text [W, window] int64.
        bits, linears, modules_to_not_convert, packing: as of
            :func:`sparse_runtime.ffn.plane_packing.pack_model`.
        compensate: measure E[x xᵀ] and let later inputs make up for the rounding of earlier ones
            (GPTQ, arXiv 2210.17323), which takes three float32 [K, K] and about 2·K operations a weight
            for K inputs; else E[x²] chooses scales and codes.
        progress: reports one unit per window and decoder layer, and those of the head.

    Returns:
        The same model.

    Raises:
        ConfigError: there is no window.
        ModelError: hidden states are not finite.
        SparseRuntimeError: as ``pack_model``.
    """
    if windows.ndim != 2 or not windows.numel():
        raise ConfigError(
            f"calibration windows are {list(windows.shape)}; expected [W, window] with one at least"
        )
    layers = decoder_layers(model)
    total = (len(layers) + (linears is not None)) * len(windows)
    with Buffers() as buffers, (progress or SilentProgress()).task("pack", total) as advance:
        return pack_model(
            model,
            bits,
            linears=linears,
            modules_to_not_convert=modules_to_not_convert,
            statistics=_ByLayer(model, layers, windows, compensate, buffers, advance),
            packing=packing,
        )


class _ByLayer:
    """Measures a layer when its first module is to be packed, and what is outside of layers last."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[nn.Module],
        windows: Tensor,
        full: bool,
        buffers: Buffers,
        advance: Advance,
    ) -> None:
        self._buffers = buffers
        self._model, self._layers, self._windows = model, layers, windows
        self._full, self._advance = full, advance
        self._groups: list[dict[str, tuple[nn.Module, ...]]] = []
        self._measures: dict[str, list[_Measure]] = {}
        self._sweep: Sweep | None = None

    def expect(self, inputs: Mapping[str, tuple[nn.Module, ...]]) -> None:
        """See :class:`sparse_runtime.ffn.plane_packing.Statistics`."""
        owners = {id(m): n for n, layer in enumerate(self._layers) for m in layer.modules()}
        self._groups = [{} for _ in range(len(self._layers) + 1)]
        for name, modules in inputs.items():
            self._groups[owners.get(id(modules[0]), len(self._layers))][name] = modules

    def take(self, name: str) -> list[InputStatistics | None]:
        """See :class:`sparse_runtime.ffn.plane_packing.Statistics`."""
        with torch.inference_mode():
            if self._sweep is None:
                self._sweep = _sweep(self._model, self._windows, self._buffers)
            while name not in self._measures:
                self._measure_next(self._sweep)
            return [measure.statistics() for measure in self._measures.pop(name)]

    def _measure_next(self, sweep: Sweep) -> None:
        number, windows = len(self._layers) + 1 - len(self._groups), range(len(self._windows))
        if number > 0:
            with sweep.entered(number - 1):
                for window in windows:
                    sweep.step(number - 1, window)
        group = self._groups.pop(0)
        layer = group and number < len(self._layers)
        entered = sweep.entered(number) if layer else nullcontext()
        with _measured(self._model, group, self._full) as self._measures, entered:
            for window in windows:
                if layer:
                    sweep.run(number, window)
                elif group:
                    self._finish(sweep, window)
                self._advance(1)

    def _finish(self, sweep: Sweep, window: int) -> None:
        """Run what comes after the layers, up to the output head's input."""
        head = self._model.get_output_embeddings()
        handle = head.register_forward_pre_hook(_stop)
        try:
            with suppress(_Stop):
                head(sweep.final(window))
        finally:
            handle.remove()


def _sweep(model: Any, windows: Tensor, buffers: Buffers) -> Sweep:
    sweep = Sweep(model, windows, buffers)
    if sweep.whole:
        raise UnsupportedArchitectureError(
            f"the decoder of this {type(model).__name__} is more than the sequence of its layers, so "
            "that calibration text cannot go one layer at a time; pack it without calibration text"
        )
    return sweep


class _Measure:
    """Sum of x² or x xᵀ over tokens."""

    def __init__(self, full: bool) -> None:
        self._full = full
        self._tokens = 0
        self._total: Tensor | None = None
        self._made: InputStatistics | None = None

    def add(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if self._total is None:
            shape = (rows.shape[1],) * (2 if self._full else 1)
            self._total = rows.new_zeros(shape)
        if self._full:
            self._total.addmm_(rows.T, rows)
        else:
            self._total += rows.square().sum(0)
        self._tokens += len(rows)

    def statistics(self) -> InputStatistics | None:
        """None where no token came."""
        if self._total is not None:
            total, self._total = self._total, None
            self._made = InputStatistics.of(total.div_(self._tokens))
        return self._made


@contextmanager
def _measured(
    model: Any, inputs: Mapping[str, tuple[nn.Module, ...]], full: bool
) -> Iterator[dict[str, list[_Measure]]]:
    """Inside, measure the inputs of modules; those of one input share its measure."""
    measures = {name: [_Measure(full) for _ in modules] for name, modules in inputs.items()}
    latest: list[tuple[Tensor, _Measure]] = []

    def hook(name: str, part: int) -> Any:
        def measure(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0]
            if latest and latest[0][0] is x:  # of q, k and v
                measures[name][part] = latest[0][1]
                return
            if not x.isfinite().all():
                raise not_finite(model, f"the input of {name}")
            measures[name][part].add(x)
            latest[:] = [(x, measures[name][part])]

        return measure

    handles = [
        module.register_forward_pre_hook(hook(name, part))
        for name, modules in inputs.items()
        for part, module in enumerate(modules)
    ]
    try:
        yield measures
    finally:
        for handle in handles:
            handle.remove()


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


def _stop(*_: Any) -> None:
    raise _Stop
