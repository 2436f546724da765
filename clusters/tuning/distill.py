"""Distillation: what a sparse model leaves out, made good against the dense model's own predictions.

Tuned are a shift of each cluster's bias and a low-rank correction per layer, by Adam on

    KL(dense ‖ sparse) = Σ_v p_dense(v)·ln(p_dense(v)/p_sparse(v)), mean over tokens,

never the model's weights. Routers and sets stay as they are: neither argmax nor a look has a gradient.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparse_runtime.atomic import write_tensors
from sparse_runtime.cluster_set import ClusterSet
from sparse_runtime.clusters.fisher import checkpointed
from sparse_runtime.clusters.tuning.student import DenseStates, StudentFFN, divergence, students
from sparse_runtime.progress import ProgressReporter, SilentProgress

_SAVE_EVERY = 20


@dataclass(frozen=True)
class Distillation:
    """Settings of :func:`distill`.

    Args:
        steps: of Adam.
        rank: of the correction, 0 for none.
        step_tokens: tokens per step, whole windows.
        learning_rate: peak of a cosine schedule with ten steps of warm-up.
        seed: of the text's order and the correction's start.
    """

    steps: int = 60
    rank: int = 16
    step_tokens: int = 1024
    learning_rate: float = 2e-3
    seed: int = 0


def distill(
    model: Any,
    clusters: ClusterSet,
    windows: Tensor,
    config: Distillation,
    *,
    dense_states: DenseStates | None = None,
    state_file: Path | None = None,
    progress: ProgressReporter | None = None,
) -> tuple[ClusterSet, list[float]]:
    """Tune an artifact's compensation; resumable.

    Args:
        model: the dense model, dense again when this returns.
        clusters: cut for the budget to distill at, beside the correction (:func:`reserved`).
        windows: token ids [W, window] int64, taken in a shuffled order, again if they run out.
        config: settings.
        dense_states: of ``windows``, by their numbers; if None, the dense model runs in every step.
        state_file: where the state is kept every twenty steps, to go on from.
        progress: reports one unit per step.

    Returns:
        The artifact with correction and shifts of its biases, for :func:`recut` to add up; and the
        divergence of each step, in nats per token.
    """
    batch = max(1, config.step_tokens // windows.shape[1])
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(config.seed))
    with students(model, clusters.layers, config.rank, config.seed) as modules:
        training = _Training(modules, config)
        training.load(state_file)
        with (
            checkpointed(model, batch * windows.shape[1]),
            (progress or SilentProgress()).task("distill", config.steps) as advance,
        ):
            advance(training.done)
            while training.done < config.steps:
                first = training.done * batch
                rows = order[torch.arange(first, first + batch) % len(order)]
                states = None if dense_states is None else dense_states(rows)
                training.step(model, windows[rows].to(model.device), states)
                if training.done % _SAVE_EVERY == 0:
                    training.save(state_file)
                advance(1)
        layers = {
            index: replace(
                clusters.layers[index],
                bias_shift=_cpu(module.bias_shift),
                correction_down=_cpu(module.correction_down) if config.rank else None,
                correction_up=_cpu(module.correction_up) if config.rank else None,
            )
            for index, module in modules.items()
        }
    return replace(clusters, layers=layers), training.history


class _Training:
    """Parameters, optimizer and history, on disk as one file of tensors."""

    def __init__(self, modules: dict[int, StudentFFN], config: Distillation) -> None:
        self._modules = modules
        self._steps = config.steps
        self._named = {
            f"{index}.{name}": parameter
            for index, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.numel()  # none in a correction of rank 0
        }
        self._optimizer = torch.optim.Adam(
            self._named.values(), lr=config.learning_rate, betas=(0.9, 0.95)
        )
        self._learning_rate = config.learning_rate
        self.history: list[float] = []

    @property
    def done(self) -> int:
        """Steps taken."""
        return len(self.history)

    def step(self, model: Any, windows: Tensor, dense_states: Tensor | None) -> None:
        """Take one step."""
        warm_up = min(1.0, (self.done + 1) / 10)
        cosine = 0.525 + 0.475 * math.cos(math.pi * self.done / self._steps)
        self._optimizer.param_groups[0]["lr"] = self._learning_rate * warm_up * cosine
        loss = divergence(model, self._modules, windows, dense_states)
        self._optimizer.zero_grad(set_to_none=True)
        # A layer whose sets hold all neurons has nothing to tune.
        if loss.requires_grad:
            loss.backward()
            self._optimizer.step()
        self.history.append(loss.item())

    def save(self, file: Path | None) -> None:
        """Write the state, atomically."""
        if file is None:
            return
        tensors = {f"parameter.{name}": tensor for name, tensor in self._named.items()}
        for name, parameter in self._named.items():
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        write_tensors(
            file,
            {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()},
            {"history": json.dumps(self.history)},
        )

    def load(self, file: Path | None) -> None:
        """Go on from a state, if there is one."""
        if file is None or not file.exists():
            return
        with safe_open(file, framework="pt") as reader:
            self.history = json.loads(reader.metadata()["history"])
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        with torch.no_grad():
            for name, parameter in self._named.items():
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


def _cpu(parameter: Tensor) -> Tensor:
    return parameter.detach().float().cpu()
