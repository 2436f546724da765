"""Run-time options of ``sparsify``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparse_runtime.errors import ConfigError
from sparse_runtime.kernels import BACKENDS


@dataclass(frozen=True)
class SparseConfig:
    """How a sparse model runs.

    Args:
        backend: kernel backend; ``auto`` picks the best one for the device.
        strict: raise where the backend asked for cannot run, instead of falling back with a warning.
        prefill: ``dense`` runs calls of more than ``max_sparse_tokens`` tokens through the original
            FFN; ``sparse`` routes every token of every call (evaluation does).
        max_sparse_tokens: largest number of tokens in one call (batch · sequence) that is run
            sparsely when ``prefill`` is ``dense``.
        check_fingerprint: refuse an artifact that was built for other weights.
    """

    backend: str = "auto"
    strict: bool = False
    prefill: Literal["dense", "sparse"] = "dense"
    max_sparse_tokens: int = 16
    check_fingerprint: bool = True

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend is {self.backend!r}; expected one of {', '.join(BACKENDS)}")
        if self.prefill not in ("dense", "sparse"):
            raise ConfigError(f"prefill is {self.prefill!r}; expected 'dense' or 'sparse'")
        if self.max_sparse_tokens < 1:
            raise ConfigError(f"max_sparse_tokens is {self.max_sparse_tokens}; expected 1 or more")
