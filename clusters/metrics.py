"""How well a token's active set fits it, always beside chance and the static set.

A token's *active* neurons are its most important ones, as many as sets hold on average.

- coverage: share of the token's importance that its set holds;
- recall: share of its active neurons that its set holds (the AWC paper's "clustering precision");
- precision: share of its set that is active.

A random set of the same size scores its density in coverage and recall: that is ``chance``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_runtime.clusters.importance import normalized


class SetScorer:
    """Accumulates the scores of one layer's sets over tokens.

    Args:
        active_sets: bool [K, I].
        static_set: one set for all tokens, bool [I].
    """

    def __init__(self, active_sets: Tensor, static_set: Tensor) -> None:
        self._sets = active_sets.float()
        self._static = static_set.float()
        self._num_active = max(1, round(self._sets.sum(-1).mean().item()))
        self._tokens = 0
        self._sums: dict[str, float] = {}

    def add(self, importance: Tensor, cluster_ids: Tensor) -> None:
        """Score tokens.

        Args:
            importance: [n, I], any scale per token.
            cluster_ids: the cluster that each token uses, int64 [n].
        """
        share = normalized(importance)
        active = torch.zeros_like(share).scatter_(-1, share.topk(self._num_active).indices, 1.0)
        # Neurons without any importance do not count as active, however few there are.
        active *= share > 0
        sets = self._sets[cluster_ids]
        size, num_active = sets.sum(-1), active.sum(-1).clamp_min(1)
        by_cluster = share @ self._sets.t()
        best, oracle = by_cluster.max(-1)
        hits = (active * sets).sum(-1)
        self._add("coverage", by_cluster.gather(1, cluster_ids.unsqueeze(-1)).squeeze(-1))
        self._add("recall", hits / num_active)
        self._add("precision", hits / size.clamp_min(1))
        self._add("density", size / share.shape[-1])
        self._add("oracle_coverage", best)
        self._add("router_top1", (cluster_ids == oracle).float())
        self._add("static_coverage", share @ self._static)
        self._add("static_recall", active @ self._static / num_active)
        self._tokens += len(share)

    def scores(self) -> dict[str, float]:
        """Means over all tokens; ``chance`` is what a random set of equal size covers."""
        means = {name: value / self._tokens for name, value in self._sums.items()}
        return {**means, "chance": means["density"]}

    def _add(self, name: str, per_token: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + per_token.sum().item()
