"""Packing a model's weights into planes in place, and unpacking them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import nn

from sparse_runtime.errors import ConfigError, UnsupportedArchitectureError
from sparse_runtime.ffn.plane_config import PlaneConfig
from sparse_runtime.ffn.plane_experts import packed_kind
from sparse_runtime.ffn.plane_modules import PlaneFFN, PlaneLinear
from sparse_runtime.ffn.plane_places import (
    LinearPlace,
    Places,
    check_ffn_finite,
    check_finite,
    opened,
    opened_ffn,
    restore_floats,
    untie,
)
from sparse_runtime.ffn.plane_restoring import Packing, attach, described, planes_config
from sparse_runtime.kernels.planes import PlaneFormat
from sparse_runtime.kernels.rounding import InputStatistics
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.fingerprint import kept_fingerprint
from sparse_runtime.models.onloading import has_values, is_offloaded, onloaded

ModelT = TypeVar("ModelT", bound=nn.Module)


class Statistics(Protocol):
    """Gives the statistics that modules are rounded by, each just before it is packed."""

    def expect(self, inputs: Mapping[str, tuple[nn.Module, ...]]) -> None:
        """Hear what will be packed, in this order.

        Args:
            inputs: a module's name -> modules whose inputs its rounding depends on: of an FFN itself
                and its down projection, of a linear layer itself.
        """

    def take(self, name: str) -> Sequence[InputStatistics | None]:
        """Statistics of the inputs of what was named for a module; all before it are packed by now."""


def pack_model(
    model: ModelT,
    bits: int | PlaneFormat | None = 6,
    *,
    linears: int | PlaneFormat | None = None,
    modules_to_not_convert: Sequence[str] = (),
    statistics: Statistics | None = None,
    packing: Packing | None = None,
) -> ModelT:
    """Pack the weights of a model's FFNs into planes, in place; of attention and head too, if asked.

    All is checked first, so that an error leaves the model as it was. Then one module after another is
    packed and its float weights are let go. The model is for inference from then on;
    ``save_pretrained`` writes the planes and ``from_pretrained`` reads them. With calibration text,
    :func:`sparse_runtime.clusters.pack_calibrated` rounds better.

    Args:
        model: a causal language model; what is to be packed is float. It may be sparse where the FFNs
            are not to be packed. FFNs that accelerate has left on the disk are loaded one at a time,
            and checked then; their planes stay in memory.
        bits: of the FFNs' weights, or their format; None leaves them in float.
        linears: bits of attention and head, or their format; None leaves them in float. A head that is
            tied to the embedding is packed from the same values, and the embedding stays.
        modules_to_not_convert: see :class:`PlaneConfig`.
        statistics: of the modules' inputs; plain rounding if None.
        packing: takes note of what is packed, for it to be undone.

    Returns:
        The same model.

    Raises:
        ConfigError: the bits are unknown or both None.
        AlreadySparseError: the FFNs to pack are sparse.
        UnsupportedArchitectureError: what is to be packed is so already, or quantized or of an unknown
            type, or a module is more than its weights (adapters, hooks, parametrizations), or attention
            and head are offloaded.
        NothingMatchedError: a name in ``modules_to_not_convert`` is that of no module.
        ModelError: weights are NaN or infinite; the message names the matrix.
    """
    config = PlaneConfig(
        _bits("bits", bits),
        _bits("linears", linears),
        list(modules_to_not_convert),
    )
    places = config.places(model)
    # That int8 layers compute in.
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    _check_present(places)
    check_finite(places)
    packing = Packing() if packing is None else packing
    before = planes_config(model)
    if places.ffns:
        config.fingerprint = kept_fingerprint(find_ffn_layers(model, packed=True, int8=True))
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    waiting: list[FFNLayer | LinearPlace] = [*places.ffns, *places.linears]
    waiting.sort(key=lambda place: order[place.name], reverse=True)
    if statistics is not None:
        statistics.expect({place.name: _inputs(place) for place in reversed(waiting)})
    with torch.inference_mode(False), torch.no_grad():  # what is made here outlives the caller's
        untie(model, places.linears)
        # Popped, so that nothing here holds a module's floats once it is packed.
        places.ffns.clear()
        places.linears.clear()
        while waiting:
            place = waiting.pop()
            given = () if statistics is None else statistics.take(place.name)
            packed = _packed(place, config, given, dtype)
            setattr(place.parent, place.attribute, packed)
            packing.add(model, packed, place.mlp if isinstance(place, FFNLayer) else place.linear)
            del place
    if before is not None:
        config = described(model, before.fingerprint or config.fingerprint) or config
    attach(model, config)
    return model


def _packed(
    place: FFNLayer | LinearPlace,
    config: PlaneConfig,
    statistics: Sequence[InputStatistics | None],
    dtype: torch.dtype,
) -> PlaneFFN | PlaneLinear:
    """A module in planes; an FFN from the disk has not been checked yet. int8 rows become ``dtype``."""
    if isinstance(place, LinearPlace):
        assert config.linear_format is not None
        return PlaneLinear.from_linear(
            opened(place.linear, dtype), config.linear_format, *statistics
        )
    assert config.format is not None
    unchecked = is_offloaded(place.holder)
    with onloaded(place.holder):
        if unchecked:
            check_ffn_finite(place)
        return packed_kind(place).from_mlp(opened_ffn(place), config.format, *statistics)


def unpack_model(model: ModelT) -> ModelT:
    """Make a packed model a float one of the packed values, in place.

    A head that was tied to the embedding has values of its own now, and stays untied.

    Raises:
        AlreadySparseError: the model is sparse.
        NothingMatchedError: it holds no packed weights.
    """
    with torch.inference_mode(False), torch.no_grad():
        restore_floats(model)
    attach(model, None)
    return model


def _bits(name: str, value: int | PlaneFormat | None) -> int | None:
    if not isinstance(value, PlaneFormat):
        return value
    try:
        if PlaneFormat.of_bits(value.bits) == value:
            return value.bits
    except ConfigError:
        pass
    raise ConfigError(
        f"{name} is the format {value}, which has no number of bits that a config.json could name; "
        "expected one of PlaneFormat.of_bits"
    )


def _check_present(places: Places) -> None:
    """That FFNs' weights can be had, and what is packed beside FFNs is in memory."""
    for layer in places.ffns:
        if not has_values(layer.holder):
            raise UnsupportedArchitectureError(
                f"{layer.name} has weights offloaded by others than accelerate, or none yet; load the "
                "model with quantization_config=PlaneConfig(...), which packs weights as they are read"
            )
    for place in places.linears:
        if place.linear.weight.device.type == "meta":
            raise UnsupportedArchitectureError(
                f"{place.name} has its weights offloaded, or none yet; load the model with "
                "quantization_config=PlaneConfig(...), which packs weights as they are read, or pack "
                "its FFNs alone (linears=None)"
            )


def _inputs(place: FFNLayer | LinearPlace) -> tuple[nn.Module, ...]:
    if isinstance(place, FFNLayer) and place.experts:
        return (place.mlp,)  # what goes into down is in no module
    if isinstance(place, FFNLayer):
        return place.mlp, [*place.own_linears().values()][-1]
    return (place.linear,)
