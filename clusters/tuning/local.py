"""Compensation tuned layer by layer, for models too large to be distilled as a whole.

A cluster's bias is the mean of what its set leaves out on the dense model's own states, by what the
clusters' centroids say. In the sparse model a layer gets other states, and looks decide by their own
estimates. So, from the first decoder layer to the last, each bias is shifted by what is still missing
in the sparse model on average,

    shift_k = mean over a cluster's tokens of (dense(x) − sparse(x)),    x: the FFN's inputs there,

shrunk toward the mean over all tokens; the layers behind see the layer with its shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.clusters.buffers import Buffers
from sparse_runtime.clusters.ranks import Ranks
from sparse_runtime.clusters.sweep import Sweep
from sparse_runtime.clusters.tuning.student import StudentFFN, students_of
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.inline_calls import calling
from sparse_runtime.progress import ProgressReporter, SilentProgress

# Weight, in tokens, of all tokens' mean in a cluster's.
_SHRINKAGE = 32.0


@torch.no_grad()
def tune_locally(
    model: Any,
    clusters: ClusterSet,
    windows: Tensor,
    *,
    buffers: Buffers | None = None,
    ranks: Ranks | None = None,
    progress: ProgressReporter | None = None,
) -> dict[int, Tensor]:
    """What is missing in the sparse model, on average over a cluster's tokens, layer by layer.

    Args:
        model: the dense model, dense again when this returns; one decoder layer at a time is in memory.
        clusters: cut for the budget to tune at.
        windows: token ids [W, window] int64.
        buffers: as of ``fisher_weights``.
        ranks: processes that each take a part of the windows, one at least; all get the same result.
        progress: reports one unit per window and decoder layer, twice.

    Returns:
        Layer index -> shift of the clusters' biases [K, H] float32, on the CPU.
    """
    layers = [
        layer for layer in find_ffn_layers(model, packed=True) if layer.index in clusters.layers
    ]
    shifts: dict[int, Tensor] = {}
    ranks = ranks or Ranks()
    windows = windows[ranks.rows(len(windows))]
    with buffers or Buffers() as own:
        sweep = Sweep(model, windows, own)
        owned = sweep.owners(layers)
        with (progress or SilentProgress()).task("tune", 2 * sweep.steps) as advance:
            for number in range(len(sweep.parts)):
                mine = [layers[position] for position in owned[number]]
                with sweep.entered(number), students_of(mine, clusters.layers) as students:
                    compared = [_Compared(student) for student in students.values()]
                    with calling(mine, compared):
                        for window in range(len(windows)):
                            sweep.run(number, window)
                            advance(1)
                    for layer, one in zip(mine, compared, strict=True):
                        one.add_up(ranks)
                        shifts[layer.index] = one.shift().cpu()
                    with calling(mine, [_Shifted(one) for one in compared]):
                        for window in range(len(windows)):
                            # Of the only part nothing comes behind.
                            if number + 1 < len(sweep.parts):
                                sweep.step(number, window)
                            advance(1)
    return shifts


def shifted(cut: ClusterSet, shifts: Mapping[int, Tensor]) -> ClusterSet:
    """The artifact with shifts of its biases, for :func:`recut` to add up.

    Args:
        cut: for the budget that they were found at.
        shifts: of its layers.
    """
    layers = {i: replace(layer, bias_shift=shifts[i]) for i, layer in cut.layers.items()}
    return replace(cut, layers=layers)


class _Compared(nn.Module):
    """A student that keeps its outputs, and by cluster what they lack."""

    def __init__(self, student: StudentFFN) -> None:
        super().__init__()
        self._student = (student,)
        shape = student.bias_shift.shape
        self._missing = torch.zeros(shape, device=student.bias_shift.device)
        self._tokens = torch.zeros(shape[0], device=self._missing.device)
        #: Clusters and output of each call.
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, hidden_states: Tensor, *choice: Tensor) -> Tensor:
        """Map hidden states [..., H] to the student's output [..., H]."""
        student = self._student[0]
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids, output, missing = student.compared(x, *choice)
        self._missing.index_add_(0, ids, missing)
        self._tokens += torch.bincount(ids, minlength=len(self._tokens))
        output = student.with_constant(output).to(x.dtype)
        self.calls.append((ids, output))
        return output.reshape(hidden_states.shape)

    def add_up(self, ranks: Ranks) -> None:
        """Take the other processes' tokens in."""
        self._missing, self._tokens = ranks.total(self._missing), ranks.total(self._tokens)

    def shift(self) -> Tensor:
        """Of each cluster's bias [K, H] float32."""
        overall = self._missing.sum(0) / self._tokens.sum()
        weights = (self._tokens + _SHRINKAGE).unsqueeze(-1)
        return (self._missing + _SHRINKAGE * overall) / weights


class _Shifted(nn.Module):
    """The calls of a :class:`_Compared` again, with its shift."""

    def __init__(self, compared: _Compared) -> None:
        super().__init__()
        self._calls, self._shift = iter(compared.calls), compared.shift()

    def forward(self, hidden_states: Tensor, *choice: Tensor) -> Tensor:
        """Map hidden states [..., H] to outputs [..., H]."""
        ids, output = next(self._calls)
        return (output + self._shift[ids].to(output)).reshape(hidden_states.shape)
