"""Stand-ins for the forward of a model's FFNs, and the decode-only protocol.

A prompt runs dense at run time and only the tokens generated after it run sparsely. One pass over a
window gives the same figures: attention is causal, so it is enough that every FFN runs the window's
first tokens densely and the rest sparsely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_runtime.api import sparse_modules
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.models.ffn_forms import FFNForm

#: Hidden states [B, T, H] -> the FFN's output [B, T, H].
Forward = Callable[[Tensor], Tensor]


@contextmanager
def swapped_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Run modules by other forwards inside the context; afterwards they are what they were."""
    # accelerate keeps a forward of its own on the instance; elsewhere there is only the class's.
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def after_prompt(prompt_tokens: int, dense: Forward, sparse: Forward) -> Forward:
    """Make a forward that is dense for each sequence's first tokens and sparse for the rest.

    Args:
        prompt_tokens: length of the dense part. Every call is taken to start at the first token of
            its sequences, so calls that go on from a cache do not fit.
        dense: of the prompt.
        sparse: of the rest.
    """
    if prompt_tokens == 0:
        return sparse

    def forward(hidden_states: Tensor) -> Tensor:
        parts = hidden_states[:, :prompt_tokens], hidden_states[:, prompt_tokens:]
        prompt, rest = (part.contiguous() for part in parts)  # Conv1D asks for it
        if rest.shape[1] == 0:
            return dense(prompt)
        return torch.cat([dense(prompt), sparse(rest)], dim=1)

    return forward


def in_sequences(forward: Forward, module: nn.Module, form: FFNForm, stack: ExitStack) -> Forward:
    """Make a forward of sequences [B, T, H] one of an FFN that may get them in a row [B·T, H].

    OPT does that to the FFN written out in its decoder layer.

    Args:
        forward: of sequences.
        module: the FFN, or the larger module, whose calls say what B and T are.
        form: of the FFN.
        stack: for how long the module's calls are watched.
    """
    if form.inline is None:
        return forward
    shapes: list[torch.Size] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        shapes[:] = [next(given).shape[:-1]]

    stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)

    def in_a_row(hidden_states: Tensor) -> Tensor:
        size = hidden_states.shape[-1]
        return forward(hidden_states.reshape(*shapes[0], size)).reshape(hidden_states.shape)

    return in_a_row


@contextmanager
def dense_prompts(model: nn.Module, prompt_tokens: int) -> Iterator[None]:
    """Run the first tokens of every sequence densely in a sparse model, inside the context.

    Args:
        model: sparse, with ``prefill="sparse"``.
        prompt_tokens: tokens of each sequence that are its prompt; 0 changes nothing.

    Raises:
        NotSparseError: the model holds no sparse FFN.
    """
    if prompt_tokens == 0:
        yield
        return
    with ExitStack() as stack:
        forwards: dict[nn.Module, Forward] = {}
        for module in sparse_modules(model):
            forward = after_prompt(prompt_tokens, _counted_dense(module), module.forward)
            forwards[module] = in_sequences(forward, module.owner, module.form, stack)
        stack.enter_context(swapped_forwards(forwards))
        yield


def _counted_dense(module: SparseFFN) -> Forward:
    def forward(hidden_states: Tensor) -> Tensor:
        module.count_dense("long call", hidden_states.shape[:-1].numel())
        return module.dense(hidden_states)

    return forward
