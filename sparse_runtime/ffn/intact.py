"""Whether the kernels may still stand in for an FFN's projections.

Sparse FFNs go by number, because torch 2.10 takes no module for the argument of what it calls while it
traces.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch

from sparse_runtime.config import SparseConfig
from sparse_runtime.errors import BackendUnavailableError
from sparse_runtime.ffn.buffers import FFNBuffers
from sparse_runtime.ffn.model_state import ModelState

_BY_KEY: WeakValueDictionary[int, Any] = WeakValueDictionary()
_KEYS = itertools.count()


def key_for(ffn: Any, key: int) -> int:
    """The number of a sparse FFN: the one it says, or a new one for a new one or a copy."""
    if _BY_KEY.get(key) is not ffn:
        key = next(_KEYS)
        _BY_KEY[key] = ffn
    return key


@torch.compiler.assume_constant_result
def is_intact_now(key: int) -> bool:
    """Whether the kernels may stand in for an FFN's projections, asked once while torch traces."""
    intact: bool = _BY_KEY[key]._is_intact_now()
    return intact


class WatchedFFN(FFNBuffers):
    """A sparse FFN that notices what happens to its projections.

    Attributes:
        name: of the FFN in the model.
        config: options of ``sparsify``.
        state: what the model's sparse FFNs share.
        problem: why the FFN runs as it stands; None if it does not, as far as is known.
    """

    name: str
    config: SparseConfig
    state: ModelState
    problem: str | None
    _key: int
    _seen: Any
    _operands: Any

    def adopt(self) -> Any:
        """Take the projections as they are now; None where the kernels cannot stand in for them."""
        raise NotImplementedError

    def forget(self) -> None:
        """Look at the projections anew in the next call: one of them was put in its place."""
        self._seen = self._operands = None

    def _is_intact(self) -> bool:
        """Whether the kernels may stand in for the projections; notices what was changed."""
        if torch.compiler.is_compiling():
            # Looked at while torch traces; what is traced then guards hooks and modules.
            return (
                is_intact_now(self._key) and self._seen is not None and self._seen.change() is None
            )
        return self._is_intact_now()

    def _is_intact_now(self) -> bool:
        seen = self._seen
        if seen is not None and seen.is_current():
            return True
        if seen is None or seen.is_stale():
            seen = self.adopt()
        reason = self.problem or "it is being changed" if seen is None else seen.change()
        if reason is not None:
            self.stand_back(reason)
        return reason is None

    def stand_back(self, reason: str = "") -> None:
        """Warn that the FFN runs as it stands, the first time; raise if the config is strict."""
        reason = reason or (self._seen and self._seen.change()) or "it is being changed"
        message = f"{self.name} runs as it stands (dense): {reason}"
        if self.config.strict:
            raise BackendUnavailableError(
                f"{message}; undo that, merge adapters, or sparsify without strict"
            )
        self.state.warn_once(
            "patched",
            f"{message}. For its effect at sparse speed, undo it or merge it into the weights, and "
            "call unsparsify and sparsify again",
        )
