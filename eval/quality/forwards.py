"""Stand-ins for the forward of a model's FFNs, and the decode-only protocol.

A prompt runs dense at run time and only the tokens generated after it run sparsely. One pass over a
window gives the same figures: attention is causal, so it is enough that every FFN runs the window's
first tokens densely and the rest sparsely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_runtime.api import sparse_modules
from sparse_runtime.ffn.sparse_experts import SparseExperts, SparsePlaneExperts
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.models.ffn_forms import FFNForm
from sparse_runtime.models.output_head import swapped_forwards

#: Hidden states [B, T, H] -> the FFN's output [B, T, H]; experts also take index and weights [B, T, k].
Forward = Callable[..., Tensor]


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

    def forward(*given: Tensor) -> Tensor:
        # Contiguous, as Conv1D asks for it.
        prompts = [values[:, :prompt_tokens].contiguous() for values in given]
        rests = [values[:, prompt_tokens:].contiguous() for values in given]
        if rests[0].shape[1] == 0:
            return dense(*prompts)
        return torch.cat([dense(*prompts), sparse(*rests)], dim=1)

    return forward


def in_sequences(forward: Forward, module: nn.Module, form: FFNForm, stack: ExitStack) -> Forward:
    """Make a forward of sequences [B, T, H] one of an FFN that may get them in a row [B·T, H].

    OPT does that to the FFN written out in its decoder layer, and every mixture to its experts.

    Args:
        forward: of sequences.
        module: the FFN, or the larger module around it, whose calls say what B and T are.
        form: of the FFN.
        stack: for how long the module's calls are watched.
    """
    if form.inline is None and form.kind != "experts":
        return forward
    shapes: list[torch.Size] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        shapes[:] = [next(given).shape[:-1]]

    stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)

    def in_a_row(*given: Tensor) -> Tensor:
        parts = (values.reshape(*shapes[0], values.shape[-1]) for values in given)
        return forward(*parts).reshape(given[0].shape)

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
            dense, sparse, around = _counted_dense(module), module.forward, module.owner
            if isinstance(module, (SparseExperts, SparsePlaneExperts)):
                dense, sparse, around = _flat(dense), _flat(sparse), module.decoder_layer
            forward = after_prompt(prompt_tokens, dense, sparse)
            forwards[module] = in_sequences(forward, around, module.form, stack)
        stack.enter_context(swapped_forwards(forwards))
        yield


def _counted_dense(module: SparseFFN) -> Forward:
    def forward(hidden_states: Tensor, *choice: Tensor) -> Tensor:
        module.count_dense("long call", hidden_states.shape[:-1].numel())
        return module.dense(hidden_states, *choice)

    return forward


def _flat(forward: Forward) -> Forward:
    """Of tokens in a row, as experts take them."""

    def flat(*given: Tensor) -> Tensor:
        return forward(*(values.flatten(0, -2) for values in given)).reshape(given[0].shape)

    return flat
