"""Routers: small maps from a layer's hidden state to cluster logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_runtime.kernels.reference import router_logits


class LinearRouter(nn.Module):
    """logits = up · x + bias, with ``up`` [K, H]."""

    def __init__(self, hidden_size: int, num_clusters: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(num_clusters, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_clusters))

    @property
    def down(self) -> None:
        """A linear router has no first matrix."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states [n, H] to logits [n, K]."""
        return router_logits(x, None, self.up, self.bias)


class LowRankRouter(nn.Module):
    """logits = up · (down · x) + bias, with ``down`` [r, H] and ``up`` [K, r]."""

    def __init__(self, hidden_size: int, num_clusters: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, hidden_size))
        self.up = nn.Parameter(torch.zeros(num_clusters, rank))
        self.bias = nn.Parameter(torch.zeros(num_clusters))

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states [n, H] to logits [n, K]."""
        return router_logits(x, self.down, self.up, self.bias)


#: Both kinds share ``down`` (None for a linear router), ``up`` and ``bias``.
Router = LinearRouter | LowRankRouter


def new_router(hidden_size: int, num_clusters: int, rank: int | None) -> Router:
    """Make an all-zero router: linear if ``rank`` is None, else low-rank."""
    if rank is None:
        return LinearRouter(hidden_size, num_clusters)
    return LowRankRouter(hidden_size, num_clusters, rank)
