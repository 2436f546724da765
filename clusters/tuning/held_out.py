"""What cuts read and lose on held-out text, domain by domain."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.api import reset_cost, sparse_modules, sparsify, unsparsify
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.measured import (
    AuditLevels,
    MeasuredCut,
    MeasuredCuts,
    audited_layers,
)
from sparse_runtime.artifact.recut import recut, share_range
from sparse_runtime.clusters.tuning.student import DenseStates
from sparse_runtime.ffn.counts import count_cost
from sparse_runtime.ffn.guard import Guard
from sparse_runtime.models.ffn_layers import decoder_of
from sparse_runtime.models.output_head import output_head
from sparse_runtime.progress import ProgressReporter

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
    """

    windows: Tensor
    domains: Tensor
    names: tuple[str, ...]
    dense_states: DenseStates

    def first(self, count: int) -> HeldOutText:
        """The first ``count`` windows."""
        return replace(self, windows=self.windows[:count], domains=self.domains[:count])


def sparse_runs(
    model: Any, cut: ClusterSet, windows: Tensor
) -> Generator[tuple[float, Tensor], None, None]:
    """Run text with every token sparse.

    Args:
        model: dense, or packed in planes; as it was when this ends.
        cut: for a budget.
        windows: token ids [W, window] int64.

    Yields:
        Of each window its cost share, as of bfloat16 weights, and its last hidden states [window, H].
    """
    sparsify(model, cut, backend="reference", prefill="sparse")
    try:
        decoder, modules = decoder_of(model), sparse_modules(model)
        for window in windows.split(1):
            reset_cost(model)
            with torch.no_grad():
                states = decoder(input_ids=window.to(model.device), use_cache=False)
            share = count_cost(modules, element_size=2).cost_share
            yield share, states.last_hidden_state[0]
    finally:
        unsparsify(model)


@dataclass(frozen=True)
class CutMeasurer:
    """Measures cuts of artifacts with centroids.

    Attributes:
        model: dense, or packed in planes.
        text: to run over.
        verify: with or without a band of neurons that looks decide on.
        progress: reports one unit per window.
    """

    model: Any
    text: HeldOutText
    verify: bool
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
        shares, losses = [], []
        head = output_head(self.model)
        windows = self.text.windows
        with (
            self.progress.task("measure", len(windows)) as advance,
            closing(sparse_runs(self.model, cut, windows)) as runs,
        ):
            for number, (share, states) in enumerate(runs):
                shares.append(share)
                dense = self.text.dense_states(torch.tensor([number]))[0].to(states)
                with torch.no_grad():
                    losses.append(_divergences(head(dense), head(states)))
                advance(1)
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
            self._audit(cut),
        )

    def _audit(self, cut: ClusterSet) -> AuditLevels | None:
        """What the guard finds on the held-out windows; None of windows too short for it."""
        layers = dict.fromkeys(audited_layers(list(cut.layers)), 1.0)
        errors: list[dict[int, float]] = []
        sparsify(self.model, cut, backend="reference", guard=False)
        try:
            state = sparse_modules(self.model)[0].state
            state.expect_long_calls()
            state.guard = Guard(AuditLevels(layers, 0.0), state)
            decoder = decoder_of(self.model)
            state.guard.attach(decoder)
            for window in self.text.windows.split(1):
                with torch.no_grad():
                    decoder(input_ids=window.to(self.model.device), use_cache=False)
                if state.guard.errors:
                    errors.append({layer: e[0].item() for layer, e in state.guard.errors.items()})
        finally:
            unsparsify(self.model)
        return _levels(errors)

    def _nothing(self) -> MeasuredCuts:
        """The domains that have windows, and their tokens."""
        numbers, counts = self.text.domains.unique(return_counts=True)
        window = self.text.windows.shape[1]
        return MeasuredCuts(
            tuple(self.text.names[number] for number in numbers.tolist()),
            tuple(count * window for count in counts.tolist()),
            verified=self.verify,
        )


def _levels(errors: list[dict[int, float]]) -> AuditLevels | None:
    """Mean errors by layer, and how the score by them varies from window to window."""
    if len(errors) < 2:
        return None
    means = {layer: fmean(one[layer] for one in errors) for layer in errors[0]}
    kept = {layer: error for layer, error in means.items() if error > 0}
    if not kept:
        return None
    scores = [fmean(one[layer] / error for layer, error in kept.items()) for one in errors]
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
