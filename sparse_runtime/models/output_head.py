"""From a decoder's last hidden states to logits, as the model itself does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from sparse_runtime.errors import UnsupportedArchitectureError
from sparse_runtime.models.ffn_layers import decoder_of

#: Last hidden states [..., H] -> logits [..., V].
OutputHead = Callable[[Tensor], Tensor]

# Whether a model's logits are those of its output embeddings alone.
_PLAIN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
# Tokens that this is tried on.
_TRIED = 3


class _Output(BaseModelOutputWithPast):
    """A decoder's output with nothing but states: of whatever else it could have it has None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def output_head(model: Any) -> OutputHead:
    """What makes logits of a model's last hidden states.

    Its output embeddings, where logits are no more than that, which is tried; else the model's own
    forward, in which they may be scaled or bounded (Cohere's, Granite's, Gemma 2's).

    Args:
        model: a causal language model.

    Raises:
        UnsupportedArchitectureError: its forward cannot be run on hidden states, or see
            :func:`sparse_runtime.models.ffn_layers.decoder_of`.
    """
    head = model.get_output_embeddings()
    decoder = decoder_of(model)

    def own(states: Tensor) -> Tensor:
        rows = states.reshape(1, -1, states.shape[-1])
        ids = torch.zeros(rows.shape[:2], dtype=torch.int64, device=states.device)
        result = _Output(last_hidden_state=rows)
        with swapped_forwards({decoder: lambda *_, **__: result}):
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.reshape(*states.shape[:-1], -1)

    if model not in _PLAIN:
        _PLAIN[model] = _is_plain(model, head, own)
    return head if _PLAIN[model] else own


def _is_plain(model: Any, head: Any, own: OutputHead) -> bool:
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in head.parameters() if p.device.type != "meta"), None)
    states = 30 * torch.randn(_TRIED, head.in_features, generator=generator)
    states = states.to(device=device or model.device, dtype=model.dtype)
    try:
        with torch.no_grad():
            found = own(states)
            expected: Tensor = head(states)
    except Exception as error:
        raise UnsupportedArchitectureError(
            f"the logits of {type(model).__name__} cannot be made of its decoder's last hidden states "
            f"alone: {error!r}"
        ) from error
    return torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-3)


@contextmanager
def swapped_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
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
