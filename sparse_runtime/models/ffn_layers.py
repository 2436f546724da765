"""Where a model type keeps its gated FFN: the one table to extend for a new architecture."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_runtime.cost import FFNCost, PlaneCost
from sparse_runtime.errors import ConfigError, NothingMatchedError, UnsupportedArchitectureError
from sparse_runtime.kernels.linear import weight_problem
from sparse_runtime.kernels.planes import PlaneFormat
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS, activations
from sparse_runtime.models.int8_linears import int8_problem, is_int8

#: ``hidden_act`` of a transformers config -> activation name of the kernels.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class FFNArchitecture:
    """One row of the table: how to find the gated FFNs of a model type.

    ``mlp`` is a regular expression that a module's full name must end with; its group 1 is the layer
    index. ``gate``, ``up`` and ``down`` are the names of the three linears inside that module, and
    ``act`` that of its activation, which must be the one that the config field ``activation`` names.
    """

    mlp: str = r"layers\.(\d+)\.mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    act: str = "act_fn"
    activation: str = "hidden_act"


#: model_type -> FFN layout. Adding a row is all that another SwiGLU-like model needs.
ARCHITECTURES: dict[str, FFNArchitecture] = {
    "llama": FFNArchitecture(),
    "mistral": FFNArchitecture(),
    "qwen2": FFNArchitecture(),
}


@dataclass(frozen=True)
class FFNLayer:
    """A gated FFN found in a model.

    ``gate`` and ``up`` have weights [I, H], ``down`` [H, I]; ``parent`` holds ``mlp`` under the
    attribute ``attribute``, and ``projections`` are the names of the three in ``mlp``. Of an FFN whose
    weights are packed in planes (``sparse_runtime.ffn.plane_modules``), ``mlp`` has none of the three.
    """

    index: int
    name: str
    parent: nn.Module
    attribute: str
    mlp: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    activation: str
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    @property
    def packed(self) -> bool:
        """Whether its weights are in planes."""
        return is_packed(self.mlp)

    @property
    def int8(self) -> bool:
        """Whether some of its projections are int8 rows with scales."""
        return not self.packed and any(map(is_int8, (self.gate, self.up, self.down)))

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.mlp.hidden_size if self.packed else self.gate.in_features  # type: ignore[return-value]

    @property
    def intermediate_size(self) -> int:
        """I, the number of neurons."""
        return self.mlp.intermediate_size if self.packed else self.gate.out_features  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.mlp.look.device if self.packed else self.gate.weight.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, or of those that planes or int8 rows stand for."""
        if self.packed:
            return self.mlp.dtype  # type: ignore[return-value]
        if self.int8:  # of the decoder layer's norms
            return next(p.dtype for p in self.parent.parameters() if p.is_floating_point())
        return self.gate.weight.dtype

    @property
    def format(self) -> PlaneFormat | None:
        """Of its planes; None for float weights."""
        return self.mlp.format if self.packed else None  # type: ignore[return-value]

    @property
    def bits(self) -> int | None:
        """Of its planes; None for float weights."""
        return None if self.format is None else self.format.bits

    def down_rows(self) -> Tensor:
        """The last of :meth:`rows` alone: values of gate and up would take twice its memory again."""
        if self.packed:
            return self.mlp.planes.rounded()[2].values()  # type: ignore[union-attr,operator]
        return self.down.weight.detach().t()

    def rows(self, *, base: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and transposed down, each [I, H]: weights, or the values of planes in float32.

        Args:
            base: of planes, the values of the base planes.
        """
        if self.packed:
            rounded = self.mlp.planes.rounded()  # type: ignore[union-attr,operator]
            gate, up, down_t = (part.values(base=base) for part in rounded)
            return gate, up, down_t
        weights = self.gate.weight, self.up.weight, self.down.weight.t()
        gate, up, down_t = (weight.detach() for weight in weights)
        return gate, up, down_t


def layer_cost(layer: FFNLayer, extra_elements: int, *, verified: bool) -> FFNCost:
    """Bytes that an FFN reads for a token, as it is stored; floats count as bfloat16.

    Args:
        layer: float or packed.
        extra_elements: read per token besides the neurons.
        verified: whether float neurons are looked at; planes always are.
    """
    sizes = (layer.hidden_size, layer.intermediate_size, extra_elements)
    if layer.format is None:
        return FFNCost(*sizes, verified=verified)
    return PlaneCost(*sizes, base=layer.format.base, residual=layer.format.residual)


def is_packed(module: nn.Module) -> bool:
    """Whether a module is an FFN in planes: it says so."""
    return getattr(module, "holds_planes", False) is True


def packed_bits(model: nn.Module) -> int | None:
    """Bits of a model's FFNs in planes; None if they are floats."""
    forms: Iterator[Any] = (module.format for module in model.modules() if is_packed(module))
    return next((form.bits for form in forms), None)


def architecture_of(model: nn.Module) -> FFNArchitecture:
    """Return the table row of a model.

    Raises:
        UnsupportedArchitectureError: the model type has no row.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedArchitectureError(
            f"model type {model_type!r} is not in the architecture table (supported: {supported}). "
            "If its FFN is down(act(gate(x)) * up(x)), add a row: "
            "sparse_runtime.models.ffn_layers.ARCHITECTURES[model_type] = FFNArchitecture(...)"
        )
    return ARCHITECTURES[model_type]


def find_ffn_layers(
    model: nn.Module, *, packed: bool = False, int8: bool = False
) -> list[FFNLayer]:
    """Find the gated FFNs of a model, in layer order.

    Wrappers around the model (PEFT, ``torch.compile``) are looked through: a module counts when its
    full name *ends* with the architecture's pattern.

    Args:
        model: a causal language model.
        packed: also FFNs whose weights are in planes, which have no projections.
        int8: also FFNs with projections of int8 rows (``models/int8_linears.py``).

    Raises:
        UnsupportedArchitectureError: the model type has no row, or an FFN has biases, an unknown
            activation or quantised weights.
        NothingMatchedError: no module has the name that the row gives.
    """
    architecture = architecture_of(model)
    model_type = model.config.model_type  # type: ignore[union-attr]
    activation = _activation_name(model, architecture)
    layers = list(_matching_layers(model, architecture, activation))
    if not layers:
        raise NothingMatchedError(
            f"no module of this {type(model).__name__} (model type {model_type!r}) has a name that "
            f"ends with {architecture.mlp!r} and holds {architecture.gate!r}, {architecture.up!r} "
            f"and {architecture.down!r}. Pass the whole causal language model, or correct the row "
            f"ARCHITECTURES[{model_type!r}]"
        )
    for layer in layers:
        if layer.packed:
            if not packed:
                raise UnsupportedArchitectureError(
                    f"{layer.name} is packed in planes, and this needs float weights; load the model "
                    "without quantization_config, or call unpack_model(model) for those of the packed "
                    "values"
                )
            continue
        _check_layer(layer, int8=int8)
        _check_activation(layer, architecture.act)
        _check_forward(layer)
    return sorted(layers, key=lambda layer: layer.index)


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


def _activation_name(model: nn.Module, architecture: FFNArchitecture) -> str:
    name = getattr(model.config, architecture.activation, None)
    if name not in ACTIVATIONS:
        raise UnsupportedArchitectureError(
            f"config field {architecture.activation!r} is {name!r}; the kernels know "
            f"{', '.join(sorted(ACTIVATIONS))}"
        )
    return ACTIVATIONS[name]


def _matching_layers(
    model: nn.Module, architecture: FFNArchitecture, activation: str
) -> Iterator[FFNLayer]:
    pattern = re.compile(rf"(?:^|\.){architecture.mlp}$")
    for name, module in model.named_modules():
        match = pattern.search(name)
        if match is None:
            continue
        projections = [
            getattr(module, attribute, None)
            for attribute in (architecture.gate, architecture.up, architecture.down)
        ]
        if not is_packed(module) and not all(isinstance(p, nn.Module) for p in projections):
            continue
        parent_name, _, attribute = name.rpartition(".")
        yield FFNLayer(
            index=int(match.group(1)),
            name=name,
            parent=model.get_submodule(parent_name),
            attribute=attribute,
            mlp=module,
            gate=projections[0],  # type: ignore[arg-type]
            up=projections[1],  # type: ignore[arg-type]
            down=projections[2],  # type: ignore[arg-type]
            activation=activation,
            projections=(architecture.gate, architecture.up, architecture.down),
        )


def _check_activation(layer: FFNLayer, name: str) -> None:
    """The module's own activation is the config's; a few numbers tell."""
    act = getattr(layer.mlp, name, None)
    x = torch.linspace(-4, 4, 33)
    with torch.no_grad():
        # Its forward, not itself: a user's hooks are for the user's calls.
        found = act.forward(x) if isinstance(act, nn.Module) else None
    expected = ACTIVATION_FUNCTIONS[layer.activation](x)
    if found is None or found.shape != x.shape or not torch.allclose(found, expected, atol=1e-4):
        raise UnsupportedArchitectureError(
            f"{layer.name}: its activation {name} is {act}, which does not compute "
            f"{layer.activation!r} as the model's config says; put the model's own back"
        )


def _check_forward(layer: FFNLayer) -> None:
    """The forward of the module's class is down(act(gate(x)) · up(x)); a few numbers tell.

    It is run on small matrices in place of the projections: their hooks are for the user's calls.
    """
    own = type(layer.mlp)
    device = layer.gate.weight.device
    if device.type == "meta":  # offloaded
        return
    generator = torch.Generator().manual_seed(0)
    x, gate, up, down = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((1, 3, 6), (10, 6), (10, 6), (6, 10))
    )
    probe = own.__new__(own)
    probe.__dict__.update(layer.mlp.__dict__)
    probe.__dict__["_modules"] = {
        name: module and module.forward for name, module in layer.mlp._modules.items()
    }
    for name, weight in zip(layer.projections, (gate, up, down), strict=True):
        probe._modules[name] = functools.partial(F.linear, weight=weight)  # type: ignore[assignment]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        expected = F.linear(activations(x, gate, up, layer.activation), down)
        try:
            # Of a module that is sparse already, what it was before.
            found = getattr(own, "dense_forward", own.forward)(probe, x)
            same = torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
        except Exception as error:
            same, found = False, error
    if not same:
        raised = (
            f" (tried on small matrices, it raises {found!r})"
            if isinstance(found, Exception)
            else ""
        )
        raise UnsupportedArchitectureError(
            f"{layer.name}: the forward of {own.__module__}.{own.__qualname__} does not compute "
            f"down(act(gate(x)) * up(x)){raised}; put the model's own class and forward back"
        )


def _check_layer(layer: FFNLayer, *, int8: bool) -> None:
    for role in ("gate", "up", "down"):
        linear = getattr(layer, role)
        rounded = is_int8(linear)
        problem = int8_problem(linear) if int8 and rounded else weight_problem(linear)
        if int8 and rounded and linear.bias is not None:
            problem = "has a bias, which the sparse FFN operation does not compute"
        if problem is not None:
            packing = "sparsify(…, weights=8) packs its int8 rows; or load" if rounded else "Load"
            raise UnsupportedArchitectureError(
                f"{layer.name}: the {role} projection {problem}. {packing} the model unquantized, and "
                "merge or remove adapters and parametrizations first"
            )
    weights = [layer.gate.weight, layer.up.weight, layer.down.weight]
    present = [weight for weight in weights if weight.device.type != "meta"]  # not offloaded
    kinds = [f"{weight.dtype} on {weight.device}".removeprefix("torch.") for weight in present]
    if len(set(kinds)) > 1:
        raise UnsupportedArchitectureError(
            f"{layer.name}: its projections are {', '.join(kinds)}; expected one dtype on one device"
        )
