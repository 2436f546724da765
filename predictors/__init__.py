"""Routers and their training."""

from sparse_runtime.predictors.routers import (
    LinearRouter,
    LowRankRouter,
    Router,
    new_router,
    router_logits,
)

__all__ = ["LinearRouter", "LowRankRouter", "Router", "new_router", "router_logits"]
