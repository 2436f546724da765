"""Modules whose weights are in planes (``kernels/planes.py``): a linear layer and an FFN.

They stand where the float modules stood, for inference only. Their planes are parameters without
gradients: accelerate offloads parameters, and buffers only when told to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_runtime.errors import ConfigError, ModelError, SparseRuntimeError
from sparse_runtime.kernels.linear import needs_gradient
from sparse_runtime.kernels.plane_op import dense_plane_ffn, plane_linear
from sparse_runtime.kernels.planes import (
    NeuronPlanes,
    PlaneFormat,
    pack_linear,
    pack_neurons,
    unpack_linear,
)
from sparse_runtime.kernels.rounding import InputStatistics, round_down, round_rows
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.onloading import DISPATCHED

# Rows that are packed or unpacked at a time: codes and float32 values of a whole matrix would take
# several times its memory.
_BLOCK_ROWS = 1024
#: Names of parameters that stay floats.
BIASES = ("bias", "gate_bias", "up_bias", "down_bias")


class PlaneModule(nn.Module):
    """What :class:`PlaneLinear` and :class:`PlaneFFN` have in common.

    Attributes:
        format: of the weights.
        dtype: of the float weights that it stands for; casting the model changes it.
    """

    format: PlaneFormat
    dtype: torch.dtype

    def own_planes(self) -> dict[str, Tensor]:
        """Its uint8 tensors, by their names."""
        return {
            name: parameter.data
            for name, parameter in self._parameters.items()
            if parameter is not None and name not in BIASES
        }

    def own_biases(self) -> dict[str, Tensor]:
        """Its biases, by their names."""
        return {name: b for name in BIASES if (b := self._parameters.get(name)) is not None}

    def round_into(
        self,
        planes: Mapping[str, Tensor],
        *weights: Tensor,
        statistics: InputStatistics | None = None,
    ) -> None:
        """Round float weights into planes of its own names and sizes, on the weights' device."""
        raise NotImplementedError

    def _add_planes(self, name: str, rows: int, size: int, device: torch.device) -> None:
        data = torch.empty(rows, size, dtype=torch.uint8, device=device)
        self.register_parameter(name, nn.Parameter(data, requires_grad=False))

    def _input(self, x: Tensor, size: int) -> Tensor:
        """Inputs [n, size], in autocast's dtype where that is at work."""
        if x.shape[-1] != size:
            raise ConfigError(
                f"inputs of {type(self).__name__} are {list(x.shape)}; expected [..., {size}]"
            )
        if needs_gradient(x):
            raise SparseRuntimeError(
                f"{type(self).__name__} is for inference: packed weights have no gradients. Call the "
                "model under torch.inference_mode() or torch.no_grad(), or train the float model"
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x.reshape(-1, size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PlaneModule:
        super()._apply(fn, recurse)
        device = next(iter(self.own_planes().values())).device
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # torch would copy floats into bytes.
        for name in self.own_planes():
            found = state_dict.get(prefix + name)
            if found is not None and found.dtype != torch.uint8:
                raise ModelError(
                    f"{prefix}{name} is {found.dtype} in the state dict; expected torch.uint8: the "
                    "state dict is not of a model packed in this way"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _bits(self) -> str:
        form = self.format
        return f"{form.bits} bits ({form})" if form.residual else f"{form.bits} bits"


class PlaneLinear(PlaneModule):
    """A linear layer over rows in planes, in place of an ``nn.Linear``.

    Attributes:
        in_features: K.
        out_features: N.
        planes: records of the rows [N, R] uint8; R as of :meth:`PlaneFormat.linear_size`.
        bias: [N], or None.
        by_fast_linear: packed by ``fast_linear``, for ``slow_linear`` to undo.
    """

    planes: nn.Parameter
    bias: nn.Parameter | None
    by_fast_linear = False

    def __init__(self, linear: nn.Linear, form: PlaneFormat) -> None:
        """Planes of no value yet for a linear layer, whose bias and device they get."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.format = form
        weight = linear.weight
        self.dtype = weight.dtype
        self._add_planes(
            "planes", self.out_features, form.linear_size(self.in_features), weight.device
        )
        self.register_parameter("bias", linear.bias)
        self.training = linear.training

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, form: PlaneFormat, statistics: InputStatistics | None = None
    ) -> PlaneLinear:
        """Round a linear layer.

        Args:
            linear: with weights [N, K], bfloat16, float16 or float32.
            form: planes to round to.
            statistics: of its inputs, or None.
        """
        module = cls(linear, form)
        module.round_into(module.own_planes(), linear.weight, statistics=statistics)
        return module

    @torch.no_grad()
    def round_into(
        self,
        planes: Mapping[str, Tensor],
        *weights: Tensor,
        statistics: InputStatistics | None = None,
    ) -> None:
        """Round the weights [N, K] into planes of its sizes."""
        (weight,) = weights
        for first in range(0, self.out_features, _BLOCK_ROWS):
            rows = slice(first, first + _BLOCK_ROWS)
            rounded = round_rows(weight[rows], self.format, statistics)
            planes["planes"][rows] = pack_linear(rounded)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The float layer of the packed values, in ``dtype``."""
        linear = _float_linear(self.in_features, self.out_features, self.dtype, self.planes.device)
        for first in range(0, self.out_features, _BLOCK_ROWS):
            rows = slice(first, first + _BLOCK_ROWS)
            block = unpack_linear(self.planes[rows], self.format, self.in_features)
            linear.weight[rows] = block.values().to(self.dtype)
        linear.bias = self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., K] to [..., N] of the input's dtype.

        Raises:
            ConfigError: the input has another last dimension.
            SparseRuntimeError: a gradient is asked for.
        """
        x = self._input(input, self.in_features)
        bias = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)  # type: ignore[assignment]
        output = plane_linear(x, self.planes, self.format, bias)
        return output.reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes and format."""
        bias = "" if self.bias is None else ", bias=True"
        return f"in_features={self.in_features}, out_features={self.out_features}{bias}, {self._bits()}"


class PlaneFFN(PlaneModule):
    """An FFN, down(act(gate·x) ⊙ (up·x)) or down(act(gate·x)), biases added, over neurons in planes.

    Attributes:
        hidden_size: H.
        intermediate_size: I.
        activation: by the kernels' name.
        look, count, refine: streams of ``kernels/planes.py`` [I, …] uint8. ``refine`` is None, and in
            no state dict, where the format has no residual: tensors without elements all look tied.
        gate_bias, up_bias, down_bias: [I], [I] and [H] of ``dtype``, None where there are none.
    """

    look: nn.Parameter
    count: nn.Parameter
    refine: nn.Parameter | None
    gate_bias: nn.Parameter | None
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None
    #: What ``models/ffn_layers.py``, which is below, knows it by.
    holds_planes = True

    def __init__(self, layer: FFNLayer, form: PlaneFormat) -> None:
        """Planes of no value yet for an FFN.

        Raises:
            UnsupportedArchitectureError: see :func:`sparse_runtime.ffn.plane_places.find_places`, which
                says beforehand whether an FFN is no more than its weights.
        """
        super().__init__()
        self.hidden_size, self.intermediate_size = layer.hidden_size, layer.intermediate_size
        self.activation, self.format = layer.activation, form
        self.form = layer.form
        self.dtype = layer.dtype
        for name, size in self.record_sizes(form).items():
            if size:
                self._add_planes(name, self.intermediate_size, size, layer.device)
            else:
                self.register_parameter(name, None)
        for name, bias in zip(BIASES[1:], (*layer.biases, layer.down_bias), strict=True):
            # Clones: a fused layer's halves share memory, which safetensors does not write.
            own = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
            self.register_parameter(name, own)
        # In a tuple, or torch would take it for a child.
        self._float = (_without_projections(layer),)
        self.training = layer.mlp.training

    @classmethod
    def from_mlp(
        cls,
        layer: FFNLayer,
        form: PlaneFormat,
        statistics: InputStatistics | None = None,
        activations: InputStatistics | None = None,
    ) -> PlaneFFN:
        """Round an FFN.

        Args:
            layer: found by :func:`sparse_runtime.models.ffn_layers.find_ffn_layers`.
            form: planes to round to.
            statistics: of its hidden states, K = H, or None; for gate and up.
            activations: statistics of its activations, K = I, or None; for down.
        """
        module = cls(layer, form)
        linears = (layer.gate, layer.up, layer.down)
        weights = (linear.weight for linear in linears if linear is not None)
        module.round_into(
            module.own_planes(), *weights, statistics=statistics, activations=activations
        )
        return module

    def record_sizes(self, form: PlaneFormat) -> dict[str, int]:
        """Bytes of its neurons' records in a format, by the names of the streams."""
        return form.record_sizes(self.hidden_size, self.form.matrices)

    @property
    def planes(self) -> NeuronPlanes:
        """Its weights and biases but that of down, as the kernels take them."""
        refine = self.look[:, :0] if self.refine is None else self.refine
        sizes = self.format, self.hidden_size, self.activation
        biases = (None if b is None else b.float() for b in (self.gate_bias, self.up_bias))
        return NeuronPlanes(self.look, self.count, refine, *sizes, *biases)

    @torch.no_grad()
    def round_into(
        self,
        planes: Mapping[str, Tensor],
        *weights: Tensor,
        statistics: InputStatistics | None = None,
        activations: InputStatistics | None = None,
    ) -> None:
        """Round gate, up (if there is one) [I, H] and down [H, I] into planes of its sizes."""
        *inputs, down = weights
        form, whole_down = self.format, None
        if activations is not None:
            # A neuron's errors are made up for by all later ones.
            whole_down = round_down(down.t(), form, activations)
        for first in range(0, self.intermediate_size, _BLOCK_ROWS):
            rows = slice(first, first + _BLOCK_ROWS)
            gate, *rest = (round_rows(weight[rows], form, statistics) for weight in inputs)
            block = pack_neurons(
                gate,
                rest[0] if rest else None,
                round_down(down[:, rows].t().contiguous(), form)
                if whole_down is None
                else whole_down[rows],
                self.activation,
            )
            for name, data in planes.items():
                data[rows] = getattr(block, name)

    @torch.no_grad()
    def to_float(self) -> nn.Module:
        """The module that it replaced, of the same class, with projections of the packed values."""
        size, neurons, planes = self.hidden_size, self.intermediate_size, self.planes
        device = self.look.device
        first_rows, inputs = self.form.first_rows(neurons), self.form.projections[1:]
        linears = [_float_linear(size, first_rows, self.dtype, device) for _ in inputs]
        linears.append(_float_linear(neurons, size, self.dtype, device))
        gate, up, down = self.form.split(*(linear.weight for linear in linears))
        biases = self.form.join_bias(self.gate_bias, self.up_bias, self.down_bias)
        for linear, bias in zip(linears, biases, strict=True):
            linear.bias = None if bias is None else nn.Parameter(bias.clone())  # type: ignore[assignment]
        for first in range(0, neurons, _BLOCK_ROWS):
            rows = slice(first, first + _BLOCK_ROWS)
            parts = zip((gate, up, down.t()), planes.rounded(rows), strict=True)
            for weight, part in parts:
                if weight is not None and part is not None:
                    weight[rows] = part.values().to(self.dtype)
        module = shallow(self._float[0])
        module._modules.update(zip(self.form.projections, linears, strict=True))
        return module.train(self.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states [..., H] to the FFN's output [..., H], of their dtype.

        Raises:
            ConfigError: the input has another last dimension.
            SparseRuntimeError: a gradient is asked for.
        """
        return self.all_neurons(hidden_states, "auto")

    def all_neurons(self, hidden_states: Tensor, backend: str, *choice: Tensor) -> Tensor:
        """The same by one of ``BACKENDS``."""
        x = self._input(hidden_states, self.hidden_size)
        return self.all_rows(x, backend, *choice).reshape(hidden_states.shape)

    def all_rows(self, x: Tensor, backend: str, *choice: Tensor) -> Tensor:
        """The same of hidden states [n, H], without a check."""
        output = dense_plane_ffn(x, self.planes, backend=backend)
        return output if self.down_bias is None else output + self.down_bias.to(output.dtype)

    def extra_repr(self) -> str:
        """Sizes, activation and format."""
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"activation={self.activation}, {self._bits()}"
        )


def _float_linear(size: int, rows: int, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """A linear layer [size → rows] without a bias, of no value yet."""
    return nn.utils.skip_init(nn.Linear, size, rows, bias=False, dtype=dtype, device=device)


def shallow(module: nn.Module) -> nn.Module:
    """The same module, whose children and parameters can be exchanged."""
    twin = copy.copy(module)
    state = twin.__dict__
    state.update({key: value.copy() for key, value in state.items() if isinstance(value, dict)})
    for name in DISPATCHED:
        state.pop(name, None)
    return twin


def _without_projections(layer: FFNLayer) -> nn.Module:
    """An FFN with its config, activation and class, that holds no weights."""
    module = shallow(layer.mlp)
    own = module._parameters if layer.experts else module._modules
    own.update(dict.fromkeys(layer.projections))
    return module
