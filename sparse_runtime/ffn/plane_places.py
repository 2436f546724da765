"""Which modules of a model can be packed into planes, and what speaks against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_runtime.errors import (
    AlreadySparseError,
    ModelError,
    NothingMatchedError,
    UnsupportedArchitectureError,
)
from sparse_runtime.ffn.patch import owners
from sparse_runtime.ffn.plane_modules import PlaneFFN, PlaneLinear, PlaneModule
from sparse_runtime.kernels.backends import KERNEL_DTYPES
from sparse_runtime.kernels.linear import FastLinear, call_problem, has_no_hooks
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.int8_linears import float_linear, int8_problem, is_int8
from sparse_runtime.models.onloading import is_offloaded, undispatched

_REMEDY = "Merge or remove adapters, hooks and parametrizations first, or load the float checkpoint"


@dataclass(frozen=True, eq=False)
class LinearPlace:
    """A linear layer outside the FFNs.

    Attributes:
        name: in the model.
        parent: holds it under ``attribute``.
        attribute: its own name.
        linear: the layer.
    """

    name: str
    parent: nn.Module
    attribute: str
    linear: nn.Linear


@dataclass(frozen=True, eq=False)
class Places:
    """What is to be packed.

    Attributes:
        ffns: in layer order.
        linears: attention and head, in the model's order.
    """

    ffns: list[FFNLayer]
    linears: list[LinearPlace]


def find_places(model: nn.Module, *, ffns: bool, linears: bool, leave: Sequence[str]) -> Places:
    """Find what can be packed, and change nothing.

    Args:
        model: a float causal language model; its weights may be on the meta device.
        ffns: the FFNs.
        linears: linear layers of attention and head.
        leave: names of modules to leave in float: whole names, or some of their parts that follow each
            other (``lm_head``, ``layers.0``, ``self_attn.q_proj``). A projection leaves its FFN whole.

    Raises:
        AlreadySparseError: the FFNs are sparse.
        UnsupportedArchitectureError: what is asked for is packed or quantized already, the type is not
            supported, or a module is more than its weights (adapters, hooks, parametrizations).
        NothingMatchedError: a name in ``leave`` is that of no module, or nothing is left to pack.
    """
    _refuse_changed(model, ffns=ffns, linears=linears)
    names = [name for name, _ in model.named_modules()]
    for part in leave:
        if not any(_holds(name, part) for name in names):
            raise NothingMatchedError(
                f"modules_to_not_convert names {part!r}, but no module of this {type(model).__name__} "
                "has a name with that part; remove it, or correct it (model.named_modules() lists them)"
            )
    layers = find_ffn_layers(model, packed=True, int8=True)
    inside = _inside(layers)
    kept = [layer for layer in layers if ffns and not _left(_ffn_names(layer), leave)]
    for layer in kept:
        # What accelerate loads them by goes with the floats.
        with undispatched(layer.mlp):
            _check_ffn(layer)
    found = []
    if linears:
        found = [place for place in _linears(model, inside) if not _left([place.name], leave)]
        for place in found:
            with undispatched(place.linear):
                _check_linear(model, place)
    _refuse_int8_beside(model, kept, found)
    if not kept and not found:
        raise NothingMatchedError(
            f"modules_to_not_convert leaves nothing of this {type(model).__name__} to pack"
        )
    return Places(kept, found)


def names_in(model: nn.Module, leave: Sequence[str], prefix: str) -> list[str]:
    """Those of ``leave`` that name a module of a model, which may be the base model of a folder's."""
    names = [name for name, _ in model.named_modules()]
    bare = [part.removeprefix(f"{prefix}.") for part in leave]
    return [part for part in bare if any(_holds(name, part) for name in names)]


def float_names(model: nn.Module, *, ffns: bool, linears: bool) -> list[str]:
    """Names of FFNs, and of linear layers outside them, that are not packed."""
    layers = find_ffn_layers(model, packed=True, int8=True)
    names = [layer.name for layer in layers if ffns and not layer.packed]
    return names + [p.name for p in _linears(model, _inside(layers)) if linears]


def check_finite(places: Places) -> None:
    """Check that all weights in memory, and biases of FFNs, are numbers.

    Raises:
        ModelError: there is a NaN or an infinity; the message names the tensor.
    """
    for layer in places.ffns:
        if not is_offloaded(layer.holder):
            check_ffn_finite(layer)
    for place in places.linears:
        refuse_infinite(f"{place.name}.weight", opened(place.linear, torch.float32).weight)


def check_ffn_finite(layer: FFNLayer) -> None:
    """Check that an FFN's weights and biases are numbers; raises as :func:`check_finite`."""
    if layer.experts:
        for name, weight in zip(layer.projections, layer.weights, strict=True):
            refuse_infinite(f"{layer.name}.{name}", weight)
    for name, linear in layer.linears().items():
        refuse_infinite(f"{layer.name}.{name}.weight", opened(linear, layer.dtype).weight)
        if linear.bias is not None:
            refuse_infinite(f"{layer.name}.{name}.bias", linear.bias)


def opened(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """A linear layer with float weights: itself, or one of the values of its int8 rows in a dtype."""
    return float_linear(linear, dtype) if is_int8(linear) else linear


def opened_ffn(layer: FFNLayer) -> FFNLayer:
    """An FFN's projections with float weights."""
    if not layer.int8:
        return layer
    gate, up, down = (opened(linear, layer.dtype) for linear in layer.linears().values())
    return replace(layer, gate=gate, up=up, down=down)


def refuse_infinite(name: str, weight: Tensor) -> None:
    """Check that a matrix, or a bias, holds numbers.

    Raises:
        ModelError: there is a NaN or an infinity.
    """
    if not weight.numel():
        return
    # Without a temporary of the matrix's size, as isfinite() would make.
    low, high = torch.aminmax(weight.detach())
    if not (low.isfinite() and high.isfinite()):
        raise ModelError(
            f"{name} holds NaN or infinity; expected finite numbers. Load the model in bfloat16 or "
            "float32 if this is float16, whose largest number is 65504, or download it again"
        )


def restore_floats(model: nn.Module, modules: Sequence[PlaneModule] | None = None) -> None:
    """Make packed modules of a model float modules of the packed values.

    Args:
        model: packed.
        modules: some of its packed modules, as far as they are still there; none of them a sparse FFN.
            None: all of them.

    Raises:
        AlreadySparseError: the model is sparse.
        NothingMatchedError: it holds no packed module.
    """
    if modules is None and any(owners(model)):
        raise AlreadySparseError("the model is sparse; call unsparsify(model) first")
    wanted = {id(module) for module in (model.modules() if modules is None else modules)}
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, PlaneModule) and id(module) in wanted
    ]
    if not names and modules is None:
        raise NothingMatchedError(
            f"this {type(model).__name__} holds no packed weights; call pack_model(model) first"
        )
    for name in names:
        parent_name, _, attribute = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        module = getattr(parent, attribute)
        if isinstance(module, PlaneFFN):
            setattr(parent, attribute, module.to_float())
        elif isinstance(module, PlaneLinear):
            setattr(parent, attribute, module.to_linear())


def untie(model: Any, linears: Sequence[LinearPlace]) -> None:
    """Let a packed head be, and its embedding stay float: transformers must not tie them again.

    Args:
        model: a ``PreTrainedModel``.
        linears: those that are packed.

    Raises:
        UnsupportedArchitectureError: transformers could only untie other weights with them.
    """
    tied = tied_weights(model)
    packed = {f"{place.name}.weight" for place in linears}
    if not packed & tied.keys():
        return
    others = tied.keys() - packed
    if others:
        raise UnsupportedArchitectureError(
            f"{min(packed & tied.keys())} cannot be packed, because the config ties {min(others)} by "
            "the same switch; name both modules in modules_to_not_convert"
        )
    for module in model.modules():
        if hasattr(module, "get_expanded_tied_weights_keys"):
            module.config.tie_word_embeddings = False
    model.config.get_text_config(decoder=True).tie_word_embeddings = False
    model.all_tied_weights_keys = tied_weights(model)


def tied_weights(model: Any) -> dict[str, str]:
    """Names of the weights that transformers ties, each with the one that it is tied to."""
    keys = getattr(model, "get_expanded_tied_weights_keys", None)
    return {} if keys is None else keys(all_submodels=True)


def _refuse_changed(model: nn.Module, *, ffns: bool, linears: bool) -> None:
    if ffns and any(owners(model)):
        raise AlreadySparseError(
            "the model is sparse; call unsparsify(model), pack it, and sparsify it again"
        )
    for name, module in model.named_modules():
        if (ffns and isinstance(module, PlaneFFN)) or (linears and isinstance(module, PlaneLinear)):
            raise UnsupportedArchitectureError(
                f"{name} is packed already, in {module.format.bits} bits; call unpack_model(model) "
                "first, or load the float checkpoint for other bits"
            )
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    fields = config if isinstance(config, dict) else vars(config) if config is not None else {}
    method = fields.get("quant_method")
    # A GGUF file that was read into floats still says where it came from, and ours is being made.
    if method is None or fields.get("dequantize") or method == "planes":
        return
    if any(is_int8(module) for module in model.modules()):  # each module is looked at
        return
    raise UnsupportedArchitectureError(
        f"the model is quantized already, by {getattr(method, 'value', method)}; expected float "
        "weights: rounding rounded weights again adds up the errors of both. Load the float "
        "checkpoint that it was made of (model.dequantize(), where the method has it, gives floats too)"
    )


def _refuse_int8_beside(
    model: nn.Module, ffns: Sequence[FFNLayer], linears: Sequence[LinearPlace]
) -> None:
    """Refuse to leave int8 layers where others are packed: no config.json could say both."""
    packed = _inside(ffns) | {id(place.linear) for place in linears}
    for name, module in model.named_modules():
        if is_int8(module) and id(module) not in packed:
            raise UnsupportedArchitectureError(
                f"{name} is int8 and would stay so beside planes, which could not be saved; pack FFNs "
                "and linear layers both (weights=8, linear_weights=8; pack_model(model, 8, linears=8))"
            )


def _holds(name: str, part: str) -> bool:
    return f".{part}." in f".{name}."


def _left(names: Sequence[str], leave: Sequence[str]) -> bool:
    return any(_holds(name, part) for name in names for part in leave)


def _ffn_names(layer: FFNLayer) -> list[str]:
    return [layer.name, *(f"{layer.name}.{name}" for name in layer.projections)]


def _check_ffn(layer: FFNLayer) -> None:
    mlp = layer.mlp
    problem = None
    if parametrize.is_parametrized(mlp):
        problem = "is parametrized"
    if layer.form.inline is not None:
        problem = "is written out in a larger module, which planes have no place in"
    elif layer.form.transposed:
        problem = "has weights [in, out], which planes are not made for"
    for name, module in (("", mlp), *mlp.named_children()):
        if name in layer.projections:
            problem = problem or _problem(name, call_problem(module))
        elif not has_no_hooks(module):
            problem = problem or _problem(name, "has hooks, or its forward has been replaced")
    # What a state dict would lose; of int8 rows their scales are no more than the weights.
    tensors = ("weight", "bias", *(("SCB", "weight_format") if layer.int8 else ()))
    own = {f"{p}.{t}" for p in layer.projections for t in tensors}
    others = mlp.state_dict().keys() - (set(layer.projections) if layer.experts else own)
    if others:
        problem = problem or f"holds {min(others)}, which planes have no place for"
    if problem is not None:
        raise UnsupportedArchitectureError(f"{layer.name}: {problem}. {_REMEDY}")


def _problem(name: str, problem: str | None) -> str | None:
    return None if problem is None else f"{name} {problem}".strip()


def _inside(layers: Sequence[FFNLayer]) -> set[int]:
    return {id(module) for layer in layers for part in layer.parts for module in part.modules()}


def _linears(model: nn.Module, inside: set[int]) -> Iterator[LinearPlace]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) not in inside:
            parent_name, _, attribute = name.rpartition(".")
            yield LinearPlace(name, model.get_submodule(parent_name), attribute, module)


def _check_linear(model: nn.Module, place: LinearPlace) -> None:
    linear = place.linear
    weight = linear._parameters.get("weight")
    problem = call_problem(linear)
    if is_int8(linear):
        problem = problem or int8_problem(linear)
    elif type(linear) not in (nn.Linear, FastLinear):
        kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
        problem = f"is a {kind}; expected a plain torch.nn.Linear"
    elif weight is None:
        problem = "has no parameter named weight (it is parametrized or pruned)"
    elif type(weight) is not nn.Parameter:
        problem = f"has a {type(weight).__qualname__} as its weight; expected a plain parameter"
    elif weight.dtype not in KERNEL_DTYPES:
        problem = f"has {weight.dtype} weights; expected bfloat16, float16 or float32"
    parts = place.name.split(".")
    for end in range(len(parts)):
        # PEFT's layers: the adapter's linears are not the model's.
        if hasattr(model.get_submodule(".".join(parts[:end])), "base_layer"):
            problem = f"is part of an adapted layer, {'.'.join(parts[:end])}"
    if problem is not None:
        raise UnsupportedArchitectureError(
            f"{place.name} {problem}. {_REMEDY}; modules_to_not_convert leaves modules in float"
        )
