"""How well a token's active set fits it, always beside chance and the static set.

A token's *active* neurons are its most important ones, as many as sets hold on average.

- coverage: share of the token's importance that its set holds;
- recall: share of its active neurons that its set holds (the AWC paper's "clustering precision");
- precision: share of its set that is active.

A random set of the same size scores its density in coverage and recall: that is ``chance``.

The *oracle* knows each token's importance and takes the cluster with the best coverage, at a price per
density: without one it would take the largest sets wherever sizes differ, and save nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_runtime.clusters.importance import normalized

# Halvings of the price's range: more than float32 coverage tells apart.
_PRICE_STEPS = 40


def oracle_ids(coverage: Tensor, density: Tensor, price: float) -> Tensor:
    """The oracle's cluster of each token, int64 [n].

    Args:
        coverage: of each token's importance by each set, [n, K].
        density: share of the neurons in each set, [K].
        price: coverage that a set has to gain for every unit of density.
    """
    return (coverage - price * density).argmax(-1)


def oracle_price(coverage: Tensor, density: Tensor, mean_density: float) -> float:
    """The highest price at which the oracle's sets hold at least ``mean_density`` on average.

    At this price no other choice of as many neurons or fewer covers more (Everett 1963, generalized
    Lagrange multipliers). 0 if the sets that cover most hold no more than that anyway.

    Args:
        coverage: of each token's importance by each set, [n, K].
        density: share of the neurons in each set, [K].
        mean_density: of the sets that another choice takes, a router's say.
    """

    def dense_enough(price: float) -> bool:
        mean = density[oracle_ids(coverage, density, price)].mean().item()
        return mean >= mean_density - 1e-6

    spread = density.unique().diff()
    if not len(spread) or density[oracle_ids(coverage, density, 0.0)].mean() <= mean_density:
        return 0.0
    # Coverage is at most one, so at 1 ÷ the least difference of densities the smallest sets win.
    low, high = 0.0, 1.0 / spread.min().item()
    for _ in range(_PRICE_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if dense_enough(middle) else (low, middle)
    return low


class SetScorer:
    """Accumulates the scores of one layer's sets over tokens.

    Args:
        active_sets: bool [K, I].
        static_set: one set for all tokens, bool [I].
    """

    def __init__(self, active_sets: Tensor, static_set: Tensor) -> None:
        self._sets = active_sets.float()
        self._static = static_set.float()
        self._density = self._sets.mean(-1)
        self._num_active = max(1, round(self._sets.sum(-1).mean().item()))
        self._sums: dict[str, float] = {}
        # The oracle's price depends on all tokens.
        self._by_cluster: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._price: float | None = None

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
        hits = (active * sets).sum(-1)
        self._add("coverage", by_cluster.gather(1, cluster_ids.unsqueeze(-1)).squeeze(-1))
        self._add("recall", hits / num_active)
        self._add("precision", hits / size.clamp_min(1))
        self._add("density", size / share.shape[-1])
        self._add("static_coverage", share @ self._static)
        self._add("static_recall", active @ self._static / num_active)
        self._by_cluster.append(by_cluster)
        self._ids.append(cluster_ids)
        self._price = None

    def scores(self) -> dict[str, float]:
        """Means over all tokens.

        ``chance`` is what a random set of equal size covers, ``oracle_coverage`` what the oracle does
        with as many neurons as the clusters used hold on average, ``router_top1`` the share of tokens
        that use the oracle's cluster.
        """
        by_cluster, ids = torch.cat(self._by_cluster), torch.cat(self._ids)
        oracle = oracle_ids(by_cluster, self._density, self.oracle_price())
        means = {name: value / len(ids) for name, value in self._sums.items()}
        return {
            **means,
            "oracle_coverage": by_cluster.gather(1, oracle.unsqueeze(-1)).mean().item(),
            "router_top1": (ids == oracle).float().mean().item(),
            "chance": means["density"],
        }

    def oracle_price(self) -> float:
        """The price of :func:`oracle_price` at the mean density of the clusters used."""
        if self._price is None:
            mean_density = self._density[torch.cat(self._ids)].mean().item()
            self._price = oracle_price(torch.cat(self._by_cluster), self._density, mean_density)
        return self._price

    def _add(self, name: str, per_token: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + per_token.sum().item()
