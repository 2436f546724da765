"""What cuts read and lose on held-out text, domain by domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.measured import (
    AuditLevels,
    MeasuredCut,
    MeasuredCuts,
    audited_layers,
)
from sparse_runtime.artifact.recut import recut, share_range
from sparse_runtime.clusters.buffers import Buffers
from sparse_runtime.clusters.ranks import Ranks, joined
from sparse_runtime.clusters.sweep import Sweep
from sparse_runtime.clusters.tuning.student import DenseStates, SparseParts, StudentFFN
from sparse_runtime.ffn.guard import audited_places
from sparse_runtime.models.experts import chosen_experts
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.output_head import output_head
from sparse_runtime.progress import Advance, ProgressReporter

# Neighboring tokens lose alike; means over so many are taken for independent.
_BLOCK = 64
# As near as a cut comes to its budget, and the cuts that this may take.
_NEAR, _MOST_TRIES = 0.002, 4
# Further cuts: parts of the way from no neuron to the budget, and from there to all.
_BELOW, _ABOVE = (0.6, 0.8), (0.3, 0.65)


@dataclass(frozen=True)
class HeldOutText:
    """Windows that nothing is fitted on.

    Attributes:
        windows: token ids [V, window] int64, of every domain from the first on.
        domains: number of each window's domain [V] int64.
        names: of the domains.
        dense_states: the dense model's last hidden states, by a window's number among these.
        inputs: what an FFN gets in the dense model [window, H], by the FFN and a window's number.
    """

    windows: Tensor
    domains: Tensor
    names: tuple[str, ...]
    dense_states: DenseStates
    inputs: Callable[[FFNLayer, int], Tensor]

    def first(self, count: int) -> HeldOutText:
        """The first ``count`` windows."""
        return replace(self, windows=self.windows[:count], domains=self.domains[:count])


def sparse_runs(
    model: Any,
    cut: ClusterSet,
    windows: Tensor,
    *,
    buffers: Buffers | None = None,
    visit: Callable[[FFNLayer, StudentFFN], None] | None = None,
    advance: Advance | None = None,
) -> Iterator[tuple[float, Tensor]]:
    """Run text with every token sparse, one decoder layer at a time.

    Args:
        model: dense, or packed in planes; as it was when this ends.
        cut: for a budget.
        windows: token ids [W, window] int64.
        buffers: as of ``fisher_weights``.
        visit: called with each FFN and its sparse student, in memory, once it has run.
        advance: told of each decoder layer's window.

    Yields:
        Of each window its cost share, as of bfloat16 weights, and its last hidden states [window, H].
    """
    layers = [layer for layer in find_ffn_layers(model, packed=True) if layer.index in cut.layers]
    read = torch.zeros(len(windows), 2, dtype=torch.float64)
    with buffers or Buffers() as own:
        sweep = Sweep(model, windows, own)
        parts = SparseParts(sweep, layers, cut.layers)

        @contextmanager
        def visited(number: int) -> Iterator[None]:
            with parts(number) as own:
                yield
                if visit is not None:
                    for layer in own:
                        visit(layer, parts.running[layer.index])

        def count(number: int, window: int) -> None:
            for student in parts.running.values():
                read[window] += torch.tensor(student.bytes_read, dtype=torch.float64)
                student.read = [0, 0, 0, 0]

        sweep.forward(visited, ran=count, advance=advance)
        for window, (sparse_bytes, dense_bytes) in enumerate(read.tolist()):
            with torch.no_grad():
                states = sweep.final(window)
            yield sparse_bytes / dense_bytes, states


@dataclass(frozen=True)
class CutMeasurer:
    """Measures cuts of artifacts with centroids.

    Attributes:
        model: dense, or packed in planes.
        text: to run over.
        verify: with or without a band of neurons that looks decide on.
        buffers: makes new buffers for hidden states.
        ranks: processes that each take a part of the windows.
        progress: reports one unit per window and decoder layer.
    """

    model: Any
    text: HeldOutText
    verify: bool
    buffers: Callable[[], Buffers]
    ranks: Ranks
    progress: ProgressReporter

    def measured(self, clusters: ClusterSet) -> ClusterSet:
        """An artifact with measurements of cuts for its budget, and for some below and above it.

        Cuts are measured until one promises the budget, within 0.002 if it takes no more than four.

        Args:
            clusters: its own measurements tell where to begin, and are replaced.
        """
        least, whole = share_range(self.model, clusters, verify=self.verify)
        budget, begin = clusters.budget, clusters.measured or self._nothing()
        measured = self._nothing()
        for _ in range(_MOST_TRIES):
            aim = (measured if measured.cuts else begin).aim_for(budget, whole)
            cut = self.cut(clusters, aim)
            measured = measured.with_cut(cut)
            if abs(cut.promised - budget) <= _NEAR:
                break
        for share in (
            *(least + part * (budget - least) for part in _BELOW),
            *(budget + part * (whole - budget) for part in _ABOVE),
        ):
            aim = measured.aim_for(share, whole)
            if least < aim < whole:
                measured = measured.with_cut(self.cut(clusters, aim))
        return replace(clusters, measured=measured)

    def measured_once(self, clusters: ClusterSet) -> ClusterSet:
        """An artifact with a measurement of the cut that expects its budget of itself."""
        cut = self.cut(clusters, clusters.budget)
        return replace(clusters, measured=self._nothing().with_cut(cut))

    def cut(self, clusters: ClusterSet, aim: float) -> MeasuredCut:
        """Measure the cut that expects a cost share of ``aim`` of itself."""
        bare = replace(clusters, measured=None)
        cut = recut(self.model, bare, budget=aim, verify=self.verify)
        runs = joined(self.ranks.together(lambda: self._runs(cut)))
        shares, losses = [run.share for run in runs], [run.losses for run in runs]
        by_domain = [
            (self.text.domains == number).nonzero()[:, 0].tolist()
            for number in self.text.domains.unique().tolist()
        ]
        of_domains = [torch.cat([losses[i] for i in own]) for own in by_domain]
        return MeasuredCut(
            aim,
            tuple(sum(shares[i] for i in own) / len(own) for own in by_domain),
            tuple(max(0.0, loss.mean().item()) for loss in of_domains),
            tuple(map(_standard_error, of_domains)),
            _levels(cut, [run.audited for run in runs]),
        )

    def _runs(self, cut: ClusterSet) -> list[_Run]:
        """This process's windows under a cut."""
        rows = self.ranks.rows(len(self.text.windows))
        if not len(rows):
            return []
        head, audit, found = output_head(self.model), _Audit(self.text, cut, rows), []
        with self.progress.task("measure", len(rows) * len(cut.layers)) as advance:
            runs = sparse_runs(
                *(self.model, cut, self.text.windows[rows]),
                buffers=self.buffers(),
                visit=audit.visit,
                advance=advance,
            )
            for number, (share, states) in zip(rows, runs, strict=True):
                dense = self.text.dense_states(torch.tensor([number]))[0].to(states)
                with torch.no_grad():
                    losses = _divergences(head(dense), head(states))
                found.append(_Run(share, losses, audit.of(number)))
        return found

    def _nothing(self) -> MeasuredCuts:
        """The domains that have windows, and their tokens."""
        numbers, counts = self.text.domains.unique(return_counts=True)
        window = self.text.windows.shape[1]
        return MeasuredCuts(
            tuple(self.text.names[number] for number in numbers.tolist()),
            tuple(count * window for count in counts.tolist()),
            verified=self.verify,
        )


@dataclass(frozen=True)
class _Run:
    """A held-out window under a cut.

    Attributes:
        share: its cost share.
        losses: KL(dense ‖ sparse) of each token [n].
        audited: layer index -> what the guard finds there; none of windows too short for it.
    """

    share: float
    losses: Tensor
    audited: dict[int, float]


class _Audit:
    """What the guard finds on the held-out windows: prompts run dense, so it gets what is captured."""

    def __init__(self, text: HeldOutText, cut: ClusterSet, rows: range) -> None:
        self._text, self._rows = text, rows
        self._layers = audited_layers(list(cut.layers))
        self._places = audited_places(text.windows.shape[1])
        self._errors: dict[int, dict[int, float]] = {number: {} for number in rows}

    @torch.no_grad()
    def visit(self, layer: FFNLayer, student: StudentFFN) -> None:
        """Audit a layer on all windows."""
        if self._places is None or layer.index not in self._layers:
            return
        for number in self._rows:
            states = self._text.inputs(layer, number)[self._places]
            x = states.to(device=layer.device, dtype=layer.dtype)
            choice: tuple[Tensor, ...] = ()
            if layer.experts:
                choice = chosen_experts(layer.parent, layer.attribute, x)
            missing = student.compared(x, *choice)[2]
            self._errors[number][layer.index] = missing.square().sum(-1).mean().item()

    def of(self, number: int) -> dict[int, float]:
        """A window's errors by layer."""
        return self._errors[number]


def _levels(cut: ClusterSet, windows: Sequence[dict[int, float]]) -> AuditLevels | None:
    """Mean errors by layer, and how the score by them varies from window to window.

    None of windows too short for the guard, or too few.
    """
    if len(windows) < 2 or not windows[0]:
        return None
    means = {
        index: fmean(own[index] for own in windows) for index in audited_layers(list(cut.layers))
    }
    kept = {index: mean for index, mean in means.items() if mean > 0}
    if not kept:
        return None
    scores = [fmean(own[index] / mean for index, mean in kept.items()) for own in windows]
    return AuditLevels(kept, stdev(scores))


def _divergences(dense: Tensor, sparse: Tensor) -> Tensor:
    """KL(dense ‖ sparse) of each token [n] float32, of logits [n, V]."""
    expected, found = dense.float().log_softmax(-1), sparse.float().log_softmax(-1)
    return F.kl_div(found, expected, reduction="none", log_target=True).sum(-1).cpu()


def _standard_error(losses: Tensor) -> float:
    """Of the mean of losses [n], neighbors of which are alike; their mean where that is unknown."""
    means = torch.stack([block.mean() for block in losses.split(_BLOCK)])
    if len(means) < 2:
        return max(0.0, losses.mean().item())
    return means.std().item() / math.sqrt(len(means))
