"""Opponents, judged by masks on the dense model (see ``sparse_runtime.eval.masked_ffn``).

TEAL and CATS are thresholds on what the FFN computes anyway; Deja Vu trains a predictor
(``sparse_runtime.eval.deja_vu``). All are fitted on the dense model's hidden states on calibration
text, so that the expected cost share is the budget, and none is fine-tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_runtime.architectures import FFNLayer, find_ffn_layers
from sparse_runtime.clusters.capture import HiddenStates, capture_hidden_states
from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.deja_vu import DejaVu
from sparse_runtime.eval.masked_ffn import Baseline, MaskedOutput, Masks, threshold_for
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS
from sparse_runtime.progress import ProgressReporter, SilentProgress

# Thresholds come from so many tokens, spread over the calibration text: a layer's mean density varies
# by 0.1 / √4096 or so, less than one text differs from another.
_THRESHOLD_TOKENS = 4096


@dataclass(frozen=True)
class TealMasks:
    """Thresholds of one layer: what is not above them in magnitude counts as zero.

    Attributes:
        x_threshold: on entries of the hidden state; skips columns of gate and up.
        h_threshold: on entries of the activation; skips rows of transposed down.
    """

    x_threshold: float
    h_threshold: float

    def __call__(self, layer: FFNLayer, x: Tensor) -> MaskedOutput:
        """Run the layer's FFN on hidden states [n, H]."""
        kept_x = x.abs() > self.x_threshold
        h = _activation(layer, x * kept_x)
        kept_h = h.abs() > self.h_threshold
        cost = (2 * kept_x.float().mean(-1) + kept_h.float().mean(-1)) / 3
        return MaskedOutput(layer.down(h * kept_h), cost, None)


class Teal:
    """TEAL (arXiv 2408.14690), with one sparsity for all layers and matrices.

    The paper also searches a sparsity for each matrix; that search is left out.
    """

    name = "teal"

    def least_share(self, layer: FFNLayer) -> float:
        """Nothing is read but what is kept."""
        return 0.0

    def fit(self, layer: FFNLayer, states: Tensor, budgets: list[float]) -> list[Masks]:
        """Thresholds of each budget: as large a share of x and of h is kept."""
        x = _sample(layer, states)
        masks: list[Masks] = []
        for budget in budgets:
            x_threshold = threshold_for(x.abs(), budget)
            # Of the h that the masked x gives: it is smaller than the dense one.
            h = _activation(layer, x * (x.abs() > x_threshold))
            masks.append(TealMasks(x_threshold, threshold_for(h.float().abs(), budget)))
        return masks


@dataclass(frozen=True)
class CatsMasks:
    """Threshold of one layer on |act(gate·x)|; up and down are read for the neurons above it."""

    threshold: float

    def __call__(self, layer: FFNLayer, x: Tensor) -> MaskedOutput:
        """Run the layer's FFN on hidden states [n, H]."""
        gate = ACTIVATION_FUNCTIONS[layer.activation](layer.gate(x))
        kept = gate.abs() > self.threshold
        computed = kept.float().mean(-1)
        output = layer.down(gate * kept * layer.up(x))
        return MaskedOutput(output, (1 + 2 * computed) / 3, computed)


class Cats:
    """CATS (arXiv 2404.08763): the gate is computed in full and tells what else to skip."""

    name = "cats"

    def least_share(self, layer: FFNLayer) -> float:
        """The gate is a third of the FFN."""
        return 1 / 3

    def fit(self, layer: FFNLayer, states: Tensor, budgets: list[float]) -> list[Masks]:
        """Thresholds of each budget: (3·budget − 1)/2 of the neurons are kept."""
        act = ACTIVATION_FUNCTIONS[layer.activation]
        gate = act(layer.gate(_sample(layer, states))).float().abs()
        return [CatsMasks(threshold_for(gate, (3 * budget - 1) / 2)) for budget in budgets]


#: Name on the command line -> the method with its default settings.
BASELINES: dict[str, Callable[[], Baseline]] = {"teal": Teal, "cats": Cats, "deja-vu": DejaVu}


def check_baselines(names: Sequence[str]) -> None:
    """Check that there are baselines of these names.

    Raises:
        ConfigError: there is none of a name.
    """
    for name in names:
        if name not in BASELINES:
            raise ConfigError(f"baseline is {name!r}; expected some of {', '.join(BASELINES)}")


@contextmanager
def captured_states(
    model: nn.Module, windows: Tensor, *, progress: ProgressReporter | None = None
) -> Iterator[HiddenStates]:
    """Capture the FFN inputs of a dense model in a temporary folder, gone after the context.

    Args:
        model: a dense causal language model.
        windows: calibration text [W, window] int64. 16,384 tokens take 570 MB of disk for 30 layers
            and hidden size 576.
        progress: reports one unit per window.

    Raises:
        OutputFolderError: there is no room for them.
    """
    with TemporaryDirectory(prefix="sparse-runtime-") as folder:
        yield capture_hidden_states(model, windows, Path(folder), progress=progress)


def fit_baseline(
    model: nn.Module,
    baseline: Baseline,
    states: HiddenStates,
    budgets: Sequence[float],
    *,
    progress: ProgressReporter | None = None,
) -> list[dict[int, Masks]]:
    """Fit a baseline on every layer of a dense model.

    Args:
        model: the model that the states were captured from.
        baseline: the method.
        states: FFN inputs on calibration text.
        budgets: expected cost shares.
        progress: reports one unit per layer.

    Returns:
        For each budget, layer index -> masks.

    Raises:
        ConfigError: the baseline cannot meet a budget.
    """
    layers = find_ffn_layers(model)
    for budget in budgets:
        for layer in layers:
            least = baseline.least_share(layer)
            if not least < budget <= 1:
                raise ConfigError(
                    f"budget is {budget!r}; expected a cost share above {least:.3f}, which "
                    f"{baseline.name} reads whatever it skips, and at most 1"
                )
    fitted: list[dict[int, Masks]] = [{} for _ in budgets]
    with (progress or SilentProgress()).task(f"fit {baseline.name}", len(layers)) as advance:
        for position, layer in enumerate(layers):
            # Training needs gradients, also where the caller has turned them off.
            with torch.inference_mode(False), torch.no_grad():
                inputs = states.layer(position, dtype=torch.bfloat16)
                fits = baseline.fit(layer, inputs, list(budgets))
            for masks, fit in zip(fitted, fits, strict=True):
                masks[layer.index] = fit
            advance(1)
    return fitted


def _sample(layer: FFNLayer, states: Tensor) -> Tensor:
    """Tokens spread over the states, as the layer takes them [n, H]."""
    return states[:: -(-len(states) // _THRESHOLD_TOKENS)].to(layer.gate.weight)


def _activation(layer: FFNLayer, x: Tensor) -> Tensor:
    act = ACTIVATION_FUNCTIONS[layer.activation]
    return act(F.linear(x, layer.gate.weight)) * F.linear(x, layer.up.weight)
