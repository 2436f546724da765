"""transformers' side of packed weights: packing while a model is loaded, and loading packed models.

``from_pretrained(name, quantization_config=PlaneConfig(bits=6))`` reads one FFN's or one linear
layer's weights at a time and keeps their planes. Importing this module registers the two under
``planes``, so that ``from_pretrained`` of a packed folder finds them (``ffn/plane_registration.py``).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from sparse_runtime.errors import ModelError, UnsupportedArchitectureError
from sparse_runtime.ffn.plane_checkpoint import (
    check_float_files,
    check_packed_files,
    release_pages,
)
from sparse_runtime.ffn.plane_config import METHOD, PlaneConfig, check_same
from sparse_runtime.ffn.plane_experts import packed_kind
from sparse_runtime.ffn.plane_modules import BIASES, PlaneFFN, PlaneLinear, PlaneModule
from sparse_runtime.ffn.plane_places import (
    LinearPlace,
    refuse_infinite,
    restore_floats,
    tied_weights,
    untie,
)
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.fingerprint import first_matrices, kept_fingerprint, kept_samples

# Bytes of weights read, after which their pages are let go; asking takes some milliseconds.
_RELEASED_AT = 1 << 25


# Here and not on the class, whose module must not import a table that imports this one when filled.
register_quantization_config(METHOD)(PlaneConfig)


@register_quantizer(METHOD)
class PlaneQuantizer(HfQuantizer):
    """Puts packed modules into a model that is being loaded, and packs its weights as they come."""

    requires_calibration = False
    quantization_config: PlaneConfig

    def __init__(self, quantization_config: PlaneConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._conversions: list[Any] = []
        self._late: list[LinearPlace] = []
        self._waiting: dict[str, tuple[str, ...]] = {}
        self._problem: ModelError | None = None
        self._files: list[str] = []
        self._unreleased = 0
        self._positions: dict[str, int] = {}
        self._samples: dict[str, Tensor] = {}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        with torch.device("cpu"):  # around us new tensors have no values
            places = config.places(model, saved=self.pre_quantized)
            layers = find_ffn_layers(model)
        self._positions = dict(
            zip((layer.name for layer in layers), first_matrices(layers), strict=False)
        )
        if self.pre_quantized:
            untie(model, places.linears)
        tied = tied_weights(model)
        prefix = model.base_model_prefix
        for layer in places.ffns:
            assert config.format is not None
            if layer.experts and not self.pre_quantized:
                raise UnsupportedArchitectureError(
                    f"{layer.name} is a mixture of experts, whose matrices are put together while they "
                    "are read; load the model without quantization_config, and call pack_model on it"
                )
            ffn = packed_kind(layer)(layer, config.format)
            setattr(layer.parent, layer.attribute, ffn)
            self._await(ffn, layer.name, prefix)
        for place in places.linears:
            if f"{place.name}.weight" in tied:
                # transformers loads whichever of the two the checkpoint has, and ties them.
                self._late.append(place)
                continue
            assert config.linear_format is not None
            linear = PlaneLinear(place.linear, config.linear_format)
            setattr(place.parent, place.attribute, linear)
            self._await(linear, place.name, prefix)
        self._files = checkpoint_files or []
        if self.pre_quantized and self._files:
            check_packed_files(model, self._files, prefix, _renaming(model))
        else:
            names = [f"{name}.{part}" for name, parts in self._waiting.items() for part in parts]
            check_float_files(self._files, names, prefix, _renaming(model))

    def _await(self, module: PlaneModule, name: str, prefix: str) -> None:
        """Have a module's weights packed when they come; an FFN's biases come with them."""
        if self.pre_quantized:
            return
        from transformers.core_model_loading import WeightConverter

        # Older transformers (5.4) cast what they read to the dtype of what will hold it.
        for plane, data in module.own_planes().items():
            blank = torch.empty(data.shape, dtype=module.dtype, device=data.device)
            module.register_parameter(plane, nn.Parameter(blank, requires_grad=False))
        start = name.removeprefix(f"{prefix}.")  # a checkpoint may have the prefix or not
        self._waiting[name] = names = _sources(module)
        self._conversions.append(
            WeightConverter(
                [f"{start}.{part}" for part in names],
                f"{start}.{next(iter(module.own_planes()))}",
                operations=[_operation(lambda model, tensors: self.take(model, name, tensors))],
            )
        )

    def take(self, model: nn.Module, name: str, tensors: dict[str, Any]) -> dict[str, Tensor]:
        """Pack the weights of a module.

        Args:
            model: that is being loaded.
            name: of the module.
            tensors: by their names' ends, as :meth:`_await` asked for them.

        Returns:
            The module's planes, and an FFN's biases, by their full names. A problem is kept for when
            all is loaded: transformers would take an error here for its own, and log it.
        """
        module = model.get_submodule(name)
        assert isinstance(module, PlaneModule)
        given: dict[str, Any] = {}
        for part in self._waiting.pop(name):
            value = next((v for key, v in tensors.items() if key.endswith(part)), None)
            weight: Any = value[0] if isinstance(value, list) and value else value
            self._check(f"{name}.{part}", weight, _shape(module, part))
            given[part] = weight
        weights = [weight for part, weight in given.items() if part.endswith("weight")]
        device = "cpu" if weights[0] is None else weights[0].device
        planes = {
            plane: torch.zeros(data.shape, dtype=torch.uint8, device=device)
            for plane, data in module.own_planes().items()
        }
        if self._problem is None:
            self._unreleased += sum(weight.nbytes for weight in weights)
            if name in self._positions:
                assert isinstance(module, PlaneFFN)
                parts = module.form.split(*weights)
                weights = [part for part in parts if part is not None]
                self._samples[name] = kept_samples(self._positions[name], *weights)
            module.round_into(planes, *weights)
            planes |= _biases(module, given)
            if self._unreleased >= _RELEASED_AT:
                release_pages(self._files)
                self._unreleased = 0
        return {f"{name}.{plane}": data for plane, data in planes.items()}

    def _check(self, name: str, weight: Any, shape: tuple[int, ...]) -> None:
        if self._problem is not None:
            return
        if weight is None:
            self._problem = _missing(name)
        elif not weight.is_floating_point() or tuple(weight.shape) != shape:
            self._problem = ModelError(
                f"{name} is {weight.dtype} {list(weight.shape)} in the checkpoint; expected a float "
                f"{list(shape)} by config.json. Download the checkpoint again, or load it as the model "
                "it was made of"
            )
        else:
            try:
                refuse_infinite(name, weight)
            except ModelError as error:
                self._problem = error

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._problem is None and self._waiting:
            name, parts = next(iter(self._waiting.items()))
            self._problem = _missing(f"{name}.{parts[0]}")
        if self.pre_quantized and not self._files:  # a state dict, which no header could be read of
            self._problem = next(map(_missing, _not_loaded(model)), None)
        if self._problem is not None:
            raise self._problem
        untie(model, [place for place in self._late if self._pack_tied(place)])
        for module in model.modules():
            if isinstance(module, PlaneModule):
                _retype_offloaded(module)
        # They are no way back for save_pretrained.
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            model._weight_conversions = [c for c in conversions if c not in self._conversions]
        if not self.pre_quantized:
            release_pages(self._files)
            if self._samples:
                layers = find_ffn_layers(model, packed=True)
                self.quantization_config.fingerprint = kept_fingerprint(layers, self._samples)
        self._late, self._conversions, self._files, self._samples = [], [], [], {}
        # What is asked for this flag refuses half() and float(), which do no harm here.
        model.is_quantized = False
        return model

    def _pack_tied(self, place: LinearPlace) -> bool:
        """Pack a head out of the embedding that it is tied to, which stays; whether that was done."""
        config, linear = self.quantization_config, place.linear
        assert config.linear_format is not None
        hook: Any = getattr(linear, "_hf_hook", None)
        if linear.weight.device.type == "meta" or getattr(hook, "offload", False):
            config.modules_to_not_convert.append(place.name)
            warnings.warn(
                f"{place.name} stays in float, tied to the embedding, which is offloaded",
                stacklevel=2,
            )
            return False
        refuse_infinite(f"{place.name}.weight", linear.weight)
        packed = PlaneLinear.from_linear(linear, config.linear_format)
        if hook is not None:
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(packed, hook)
        setattr(place.parent, place.attribute, packed)
        return True

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is packed out of a float checkpoint."""
        if self.pre_quantized:
            return False
        module_name, _, tensor = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        return isinstance(module, PlaneModule) and tensor in module.own_planes()

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes of an element: planes that are to come stand there as floats."""
        return 1 if self.param_needs_quantization(model, param_name) else param.element_size()

    def get_weight_conversions(self) -> list[Any]:
        """How a float checkpoint's weights become planes."""
        return self._conversions

    def get_quantize_ops(self) -> Any:
        """What is left to do once weights are packed."""
        return _operation(lambda model, tensors: tensors)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Planes are plain tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """For inference only."""
        return False

    @property
    def is_compileable(self) -> bool:
        """No branch of the packed modules depends on data."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        restore_floats(model)
        return model if dtype is None else model.to(dtype)


def _check_when_merging() -> None:
    """Have ``from_pretrained`` of a packed folder refuse another config.

    transformers goes on by the folder's with a warning, as for its own methods, whose configs may also
    say how to load; ours says only what is in memory. It has no hook for a method to tell it so.
    """
    merge = getattr(AutoHfQuantizer, "merge_quantization_configs", None)
    if merge is None:
        return

    @functools.wraps(merge)
    def checked(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        found, asked = quantization_config, quantization_config_from_args
        if isinstance(asked, PlaneConfig) and dict(found).get("quant_method") == METHOD:
            check_same(found if isinstance(found, PlaneConfig) else PlaneConfig(**found), asked)
            asked = None
        return merge(found, asked)

    AutoHfQuantizer.merge_quantization_configs = staticmethod(checked)


_check_when_merging()


def _renaming(model: Any) -> Callable[[str], str]:
    """How transformers renames a checkpoint's tensors of a model type, as of many wrappers."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    steps = [s for s in get_model_conversion_mapping(model) if isinstance(s, WeightRenaming)]
    return lambda name: rename_source_key(name, steps, [])[0]


def _operation(convert: Callable[[Any, dict[str, Any]], dict[str, Any]]) -> Any:
    """A step of transformers' loading that calls a function with model and tensors."""
    from transformers.core_model_loading import ConversionOps

    class Planes(ConversionOps):
        def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            return convert(kwargs["model"], input_dict)

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return self  # transformers copies a step for each tensor, and all that hangs on it

    return Planes()


def _retype_offloaded(module: PlaneModule) -> None:
    """Have accelerate read planes off the disk as bytes, not as the floats that stood for them."""
    for plane, data in module.own_planes().items():
        if data.dtype != torch.uint8:
            blank = torch.empty_like(data, dtype=torch.uint8)
            module.register_parameter(plane, nn.Parameter(blank, requires_grad=False))


def _not_loaded(model: nn.Module) -> Iterator[str]:
    """Names of planes that transformers found nothing for."""
    for name, module in model.named_modules():
        if isinstance(module, PlaneModule):
            for plane in _own_names(module):
                if not getattr(module._parameters[plane], "_is_hf_initialized", False):
                    yield f"{name}.{plane}"


def _own_names(module: PlaneModule) -> list[str]:
    """Names of what a float checkpoint does not have: planes, and an FFN's biases."""
    biases = module.own_biases() if isinstance(module, PlaneFFN) else {}
    return [*module.own_planes(), *biases]


def _sources(module: PlaneModule) -> tuple[str, ...]:
    """What a module is packed from, by names below its own: weights, then an FFN's biases."""
    if not isinstance(module, PlaneFFN):
        return ("weight",)
    form = module.form
    biases = form.join_bias(module.gate_bias, module.up_bias, module.down_bias)
    return (
        *(f"{part}.weight" for part in form.projections),
        *(f"{p}.bias" for p, b in zip(form.projections, biases, strict=True) if b is not None),
    )


def _biases(module: PlaneModule, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """An FFN's biases by its own names, of its linear layers' by theirs."""
    if not isinstance(module, PlaneFFN):
        return {}
    biases = [given.get(f"{part}.bias") for part in module.form.projections]
    own = zip(BIASES[1:], (*module.form.split_bias(*biases), biases[-1]), strict=True)
    return {name: b.to(module.dtype, copy=True) for name, b in own if b is not None}


def _shape(module: PlaneModule, part: str) -> tuple[int, ...]:
    if isinstance(module, PlaneFFN):
        rows, size = module.intermediate_size, module.hidden_size
        projection, _, tensor = part.rpartition(".")
        if projection == module.form.projections[-1]:
            return (size, rows) if tensor == "weight" else (size,)
        rows = module.form.first_rows(rows)
        return (rows, size) if tensor == "weight" else (rows,)
    assert isinstance(module, PlaneLinear)
    return module.out_features, module.in_features


def _missing(name: str) -> ModelError:
    return ModelError(
        f"{name} is missing in the checkpoint, so that random weights would be run. Download or save "
        "it again, or load it as the model it was made of"
    )
