"""Opponents that skip nothing: FFN weights in a format of few bits, all of them read for every token.

Attention and head stay float. The float model is never written to: planes stand in a copy that shares
with it every weight that is not packed, and GGUF's blocks are unpacked by stand-ins for the FFNs'
forwards, a layer at a time.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_runtime.clusters.calibrated_packing import pack_calibrated
from sparse_runtime.cost import FFNCost
from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.quality.forwards import Forward
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.kernels.planes import PlaneFormat
from sparse_runtime.kernels.reference import activations
from sparse_runtime.models.ffn_layer import FFNLayer, layer_cost
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.inline_calls import calling, ffn_module
from sparse_runtime.models.output_head import swapped_forwards
from sparse_runtime.progress import ProgressReporter

#: How weights become planes: each by itself, by E[x²], or with later inputs making up for earlier ones.
ROUNDINGS = ("plain", "mse", "gptq")
#: Bits of the planes that stand as opponents.
DENSE_BITS = (8, 6, 5, 4, 3)
GGUF_NAMES = ("q8_0", "q5_0", "q4_0")
# Weights of a block, and the values that four bits can give it.
_BLOCK, _FOUR_BITS = 32, 16
#: Why a method is left out.
NO_EXPERTS = "it takes models with one FFN in each layer, and this one has experts"


class DenseFormat(Protocol):
    """A format that all FFN weights are stored in."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def weights(self) -> int | None:
        """Bits of the planes; None for other formats."""
        ...

    @property
    def rounding(self) -> str | None:
        """One of ``ROUNDINGS``; None for other formats."""
        ...

    @property
    def needs_text(self) -> bool:
        """Whether it is fitted on calibration text."""
        ...

    def obstacle(self, model: nn.Module) -> str | None:
        """Why a model's weights cannot be stored so; None if they can."""
        ...

    def bits_per_weight(self, model: nn.Module) -> float:
        """Bits read of an FFN per weight of it and token, scales included."""
        ...

    def stored(
        self, model: nn.Module, windows: Tensor | None, *, progress: ProgressReporter | None = None
    ) -> AbstractContextManager[nn.Module]:
        """A model with its FFNs' weights in this format, inside the context.

        Args:
            model: a float causal language model; the same bit for bit afterwards, whatever happens.
            windows: calibration text [W, window] int64, for formats that need it.
            progress: of fitting.

        Raises:
            ConfigError: the format needs text and gets none.
            SparseRuntimeError: as ``pack_model``.
        """
        ...


@dataclass(frozen=True)
class DensePlanes:
    """Planes (``kernels/planes.py``), all neurons with all bits.

    Args:
        bits: as of :meth:`PlaneFormat.of_bits`.
        rounding: one of ``ROUNDINGS``.

    Raises:
        ConfigError: for other bits or another rounding.
    """

    bits: int
    rounding: str = "plain"

    def __post_init__(self) -> None:
        PlaneFormat.of_bits(self.bits)
        if self.rounding not in ROUNDINGS:
            raise ConfigError(
                f"rounding is {self.rounding!r}; expected one of {', '.join(ROUNDINGS)}"
            )

    @property
    def name(self) -> str:
        """``dense-6``, ``dense-6-gptq``."""
        return f"dense-{self.bits}" + ("" if self.rounding == "plain" else f"-{self.rounding}")

    @property
    def weights(self) -> int:
        """The bits."""
        return self.bits

    @property
    def needs_text(self) -> bool:
        """All but plain rounding."""
        return self.rounding != "plain"

    def obstacle(self, model: nn.Module) -> str | None:
        """Planes take rows of any size."""
        return None

    def bits_per_weight(self, model: nn.Module) -> float:
        """See :class:`DenseFormat`; groups that a row does not fill count whole."""
        form = PlaneFormat.of_bits(self.bits)
        return plane_bits(
            [layer_cost(layer, 0, verified=True, form=form) for layer in find_ffn_layers(model)]
        )

    @contextmanager
    def stored(
        self, model: nn.Module, windows: Tensor | None, *, progress: ProgressReporter | None = None
    ) -> Iterator[nn.Module]:
        """See :class:`DenseFormat`: a packed copy, for inference."""
        gc.collect()  # models refer to themselves: an earlier copy would still be in memory
        if not self.needs_text:
            yield pack_model(_sharing_copy(model), self.bits)
            return
        if windows is None:
            raise ConfigError(
                f"{self.name} is fitted on text, and there is none; pass calibration windows, or take "
                f"dense-{self.bits}"
            )
        compensate = self.rounding == "gptq"
        yield pack_calibrated(
            _sharing_copy(model), windows, self.bits, compensate=compensate, progress=progress
        )


@dataclass(frozen=True)
class GgufBlocks:
    """A format of llama.cpp, by the package ``gguf``: rows of gate, up and down in blocks of 32.

    Weights are unpacked to the dtype of the hidden states, as those of planes are.

    Args:
        name: one of ``GGUF_NAMES``.
    """

    name: str
    weights: None = None
    rounding: None = None
    needs_text: bool = False

    def check_installed(self) -> None:
        """Refuse the format where nothing can write it. Raises ConfigError."""
        self._package()

    def obstacle(self, model: nn.Module) -> str | None:
        """Blocks are whole, and the package has to be there."""
        try:
            block, _ = self._sizes()
        except ConfigError as error:
            return str(error)
        for layer in find_ffn_layers(model):
            if layer.experts:
                return NO_EXPERTS
            for size in (layer.hidden_size, layer.intermediate_size):
                if size % block:
                    return f"its blocks hold {block} weights, and rows have {size}"
        return None

    def bits_per_weight(self, model: nn.Module) -> float:
        """See :class:`DenseFormat`."""
        block, size = self._sizes()
        return 8 * size / block

    @contextmanager
    def stored(
        self, model: nn.Module, windows: Tensor | None, *, progress: ProgressReporter | None = None
    ) -> Iterator[nn.Module]:
        """See :class:`DenseFormat`: the model itself, by other forwards of its FFNs."""
        layers = find_ffn_layers(model)
        ffns = [ffn_module(layer) for layer in layers]
        forwards = {ffn: self._forward(layer) for layer, ffn in zip(layers, ffns, strict=True)}
        with calling(layers, ffns), swapped_forwards(forwards):
            yield model

    def _forward(self, layer: FFNLayer) -> Forward:
        gguf = self._package()
        kind = gguf.GGMLQuantizationType[self.name.upper()]
        blocks = [
            gguf.quants.quantize(linear.weight.detach().float().cpu().numpy(), kind)
            for linear in layer.linears().values()
        ]

        def forward(x: Tensor) -> Tensor:
            parts = (torch.from_numpy(gguf.quants.dequantize(p, kind)).to(x) for p in blocks)
            gate, up, down = layer.form.split(*parts)
            h = activations(x, gate, up, layer.activation, *layer.biases)
            return F.linear(h, down, layer.down_bias)

        return forward

    def _sizes(self) -> tuple[int, int]:
        """Weights and bytes of a block."""
        gguf = self._package()
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.name.upper()]]
        return block, size

    def _package(self) -> Any:
        try:
            import gguf
            import gguf.quants
        except ImportError as error:
            raise ConfigError(
                f"baseline {self.name} is written by the package gguf, which cannot be imported "
                f"({error}); pip install gguf, or leave it out"
            ) from error
        return gguf


_PLANES = {rounding: [DensePlanes(bits, rounding) for bits in DENSE_BITS] for rounding in ROUNDINGS}
_GGUF = [GgufBlocks(name) for name in GGUF_NAMES]
#: Name that stands for several formats -> these.
FORMAT_GROUPS: dict[str, Sequence[DenseFormat]] = {
    "dense": _PLANES["plain"],
    "dense-mse": _PLANES["mse"],
    "dense-gptq": _PLANES["gptq"],
    "gguf": _GGUF,
}
#: Name on the command line -> format.
FORMATS: dict[str, DenseFormat] = {
    form.name: form for group in FORMAT_GROUPS.values() for form in group
}


def plane_bits(costs: Sequence[FFNCost]) -> float:
    """Bits of all planes and scales of some FFNs, per weight of these."""
    weights = sum((cost.matrices + 1) * cost.hidden_size * cost.neurons for cost in costs)
    return 8 * sum(cost.whole_bytes for cost in costs) / max(1, weights)


def stored_in_four_bits(model: nn.Module) -> bool:
    """Whether a float model was read out of blocks of four bits, as GGUF's Q4_1 and Q4_K.

    No block of 32 of its first gate projection holds more than 16 values then, which does not happen
    by chance.
    """
    weight = find_ffn_layers(model)[0].gate.weight.detach()
    if weight.shape[1] % _BLOCK:
        return False
    blocks = weight[:256].float().cpu().reshape(-1, _BLOCK).sort(-1).values
    most = int((blocks.diff(dim=-1) != 0).sum(-1).max()) + 1
    return 1 < most <= _FOUR_BITS


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy whose modules can be exchanged, over the same tensors."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared)
