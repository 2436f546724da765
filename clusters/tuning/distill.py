"""Distillation: what a sparse model leaves out, made good against the dense model's own predictions.

Tuned are a shift of each cluster's bias and a low-rank correction per layer, by Adam on

    KL(dense ‖ sparse) = Σ_v p_dense(v)·ln(p_dense(v)/p_sparse(v)), mean over tokens,

never the model's weights. Routers and sets stay as they are: neither argmax nor a look has a gradient.

Steps are relative to what each layer leaves out, so that they suit any model. Windows that are not
tuned on tell how it goes: the best state by them is kept, whatever comes after it.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.layer_clusters import LayerClusters
from sparse_runtime.clusters.capture import not_finite
from sparse_runtime.clusters.fisher import checkpointed
from sparse_runtime.clusters.ranks import Ranks, joined
from sparse_runtime.clusters.tuning.student import (
    DenseStates,
    StudentFFN,
    divergence,
    measure_scales,
    students,
)
from sparse_runtime.files import write_tensors
from sparse_runtime.progress import ProgressReporter, SilentProgress

#: Steps between two looks at the held-out windows; the state is written to disk then.
CHECK_EVERY = 10
# Tokens that scales are measured on.
_SCALE_TOKENS = 1024
# A gradient counts up to so many times the median of so many steps before it.
_MOST_OF_USUAL, _USUAL_STEPS = 2.0, 20


@dataclass(frozen=True)
class Distillation:
    """Settings of :func:`distill`.

    Args:
        steps: of Adam.
        rank: of the correction, 0 for none.
        step_tokens: tokens per step, whole windows.
        learning_rate: peak of a cosine schedule with ten steps of warm-up, in units of what each
            layer leaves out (``StudentFFN.output_scale``).
        cluster_share: of that rate for each cluster's own part of the shift, which few tokens tell of.
        seed: of the text's order and the correction's start.
    """

    steps: int = 60
    rank: int = 0
    step_tokens: int = 1024
    learning_rate: float = 0.02
    cluster_share: float = 0.25
    seed: int = 0


@dataclass
class TuningHistory:
    """How a distillation went.

    Attributes:
        divergence: of each step's windows before the step, in nats per token.
        held_out: step → divergence of the held-out windows after so many steps.
    """

    divergence: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)

    @property
    def best_step(self) -> int:
        """The number of steps after which held-out text diverged least."""
        return min(self.held_out, key=lambda step: (self.held_out[step], step))


def distill(
    model: Any,
    clusters: ClusterSet,
    windows: Tensor,
    held_out: Tensor,
    config: Distillation,
    *,
    dense_states: DenseStates | None = None,
    state_file: Path | None = None,
    ranks: Ranks | None = None,
    progress: ProgressReporter | None = None,
) -> tuple[ClusterSet, TuningHistory]:
    """Tune an artifact's compensation; resumable.

    Args:
        model: the dense model, dense again when this returns.
        clusters: cut for the budget to distill at, beside the correction (:func:`reserved`).
        windows: token ids [W, window] int64, taken in a shuffled order, again if they run out.
        held_out: token ids [V, window] int64 of other text, which picks the state that is kept.
        config: settings.
        dense_states: of ``windows`` and then ``held_out``, by their numbers in both together; if
            None, the dense model runs in every step.
        state_file: where the first process keeps the state, for all to go on from.
        ranks: processes that each take a part of a step's windows, and of those held out.
        progress: reports one unit per step.

    Raises:
        ModelError: held-out text's divergence is not finite.

    Returns:
        The artifact with correction and shifts of its biases, for :func:`recut` to add up, as they
        were at the best step (zero if that is the start); and how it went.
    """
    ranks = ranks or Ranks()
    batch = max(1, config.step_tokens // windows.shape[1])
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(config.seed))

    def check() -> None:
        if training.done not in training.history.held_out:
            value = _mean_divergence(model, modules, held_out, dense_states, len(windows), ranks)
            if training.done == 0:
                _check_finite(model, value)
            training.checked(value)
            if state_file is not None:
                ranks.by_first(lambda: training.save(state_file))

    def loss(rows: Tensor) -> Tensor:
        states = None if dense_states is None else dense_states(rows)
        return divergence(model, modules, windows[rows].to(model.device), states)

    with students(model, clusters.layers, config.rank, config.seed) as modules:
        measure_scales(model, modules, held_out[: max(1, _SCALE_TOKENS // held_out.shape[1])])
        training = _Training(modules, config, ranks)
        if state_file is not None and ranks.by_first(state_file.exists):
            training.load(state_file)
        with (
            checkpointed(model, batch * windows.shape[1]),
            (progress or SilentProgress()).task("distill", config.steps) as advance,
        ):
            advance(training.done)
            while training.done < config.steps:
                if training.done % CHECK_EVERY == 0:
                    check()
                first = training.done * batch
                training.step(order[torch.arange(first, first + batch) % len(order)], loss)
                advance(1)
            check()
        training.restore_best()
        layers = {
            index: replace(
                clusters.layers[index],
                bias_shift=_cpu(module.bias_shift) + _shift(clusters.layers[index]),
                correction_down=_cpu(module.correction_down) if config.rank else None,
                correction_up=_cpu(module.correction_up) if config.rank else None,
            )
            for index, module in modules.items()
        }
    return replace(clusters, layers=layers), training.history


def held_out_divergence(
    model: Any,
    clusters: ClusterSet,
    windows: Tensor,
    *,
    dense_states: DenseStates | None = None,
    first: int = 0,
    ranks: Ranks | None = None,
) -> float:
    """Mean KL(dense ‖ sparse) of windows under an artifact's sets, as :func:`distill` measures it.

    Args:
        model: the dense model, dense again when this returns.
        clusters: cut for a budget.
        windows: token ids [W, window] int64.
        dense_states: as of :func:`distill`; ``windows`` have the numbers from ``first`` on.
        first: see ``dense_states``.
        ranks: processes that each take a part of the windows.

    Raises:
        ModelError: it is not finite.
    """
    with students(model, clusters.layers, 0, 0) as modules:
        value = _mean_divergence(model, modules, windows, dense_states, first, ranks or Ranks())
    _check_finite(model, value)
    return value


def _check_finite(model: Any, divergence: float) -> None:
    if not math.isfinite(divergence):
        raise not_finite(model, "the divergence of held-out text from the dense model")


def _mean_divergence(
    model: Any,
    modules: dict[int, StudentFFN],
    windows: Tensor,
    dense_states: DenseStates | None,
    first: int,
    ranks: Ranks,
) -> float:
    @torch.no_grad()
    def found() -> list[float]:
        values = []
        for row in ranks.rows(len(windows)):
            states = None if dense_states is None else dense_states(torch.tensor([first + row]))
            window = windows[row : row + 1].to(model.device)
            values.append(divergence(model, modules, window, states).item())
        return values

    return sum(joined(ranks.together(found))) / len(windows)


class _Training:
    """Parameters, optimizer, history and the best state, on disk as one file of tensors."""

    def __init__(self, modules: dict[int, StudentFFN], config: Distillation, ranks: Ranks) -> None:
        self._steps, self._ranks = config.steps, ranks
        self._learning_rate = config.learning_rate
        self._named = {
            f"{index}.{name}": parameter
            for index, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.numel()  # none in a correction of rank 0
        }
        of_clusters = [p for name, p in self._named.items() if name.endswith(".shift")]
        others = [p for name, p in self._named.items() if not name.endswith(".shift")]
        self._optimizer = torch.optim.Adam(
            [
                {"params": others, "of_peak": 1.0},
                {"params": of_clusters, "of_peak": config.cluster_share},
            ],
            betas=(0.9, 0.95),
        )
        self._best: dict[str, Tensor] = {}
        self._norms: list[float] = []
        self.history = TuningHistory()

    @property
    def done(self) -> int:
        """Steps taken."""
        return len(self.history.divergence)

    def step(self, rows: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        """Take one step down the mean loss of windows.

        Args:
            rows: their numbers [n] int64.
            loss: mean over some of them, by their numbers.
        """
        warm_up = min(1.0, (self.done + 1) / 10)
        cosine = 0.525 + 0.475 * math.cos(math.pi * self.done / self._steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["of_peak"] * self._learning_rate * warm_up * cosine
        self._optimizer.zero_grad(set_to_none=True)
        own = self._ranks.rows(len(rows))
        mine = rows[own.start : own.stop]

        def backward() -> float:
            if not len(mine):
                return 0.0
            part = loss(mine) * (len(mine) / len(rows))
            # A layer whose sets hold all neurons has nothing to tune.
            if part.requires_grad:
                part.backward()
            return part.item()

        losses = self._ranks.together(backward)
        if self._ranks.count > 1:
            for parameter in self._named.values():
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._ranks.total(grad)
        if self._clip():
            self._optimizer.step()
        self.history.divergence.append(math.fsum(losses))

    def _clip(self) -> bool:
        """Shorten a gradient that is far longer than usual; False if it is not finite, or none."""
        gradients = [p.grad for p in self._named.values() if p.grad is not None]
        if not gradients:
            return False
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if not math.isfinite(norm):
            return False
        self._norms.append(norm)
        usual = statistics.median(self._norms[-_USUAL_STEPS:])
        torch.nn.utils.clip_grads_with_norm_(
            self._named.values(), _MOST_OF_USUAL * usual, torch.tensor(norm)
        )
        return True

    def checked(self, held_out: float) -> None:
        """Record the held-out divergence of the present state, and keep that if it is the best."""
        self.history.held_out[self.done] = held_out
        if self.history.best_step == self.done:
            self._best = {name: p.detach().clone() for name, p in self._named.items()}

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the best state back."""
        for name, tensor in self._best.items():
            self._named[name].copy_(tensor)

    def save(self, file: Path) -> None:
        """Write the state, atomically."""
        tensors: dict[str, Tensor] = {f"parameter.{name}": p for name, p in self._named.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        for name, parameter in self._named.items():
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        history = {
            "divergence": self.history.divergence,
            "held_out": self.history.held_out,
            "norms": self._norms,
        }
        write_tensors(
            file,
            {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()},
            {"history": json.dumps(history)},
        )

    def load(self, file: Path) -> None:
        """Go on from a state."""
        with safe_open(file, framework="pt") as reader:
            history = json.loads(reader.metadata()["history"])
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        self._norms = history["norms"]
        self.history = TuningHistory(
            history["divergence"],
            {int(step): value for step, value in history["held_out"].items()},
        )
        with torch.no_grad():
            for name, parameter in self._named.items():
                self._best[name] = tensors[f"best.{name}"].to(parameter.device)
                parameter.copy_(tensors[f"parameter.{name}"])
                self._optimizer.state[parameter] = {
                    key: tensors[f"{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in tensors
                }


def reserved(clusters: ClusterSet, rank: int) -> ClusterSet:
    """An artifact with an empty correction, so that its bytes count when it is cut."""
    if rank == 0:
        return clusters
    layers = {
        index: replace(
            layer,
            correction_down=torch.zeros(rank, layer.hidden_size),
            correction_up=torch.zeros(rank, layer.hidden_size),
        )
        for index, layer in clusters.layers.items()
    }
    return replace(clusters, layers=layers)


def _shift(layer: LayerClusters) -> Tensor | float:
    """What a layer's biases have been shifted by before."""
    return 0.0 if layer.bias_shift is None else layer.bias_shift.float()


def _cpu(parameter: Tensor) -> Tensor:
    return parameter.detach().float().cpu()
