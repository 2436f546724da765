"""A mixture of experts out of a dense model: same weights, split, routed and fitted again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.clusters.capture import capture_hidden_states
from sparse_runtime.clusters.seeding import layer_generator
from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.quality.perplexity import score_text
from sparse_runtime.eval.quality.rows import distance
from sparse_runtime.eval.upcycling.distilling import distill
from sparse_runtime.eval.upcycling.layer_experts import fit_experts
from sparse_runtime.eval.upcycling.mixtral import as_mixtral, check_dense, prove_form
from sparse_runtime.progress import ProgressReporter, SilentProgress


@dataclass(frozen=True)
class UpcycleConfig:
    """What the mixture is to be.

    Attributes:
        experts: of each layer, a divisor of its number of neurons.
        active: experts that a token takes.
        distill: steps that tune the experts by KL to the dense model's predictions, a window each.
        seed: of everything that is drawn.

    Raises:
        ConfigError: a value is out of range.
    """

    experts: int = 8
    active: int = 4
    distill: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise ConfigError(f"experts is {self.experts}; expected 2 or more")
        if not 1 <= self.active <= self.experts:
            raise ConfigError(
                f"active is {self.active}; expected 1 to the number of experts, {self.experts}"
            )
        if self.distill < 0:
            raise ConfigError(f"distill is {self.distill}; expected 0 or more")


def upcycle(
    model: Any,
    windows: Tensor,
    config: UpcycleConfig,
    *,
    work: Path,
    progress: ProgressReporter | None = None,
) -> tuple[Any, list[dict[str, Any]]]:
    """Make a Mixtral of a dense model with gated FFNs.

    Args:
        model: a causal language model in float32; stays as it is, and shares all parameters outside of
            FFNs with the result.
        windows: token ids of calibration text [W, window] int64.
        config: of the mixture.
        work: folder for hidden states, two bytes times layers, tokens and hidden size; removed.
        progress: draws bars.

    Returns:
        A ``MixtralForCausalLM``; of each layer its ``load``, the share of the calibration tokens
        that take each expert, and ``error``, the squared relative error of its output, before
        distillation.

    Raises:
        ConfigError, UnsupportedArchitectureError, NothingMatchedError: it cannot be made of this
            model; see ``check_dense`` and ``prove_form``.
        ModelError, OutputFolderError: see ``capture_hidden_states``.
    """
    layers = check_dense(model, config.experts)
    prove_form(model, layers, config.experts, windows[0])
    progress = progress or SilentProgress()
    try:
        states = capture_hidden_states(model, windows, work, progress=progress)
        fitted = []
        with progress.task("experts", len(layers)) as advance:
            for position, layer in enumerate(layers):
                own = states.layer(position).to(layer.device)
                generator = layer_generator(config.seed, layer.index)
                fitted.append(fit_experts(layer, own, config.experts, config.active, generator))
                advance(1)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    mixture = as_mixtral(model, layers, fitted, config.active)
    if config.active < config.experts:
        distill(mixture, model, windows, steps=config.distill, progress=progress)
    return mixture, [
        {"layer": layer.index, "load": list(own.load), "error": own.error}
        for layer, own in zip(layers, fitted, strict=True)
    ]


@torch.no_grad()
def round_to(mixture: Any, dtype: torch.dtype) -> None:
    """Round a mixture's parameters to what a checkpoint of this dtype keeps; they stay float32."""
    for parameter in mixture.parameters():
        parameter.data = parameter.to(dtype).float()


def compare(
    dense: Any,
    mixture: Any,
    tokens: Tensor,
    *,
    window: int,
    progress: ProgressReporter | None = None,
) -> dict[str, Any]:
    """How far a mixture is from its dense model on held-out tokens [n]; see ``rows.distance``."""
    reference = score_text(
        dense, tokens, window=window, keep=True, progress=progress, description="dense"
    )
    score = score_text(
        mixture,
        tokens,
        window=window,
        reference=reference,
        progress=progress,
        description="mixture",
    )
    return distance(score, reference)
