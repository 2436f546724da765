"""The FFNs of a model: found in its decoder layers by structure, and proven by numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sparse_runtime.errors import ConfigError, NothingMatchedError, UnsupportedArchitectureError
from sparse_runtime.kernels.linear import weight_problem
from sparse_runtime.models.experts import (
    EXPERTS,
    ExpertRows,
    chosen_experts,
    holds_experts,
    prove_experts,
)
from sparse_runtime.models.ffn_forms import (
    FFNForm,
    LinearRows,
    Proof,
    forms_of,
    prove,
)
from sparse_runtime.models.ffn_layer import FFNLayer, is_packed
from sparse_runtime.models.inline import inline_class
from sparse_runtime.models.inline_proof import prove_inline
from sparse_runtime.models.int8_linears import int8_problem, is_int8
from sparse_runtime.models.transposed import (
    is_linear,
    linear_sizes,
    with_rows,
)


def packed_bits(model: nn.Module) -> int | None:
    """Bits of a model's FFNs in planes; None if they are floats."""
    forms: Iterator[Any] = (module.format for module in model.modules() if is_packed(module))
    return next((form.bits for form in forms), None)


def find_ffn_layers(
    model: nn.Module, *, packed: bool = False, int8: bool = False
) -> list[FFNLayer]:
    """Find the FFNs of a model's decoder layers, in their order.

    Vision and audio towers stay out. Wrappers around the model (PEFT, ``torch.compile``) are looked
    through. Layers without an FFN, as hybrids have, are passed over. A mixture of experts may have an
    FFN beside them that runs for every token: it follows them, with an index of its own.

    Args:
        model: a causal language model.
        packed: also FFNs whose weights are in planes, which have no projections.
        int8: also FFNs with projections of int8 rows (``models/int8_linears.py``).

    Raises:
        UnsupportedArchitectureError: an FFN computes something else than down(act(gate·x) ⊙ (up·x)) or
            down(act(gate·x)), or its weights are not plain floats.
        NothingMatchedError: no decoder layer holds an FFN.
    """
    if getattr(getattr(model, "config", None), "model_type", None) is None:
        raise UnsupportedArchitectureError(
            f"this {type(model).__name__} has no config with a model_type; expected a causal language "
            "model of transformers, as AutoModelForCausalLM loads it"
        )
    names = {id(module): name for name, module in model.named_modules()}
    found, nearest = [], ""
    stack = _decoder_layers(model, names)
    for depth, decoder_layer in enumerate(stack):
        layers = _ffns_of(depth, decoder_layer, names, model)
        for index, layer in zip((depth, len(stack) + depth), layers, strict=False):
            found.append(replace(layer, index=index, depth=depth, decoder_layer=decoder_layer))
        if not layers and not nearest:
            nearest = _nearest(decoder_layer, names)
    if not found:
        raise NothingMatchedError(
            f"no decoder layer of this {type(model).__name__} (model type "
            f"{model.config.model_type!r}) holds an FFN: a module with linear layers gate, up and "  # type: ignore[union-attr]
            f"down, or gate and up in one and down, or up and down{nearest}. Pass a whole causal "
            "language model whose FFNs are of that kind"
        )
    for layer in found:
        if not layer.packed:
            _check_layer(layer, int8=int8)
        elif not packed:
            raise UnsupportedArchitectureError(
                f"{layer.name} is packed in planes, and this needs float weights; load the model "
                "without quantization_config, or call unpack_model(model) for those of the packed "
                "values"
            )
    return found


def find_single_ffns(model: nn.Module, what: str) -> list[FFNLayer]:
    """Find the FFNs of a model that has one in each layer.

    Args:
        model: a causal language model with float weights.
        what: takes such models only; for the error.

    Raises:
        UnsupportedArchitectureError, NothingMatchedError: as :func:`find_ffn_layers`; or a layer has a
            mixture of experts.
    """
    layers = find_ffn_layers(model)
    for layer in layers:
        if layer.experts:
            raise UnsupportedArchitectureError(
                f"{layer.name} is a mixture of {layer.experts} experts; {what} takes models with one "
                "FFN in each layer"
            )
    return layers


def select_layers(layers: Sequence[FFNLayer], indices: Sequence[int]) -> list[tuple[int, FFNLayer]]:
    """Layers of these indices, each with its position in ``layers``.

    Raises:
        ConfigError: no index is given, or one is not there.
    """
    selected = [(p, layer) for p, layer in enumerate(layers) if layer.index in indices]
    if not selected or len(selected) < len(set(indices)):
        raise ConfigError(
            f"layers are {list(indices)}; expected some of {layers[0].index} to {layers[-1].index}"
        )
    return selected


def decoder_of(model: nn.Module) -> nn.Module:
    """What gives the hidden states that a model's output embeddings turn into logits.

    Raises:
        UnsupportedArchitectureError: there is more between the two than the output embeddings.
    """
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    if is_linear(decoder):
        raise UnsupportedArchitectureError(
            f"the head of {type(model).__name__} is more than one matrix, and builds and perplexities "
            "need its last hidden states; expected a model whose get_decoder() gives them"
        )
    return decoder


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """A model's decoder layers, in order; none where it has no list of them."""
    return _decoder_layers(model, {id(module): name for name, module in model.named_modules()})


def _decoder_layers(model: nn.Module, names: dict[int, str]) -> Sequence[nn.Module]:
    """The longest list of modules at the top of the decoder, in terms of what its members hold."""
    decoder: Any = model
    if callable(getattr(model, "get_decoder", None)):
        decoder = model.get_decoder()  # type: ignore[operator]
    if id(decoder) not in names or is_linear(decoder):  # of ModernBERT, a part of the head
        decoder = model
    lists: dict[int, list[nn.ModuleList]] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList):
            lists.setdefault(name.count("."), []).append(module)
    top = lists[min(lists)] if lists else []
    sizes = [sum(1 for _ in members.modules()) for members in top]
    return list(top[sizes.index(max(sizes))]) if top else []


def _ffns_of(
    index: int, decoder_layer: nn.Module, names: dict[int, str], model: nn.Module
) -> list[FFNLayer]:
    """The FFN of a decoder layer, if it has one; or its experts, and what runs beside them."""
    experts = next(filter(_is_of_experts, decoder_layer.modules()), None)
    if experts is not None:
        mixture = _experts(index, names.get(id(experts), ""), experts, model)
        return [mixture, *_beside(mixture, decoder_layer, names, model)]
    proven, refused = [], []
    for module in decoder_layer.modules():
        name = names.get(id(module), "")
        if is_packed(module):
            proven.append(_layer(index, name, module, model, module.form, module.activation))  # type: ignore[arg-type]
            continue
        forms = forms_of(module)
        if not forms:
            continue
        proof = _proof(module, forms, is_layer=module is decoder_layer)
        size, rows = linear_sizes(module._modules[forms[0].projections[-1]])  # type: ignore[arg-type]
        if proof.activation is not None:
            proven.append(_layer(index, name, module, model, proof.form, proof.activation))
        elif size != rows:  # square ones are more often attention's
            refused.append(
                f"{name}: the forward of {type(module).__module__}.{type(module).__qualname__} does "
                f"not compute {_FORMULAS[forms[0].kind]} with {_listed(module)}: {proof.reason}"
            )
    # Adapters beside it are narrow, or have their norm with them.
    proven = [layer for layer in proven if layer.form.inline is None] or proven
    widest = max((layer.intermediate_size for layer in proven), default=0)
    proven = [layer for layer in proven if 4 * layer.intermediate_size > widest]
    if len(proven) > 1:
        listed = ", ".join(layer.name for layer in proven)
        raise UnsupportedArchitectureError(
            f"a decoder layer holds {len(proven)} FFNs ({listed}); expected one"
        )
    if not proven and refused:
        raise UnsupportedArchitectureError(
            f"{refused[-1]}. Put the model's own class and forward back, if they were replaced; else "
            "this FFN cannot run sparse"
        )
    return proven


def _beside(
    mixture: FFNLayer, decoder_layer: nn.Module, names: dict[int, str], model: nn.Module
) -> list[FFNLayer]:
    """The FFN beside a layer's experts that every token has; more than one run as they stand."""
    found, index = [], mixture.index
    for module in decoder_layer.modules():
        name = names.get(id(module), "")
        if module is mixture.mlp:
            continue
        if is_packed(module):
            found.append(_layer(index, name, module, model, module.form, module.activation))  # type: ignore[arg-type]
        elif forms := forms_of(module):
            proof = prove(module, forms, _device(module._modules[forms[0].projections[-1]]))  # type: ignore[arg-type]
            if proof.activation is not None:
                found.append(_layer(index, name, module, model, proof.form, proof.activation))
    # Adapters are narrower than one expert.
    least = mixture.intermediate_size // mixture.experts // 4
    found = [
        layer
        for layer in found
        if layer.hidden_size == mixture.hidden_size and layer.intermediate_size > least
    ]
    return found if len(found) == 1 else []


def _is_of_experts(module: nn.Module) -> bool:
    return module.form == EXPERTS if is_packed(module) else holds_experts(module)


def _proof(module: nn.Module, forms: Sequence[FFNForm], *, is_layer: bool) -> Proof:
    """That a module is an FFN, or that one is written out in its forward."""
    device = _device(module._modules[forms[0].projections[-1]])  # type: ignore[arg-type]
    if inline_class(module) is not None:
        return prove_inline(module, forms, device)
    whole = prove(module, forms, device)
    if whole.activation is not None:
        return whole
    inline = prove_inline(module, forms, device)
    return inline if inline.activation is not None or is_layer else whole


def _experts(index: int, name: str, module: nn.Module, model: nn.Module) -> FFNLayer:
    """The experts of a decoder layer."""
    if is_packed(module):
        return _counted(_layer(index, name, module, model, EXPERTS, module.activation))  # type: ignore[arg-type]
    device = next(p.device for p in module.parameters())
    proof = prove_experts(module, torch.device("cpu") if device.type == "meta" else device)
    if proof.activation is None:
        raise UnsupportedArchitectureError(
            f"{name} ({type(module).__name__}) holds experts of another kind than those that can run "
            f"sparse: {proof.reason}"
        )
    return _counted(_layer(index, name, module, model, EXPERTS, proof.activation))


def _counted(layer: FFNLayer) -> FFNLayer:
    """A layer of experts that knows how many of them a token has."""
    sample = torch.zeros(1, layer.hidden_size, dtype=layer.dtype, device=layer.device)
    active = chosen_experts(layer.parent, layer.attribute, sample)[0].shape[1]
    return replace(layer, active=active)


_FORMULAS = {
    "gated": "down(act(gate(x)) * up(x))",
    "fused": "down(act(gate(x)) * up(x))",
    "plain": "down(act(up(x)))",
}


def _nearest(decoder_layer: nn.Module, names: dict[int, str]) -> str:
    """The last module of a layer with linear layers of its own, which is more often its FFN."""
    modules = [m for m in decoder_layer.modules() if any(map(is_linear, m.children()))]
    if not modules:
        return ""
    name, kind = names.get(id(modules[-1]), ""), type(modules[-1]).__name__
    return f" (the nearest is {name} ({kind}), with {_listed(modules[-1])})"


def _device(linear: nn.Module) -> torch.device:
    """Where to try an FFN; offloaded ones are tried on the CPU."""
    device = next((p.device for p in linear.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def _listed(module: nn.Module) -> str:
    """Names and sizes of a module's linear layers."""
    linears = [(name, child) for name, child in module.named_children() if is_linear(child)]
    sizes = [(name, *linear_sizes(child)) for name, child in linears]
    return ", ".join(f"{name} [{rows}, {size}]" for name, size, rows in sizes)


def _layer(
    index: int, name: str, mlp: nn.Module, model: nn.Module, form: FFNForm, activation: str
) -> FFNLayer:
    parent_name, _, attribute = name.rpartition(".")
    first, *rest = linears = [with_rows(mlp._modules.get(part)) for part in form.projections]
    gate: Any = first
    up: Any = rest[0] if form.kind == "gated" else None
    down: Any = linears[-1]
    experts = 0
    if form.kind == "experts" and is_packed(mlp):
        experts = mlp.experts  # type: ignore[assignment]
    elif form.kind == "experts":
        gate, up, down = (ExpertRows(mlp, part) for part in ("gate", "up", "down"))
        experts = mlp._parameters[form.projections[-1]].shape[0]  # type: ignore[union-attr]
    if form.kind == "fused" and first is not None:
        gate, up = LinearRows(first, second=False), LinearRows(first, second=True)
    parent = model.get_submodule(parent_name)
    own = (parent, attribute, mlp, gate, up, down, activation, form)
    return FFNLayer(index, name, *own, experts=experts)


def _check_layer(layer: FFNLayer, *, int8: bool) -> None:
    for name, linear in layer.own_linears().items():
        rounded = is_int8(linear)
        known = int8 and rounded and layer.form.kind == "gated"
        problem = int8_problem(linear) if known else weight_problem(linear)
        if problem is not None:
            packing = "sparsify(…, weights=8) packs its int8 rows; or load" if rounded else "Load"
            raise UnsupportedArchitectureError(
                f"{layer.name}: {name} {problem}. {packing} the model unquantized, and "
                "merge or remove adapters and parametrizations first"
            )
    present = [weight for weight in layer.weights if weight.device.type != "meta"]  # not offloaded
    kinds = [f"{weight.dtype} on {weight.device}".removeprefix("torch.") for weight in present]
    if len(set(kinds)) > 1:
        raise UnsupportedArchitectureError(
            f"{layer.name}: its projections are {', '.join(kinds)}; expected one dtype on one device"
        )
