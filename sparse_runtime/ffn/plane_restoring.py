"""What one call packed, how it is undone, and what transformers is told of what is left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparse_runtime.errors import UnsupportedArchitectureError
from sparse_runtime.ffn.plane_config import PlaneConfig
from sparse_runtime.ffn.plane_modules import PlaneFFN, PlaneLinear, PlaneModule
from sparse_runtime.ffn.plane_places import float_names, restore_floats, tied_weights
from sparse_runtime.ffn.plane_quantizer import PlaneQuantizer
from sparse_runtime.models.int8_linears import is_int8
from sparse_runtime.models.onloading import is_offloaded


@dataclass(eq=False)
class Packing:
    """What one call packed.

    Attributes:
        modules: in planes.
        floats: the module that each of them replaced, with its weights in the CPU's memory or on the
            disk; None where they were let go.
        tying: configs that tied the head to the embedding before.
    """

    modules: list[PlaneModule] = field(default_factory=list)
    floats: list[nn.Module] | None = None
    tying: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, *, keep_float: bool, offloaded: bool = False) -> Packing:
        """A record of packing that is about to happen.

        Args:
            model: to be packed.
            keep_float: keep the float modules.
            offloaded: also those whose weights accelerate has left on the disk, where they stay.

        Raises:
            UnsupportedArchitectureError: float weights are to be kept, and are offloaded or int8.
        """
        if not keep_float:
            return cls()
        for name, module in model.named_modules():
            if is_int8(module):
                raise UnsupportedArchitectureError(
                    f"keep_float keeps float weights, and {name} is int8; leave keep_float out, or "
                    "load the float checkpoint"
                )
        for name, parameter in model.named_parameters():
            if parameter.device.type == "meta" and not offloaded:
                raise UnsupportedArchitectureError(
                    f"keep_float keeps float weights in memory, and {name} is offloaded; leave "
                    "keep_float out (the checkpoint has the weights), or load the model without offload"
                )
        configs = {id(c): c for part in pretrained_parts(model) for c in _configs(part)}
        return cls(floats=[], tying=[c for c in configs.values() if c.tie_word_embeddings])

    def add(self, model: nn.Module, packed: PlaneModule, original: nn.Module) -> None:
        """Note that a module was replaced."""
        self.modules.append(packed)
        if self.floats is None:
            return
        self.floats.append(original)
        away = [p for p in original.parameters() if p.device.type not in ("cpu", "meta")]
        # A bias, or a tied embedding, is still the model's.
        still_used = {id(p) for p in model.parameters()} if away else set()
        for parameter in away:
            if id(parameter) not in still_used:
                parameter.data = parameter.data.cpu()

    def undo(self, model: nn.Module) -> None:
        """Put floats in place of what was packed, as far as it is still in the model.

        The originals where they were kept, on the model's device and in its dtype by now; else the
        packed values.
        """
        fingerprint = getattr(planes_config(model), "fingerprint", None)
        with torch.inference_mode(False), torch.no_grad():
            if self.floats is None:
                restore_floats(model, self.modules)
            else:
                self._give_back(model, self.floats)
        attach(model, described(model, fingerprint))

    def _give_back(self, model: nn.Module, floats: list[nn.Module]) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        for packed, original in zip(self.modules, floats, strict=True):
            if id(packed) not in names:
                continue
            device = next(iter(packed.own_planes().values())).device
            if not is_offloaded(original):
                original.to(device=device, dtype=packed.dtype)
            original.train(packed.training)
            parent, _, attribute = names[id(packed)].rpartition(".")
            setattr(model.get_submodule(parent), attribute, original)
        for config in self.tying:
            config.tie_word_embeddings = True
        if self.tying:
            outermost = pretrained_parts(model)[0]
            outermost.all_tied_weights_keys = tied_weights(outermost)
            outermost.tie_weights()


def still_to_pack(
    model: nn.Module, bits: int | None, linears: int | None
) -> tuple[int | None, int | None]:
    """What of the asked bits of FFNs and of other linear layers the model does not have yet."""
    present = described(model, None)
    if present is None:
        return bits, linears
    return (
        None if bits == present.bits else bits,
        None if linears == present.linear_bits else linears,
    )


def described(model: nn.Module, fingerprint: str | None) -> PlaneConfig | None:
    """The config of what a model holds in planes; None if that is nothing."""
    bits = _bits_of(model, PlaneFFN)
    linear_bits = _bits_of(model, PlaneLinear)
    if bits is None and linear_bits is None:
        return None
    left = float_names(model, ffns=bits is not None, linears=linear_bits is not None)
    return PlaneConfig(bits, linear_bits, left, fingerprint=None if bits is None else fingerprint)


def planes_config(model: nn.Module) -> PlaneConfig | None:
    """The config of a packed model, as it was packed or loaded."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if isinstance(config, PlaneConfig) else None


def attach(model: nn.Module, config: PlaneConfig | None) -> None:
    """Tell transformers what a model is, so that it saves and loads it as that.

    Args:
        model: packed by now, or float again.
        config: of its planes; None if there are none.
    """
    parts = pretrained_parts(model)
    for part in parts:
        for owner, name in (
            (part, "hf_quantizer"),
            (part, "quantization_method"),
            (part, "is_quantized"),
            (part, "is_loaded_in_8bit"),
            (part.config, "quantization_config"),
            (part.config, "_is_quantized"),
        ):
            if name in vars(owner):
                delattr(owner, name)
    if config is None or not parts:
        return
    for part in parts:
        part.config._is_quantized = True
    parts[0].config.quantization_config = config
    parts[0].hf_quantizer = PlaneQuantizer(config, pre_quantized=True)
    parts[0].quantization_method = config.quant_method


def pretrained_parts(model: nn.Module) -> list[Any]:
    """The model and those inside it that are transformers' own, the outermost first."""
    return [m for m in model.modules() if hasattr(m, "get_expanded_tied_weights_keys")]


def _configs(part: Any) -> list[Any]:
    return [part.config, part.config.get_text_config(decoder=True)]


def _bits_of(model: nn.Module, kind: type[PlaneModule]) -> int | None:
    return next((m.format.bits for m in model.modules() if isinstance(m, kind)), None)
