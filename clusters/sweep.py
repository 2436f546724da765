"""Windows of text on their way through a model's decoder, one decoder layer at a time.

All windows pass a layer before the first one enters the next, so that a layer's weights are needed
once: of a model whose layers accelerate has left on the disk, one at a time is in memory. Backward
passes run the same way from the last layer to the first, each layer's forward anew from the inputs
that were kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from sparse_runtime.clusters.buffers import Buffers
from sparse_runtime.errors import UnsupportedArchitectureError
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import decoder_layers, decoder_of
from sparse_runtime.models.onloading import is_offloaded, onloaded
from sparse_runtime.models.output_head import swapped_forwards
from sparse_runtime.progress import Advance

#: Number of a part -> a context that the part runs inside of.
Around = Callable[[int], AbstractContextManager[Any]]

# Model -> how its decoder's layers are called, None where it is more than their sequence.
_KINDS: WeakKeyDictionary[nn.Module, _Kind | None] = WeakKeyDictionary()
# Tokens that this is tried on.
_TRIED = 8


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass(frozen=True)
class _Kind:
    """How the layers of a decoder are called.

    Attributes:
        name: of the hidden states' argument; None if it is the first positional one.
        outputs: length of the tuple that a layer gives, hidden states first; 0 if it gives a tensor.
    """

    name: str | None
    outputs: int

    def split(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, _Call]:
        """The hidden states of a layer's call, and the rest of it."""
        if self.name is None:
            return arguments[0], _Call(arguments[1:], options)
        others = {name: value for name, value in options.items() if name != self.name}
        return options[self.name], _Call(arguments, others)

    def call(self, layer: nn.Module, states: Tensor, call: _Call) -> Tensor:
        """What a layer makes of hidden states."""
        if self.name is None:
            output = layer(states, *call.arguments, **call.options)
        else:
            output = layer(*call.arguments, **call.options, **{self.name: states})
        found: Tensor = output[0] if self.outputs else output
        return found

    def output(self, states: Tensor) -> Any:
        """Hidden states as a layer gives them."""
        return (states, *[None] * (self.outputs - 1)) if self.outputs else states


@dataclass(frozen=True)
class _Call:
    """What a layer is called with beside hidden states."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Sweep:
    """Runs windows of one length through a decoder, part by part.

    A part is a decoder layer. Where a decoder is more than the sequence of its layers (tried on a few
    tokens), all of it is the only part, and its weights must be in memory.

    Args:
        model: a causal language model; what is patched into its layers runs.
        windows: token ids [W, window] int64.
        buffers: where hidden states are kept.

    Attributes:
        parts: modules, in the order in which they run.
        states: hidden states [W, 1, window, H] that the next part gets; of the only part none.
    """

    def __init__(self, model: Any, windows: Tensor, buffers: Buffers) -> None:
        self._decoder = decoder_of(model)
        self._windows = windows[:, None].to(model.device)
        self._buffers = buffers
        self._inputs = self.states = torch.empty(0)
        self._calls: list[_Call] = []
        self._of_window: int | None = None
        self.parts: Sequence[nn.Module] = [self._decoder]
        if model not in _KINDS:
            _KINDS[model] = _tried(model, self._windows[0, :, :_TRIED])
        self._kind = _KINDS[model]
        if self._kind is not None:
            self.parts = decoder_layers(model)
            self._begin()
        elif is_offloaded(model):
            raise UnsupportedArchitectureError(
                f"the decoder of this {type(model).__name__} is more than the sequence of its layers, "
                "so that these cannot be loaded one at a time; load the model without offloading "
                "(device_map='cpu')"
            )

    @property
    def whole(self) -> bool:
        """Whether the decoder is the only part."""
        return self.parts[0] is self._decoder

    @property
    def steps(self) -> int:
        """Windows times parts, what one pass advances by."""
        return len(self.parts) * len(self._windows)

    def owners(self, layers: Sequence[FFNLayer]) -> list[list[int]]:
        """Of each part, the positions of its FFNs among a model's."""
        if self.whole:
            return [[*range(len(layers))]]
        numbers = {id(part): number for number, part in enumerate(self.parts)}
        owned: list[list[int]] = [[] for _ in self.parts]
        for position, layer in enumerate(layers):
            owned[numbers[id(layer.decoder_layer)]].append(position)
        return owned

    def run(self, number: int, window: int, states: Tensor | None = None) -> Tensor:
        """What a part makes of a window's hidden states [1, window, H].

        Args:
            number: of the part, which is in memory.
            window: its number.
            states: :attr:`states` if None.
        """
        part = self.parts[number]
        if self._kind is None:
            output: Tensor = part(input_ids=self._windows[window], use_cache=False)[0]
            return output
        device = next(part.parameters()).device
        call = self._call_of(number, window)
        call = _Call(*send_to_device((call.arguments, call.options), device))
        x = self.states[window] if states is None else states
        return self._kind.call(part, x.to(device), call)

    def step(self, number: int, window: int) -> None:
        """Go on to a part's outputs."""
        found = self.run(number, window)
        if self.whole and window == 0:
            self.states = self._buffers.new((len(self._windows), *found.shape), found.dtype)
        self.states[window] = found

    @torch.no_grad()
    def forward(
        self,
        around: Around | None = None,
        *,
        first: int = 0,
        keep: bool = False,
        ran: Callable[[int, int], None] | None = None,
        advance: Advance | None = None,
    ) -> None:
        """Run all windows through the parts; :meth:`final` has what comes out.

        Args:
            around: what a part runs inside of, once its weights are in memory.
            first: part to begin with; :attr:`states` are its inputs.
            keep: the inputs of every part, for :meth:`backward`.
            ran: called after each window, with the part's number and the window's.
            advance: told of each part's window.
        """
        if keep and not self.whole:
            shape = len(self.parts), *self.states.shape
            self._inputs = self._buffers.new(shape, self.states.dtype)
        for number in range(first, len(self.parts)):
            if keep and not self.whole:
                self._inputs[number] = self.states
            with self.entered(number, around):
                for window in range(len(self._windows)):
                    self.step(number, window)
                    if ran is not None:
                        ran(number, window)
                    if advance is not None:
                        advance(1)

    def final(self, window: int, states: Tensor | None = None) -> Tensor:
        """The decoder's last hidden states of a window [window, H], from the last part's outputs.

        Args:
            window: its number.
            states: the outputs [1, window, H]; :attr:`states` if None.
        """
        x = self.states[window] if states is None else states
        if self._kind is None:
            return x[0]
        output = self._kind.output(x.to(self._windows.device))
        with swapped_forwards(dict.fromkeys(self.parts, lambda *_, **__: output)):
            found: Tensor = self._decoder(input_ids=self._windows[window], use_cache=False)[0]
        return found[0]

    def backward(
        self,
        loss: Callable[[int, Tensor], Tensor],
        around: Around | None = None,
        *,
        ran: Callable[[int, int], None] | None = None,
        advance: Advance | None = None,
    ) -> None:
        """Run backward passes of all windows, after a :meth:`forward` that kept inputs.

        The model's parameters must not need gradients; what ``around`` puts in may have some that do,
        and hooks.

        Args:
            loss: of a window's number and last hidden states [window, H], whose gradient is taken.
            around, ran, advance: as of :meth:`forward`; the forward that they see is the one with
                gradients.
        """
        gradients = self._buffers.new(self.states.shape, self.states.dtype)
        for window in range(len(self._windows)):
            leaf = self.states[window].to(self._windows.device, copy=True).requires_grad_()
            loss(window, self.final(window, leaf)).backward()
            assert leaf.grad is not None
            gradients[window] = leaf.grad
        for number in reversed(range(len(self.parts))):
            with self.entered(number, around), self._embedding_gradients():
                for window in range(len(self._windows)):
                    x = (
                        None
                        if self.whole
                        else self._inputs[number][window].clone().requires_grad_()
                    )
                    found = self.run(number, window, x)
                    found.backward(gradients[window].to(found.device))
                    if x is not None:
                        assert x.grad is not None
                        gradients[window] = x.grad
                    if ran is not None:
                        ran(number, window)
                    if advance is not None:
                        advance(1)

    def _begin(self) -> None:
        """Set :attr:`states` to what the first layer gets."""
        for window in range(len(self._windows)):
            # Windows of one length mostly get the same masks and positions.
            everything = window in (0, len(self._windows) - 1)
            states, calls = self._recorded(window, everything=everything)
            if window == 0:
                self.states = self._buffers.new((len(self._windows), *states.shape), states.dtype)
                self._calls = calls
            elif everything and not _alike(calls, self._calls):
                self._of_window = window
                self._calls = calls
            self.states[window] = states

    def _call_of(self, number: int, window: int) -> _Call:
        if self._of_window not in (None, window):
            self._of_window = window
            self._calls = self._recorded(window, everything=True)[1]
        return self._calls[number]

    @torch.no_grad()
    def _recorded(self, window: int, *, everything: bool) -> tuple[Tensor, list[_Call]]:
        """What the first layer gets, and what every layer is called with beside that."""
        kind = self._kind
        assert kind is not None
        first: list[Tensor] = []
        calls: list[_Call] = []

        def record(*arguments: Any, **options: Any) -> Any:
            states, beside = kind.split(arguments, options)
            first.append(states)
            calls.append(beside)
            if not everything or len(calls) == len(self.parts):
                raise _Stop
            return kind.output(states)

        with swapped_forwards(dict.fromkeys(self.parts, record)), suppress(_Stop):
            self._decoder(input_ids=self._windows[window], use_cache=False)
        return first[0], calls

    @contextmanager
    def entered(self, number: int, around: Around | None = None) -> Iterator[None]:
        """Have a part in memory inside the context, and run it inside of ``around``."""
        with onloaded(self.parts[number]), around(number) if around else nullcontext():
            yield

    @contextmanager
    def _embedding_gradients(self) -> Iterator[None]:
        """Gradients reach the only part through its embeddings."""
        if not self.whole:
            yield
            return
        handle = self._decoder.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
            lambda module, arguments, output: output.requires_grad_(True)
        )
        try:
            yield
        finally:
            handle.remove()


def _tried(model: Any, ids: Tensor) -> _Kind | None:
    """How a decoder's layers are called; None if they do not give what the decoder does.

    Args:
        model: a causal language model.
        ids: of some tokens [1, n] int64.
    """
    decoder, layers = decoder_of(model), decoder_layers(model)
    order: list[nn.Module] = []
    kinds: list[_Kind] = []

    def note(layer: nn.Module, arguments: Any, options: dict[str, Any], output: Any) -> None:
        order.append(layer)
        of_arguments = bool(arguments) and isinstance(arguments[0], Tensor)
        name = None if of_arguments else "hidden_states"
        kinds.append(_Kind(name, len(output) if isinstance(output, tuple) else 0))

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            expected = decoder(input_ids=ids, use_cache=False)[0]
    finally:
        for handle in handles:
            handle.remove()
    if not kinds or order != [*layers] or len(set(kinds)) > 1:
        return None
    _KINDS[model] = kinds[0]
    try:
        with Buffers() as buffers, torch.no_grad():
            sweep = Sweep(model, ids, buffers)
            sweep.forward()
            found = sweep.final(0)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError):
        return None
    same = torch.allclose(found.float(), expected[0].float(), rtol=1e-3, atol=1e-3, equal_nan=True)
    return kinds[0] if same else None


def _alike(one: Any, other: Any) -> bool:
    """Whether calls are the same, tensors by their values."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, _Call):
        return _alike((one.arguments, one.options), (other.arguments, other.options))
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    return bool(one == other)
