"""Options of ``build_clusters``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from sparse_runtime.clusters.importance import IMPORTANCE_KINDS
from sparse_runtime.errors import ConfigError

METHODS = ("awc", "awc-paper")
MAX_CLUSTERS = 16_384


@dataclass(frozen=True)
class BuildConfig:
    """How clusters are built.

    Args:
        method: ``awc`` (coverage clustering on importance) or ``awc-paper`` (the paper's, on binary
            patterns).
        importance: ``fisher``, ``norm`` or ``binary``, what tokens are clustered by and neurons
            priced by (see ``clusters/importance.py``). ``fisher`` falls back to ``norm`` with a
            warning where no backward pass can be run. ``awc-paper`` is always binary.
        allocation: how the budget is spent. ``global`` cuts all sets at one price of a neuron (see
            ``artifact.bands``); ``uniform`` gives every set the same size. ``awc-paper`` is
            always uniform.
        verify: leave neurons that are needed by some of a cluster's tokens only to a look at low-bit
            copies (with allocation ``global``).
        fisher_tokens: calibration tokens of the backward passes that estimate the loss's
            sensitivity.
        loop_weights: weigh layers by what they leave out of the sparse model, see
            ``clusters/loop_weights.py`` (with allocation ``global``).
        distill: steps that tune biases and a low-rank correction against the dense model's
            predictions, 0 for none (with allocation ``global`` and cluster biases).
        correction_rank: of that correction; it takes its bytes from the budget.
        cluster_bias: add, for each cluster, the mean of what its set leaves out (``awc`` only).
        num_clusters: K, 1 to 16,384.
        budget: mean cost share asked for, in (0, 1]: FFN bytes read per token, router included, over
            the dense FFN's. The density follows from it.
        router: ``auto`` tries several kinds on three layers and takes the one with the least estimated
            loss on held-out tokens at this budget; ``linear``; or the rank of a low-rank router.
        router_rounds: reassign–recompute rounds after the first training (``awc`` only).
        max_tokens: calibration tokens; None takes all the text there is.
        window: tokens per calibration window.
        held_out_share: share of the windows kept from fitting, for early stop and the figures.
        clustering_tokens: at most this many tokens take part in the clustering's iterations; the
            final sets and routers use all of them.
        seed: of windows, initialization and training.
        memory_mib: bound, each, on the capture's buffers and on one layer's importance matrix; above
            it both go through files.
        percentile: ``binary`` importance and ``awc-paper``: scores above this percentile of their
            layer count as active.
        paper_init: ``awc-paper``: ``random`` or ``kmeans++``.
        paper_pooled: ``awc-paper``: one table of clusters for all layers, as in the paper, instead of
            one for each layer.
        save_centroids: keep the float centroids in the artifact.
    """

    method: Literal["awc", "awc-paper"] = "awc"
    importance: Literal["fisher", "norm", "binary"] = "fisher"
    allocation: Literal["global", "uniform"] = "global"
    verify: bool = True
    fisher_tokens: int = 8192
    loop_weights: bool = True
    distill: int = 60
    correction_rank: int = 16
    cluster_bias: bool = True
    num_clusters: int = 256
    budget: float = 0.5
    router: str = "auto"
    router_rounds: int = 1
    max_tokens: int | None = 65_536
    window: int = 512
    held_out_share: float = 0.1
    clustering_tokens: int = 65_536
    seed: int = 0
    memory_mib: int = 1024
    percentile: float = 50.0
    paper_init: Literal["random", "kmeans++"] = "random"
    paper_pooled: bool = False
    save_centroids: bool = True

    def __post_init__(self) -> None:
        one_of = {
            "method": METHODS,
            "importance": IMPORTANCE_KINDS,
            "allocation": ("global", "uniform"),
            "paper_init": ("random", "kmeans++"),
        }
        for name, choices in one_of.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}"
                )
        ranges: dict[str, tuple[bool, str]] = {
            "num_clusters": (1 <= self.num_clusters <= MAX_CLUSTERS, f"1 to {MAX_CLUSTERS}"),
            "budget": (0 < self.budget <= 1, "a cost share above 0 and at most 1"),
            "router_rounds": (self.router_rounds >= 0, "0 or more"),
            "max_tokens": (self.max_tokens is None or self.max_tokens > 0, "1 or more"),
            "window": (self.window >= 2, "2 or more"),
            "held_out_share": (0 < self.held_out_share < 1, "a share between 0 and 1"),
            "fisher_tokens": (self.fisher_tokens >= 1, "1 or more"),
            "distill": (self.distill >= 0, "0 or more steps"),
            "correction_rank": (self.correction_rank >= 0, "0 or more"),
            "clustering_tokens": (self.clustering_tokens >= 1, "1 or more"),
            "memory_mib": (self.memory_mib >= 1, "1 or more"),
            "percentile": (0 < self.percentile < 100, "a percentage between 0 and 100"),
            "router": (_is_router(self.router), "auto, linear or a rank of 1 or more"),
        }
        for name, (valid, expected) in ranges.items():
            if not valid:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {expected}")

    @property
    def needs_fisher(self) -> bool:
        """Whether the build runs backward passes."""
        return self.method == "awc" and self.importance == "fisher"

    @property
    def cuts(self) -> bool:
        """Whether the sets are cut at one price after the layers are fitted."""
        return self.method == "awc" and self.allocation == "global"

    @property
    def distills(self) -> bool:
        """Whether biases and correction are tuned after the sets are cut."""
        return self.cuts and self.adds_bias and self.distill > 0

    @property
    def adds_bias(self) -> bool:
        """Whether clusters get a bias."""
        return self.method == "awc" and self.cluster_bias

    def record(self) -> dict[str, Any]:
        """All settings, as JSON."""
        return asdict(self)


def _is_router(value: str) -> bool:
    return value in ("auto", "linear") or (value.isdecimal() and int(value) > 0)
