"""Routers and their training."""

from sparse_runtime.predictors.routers import (
    LinearRouter,
    LowRankRouter,
    Router,
    new_router,
)

__all__ = ["LinearRouter", "LowRankRouter", "Router", "new_router"]
