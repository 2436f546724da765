"""Options of ``build_clusters``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from sparse_runtime.clusters.importance import IMPORTANCE_KINDS
from sparse_runtime.errors import ConfigError
from sparse_runtime.kernels.planes import PLANE_BITS

METHODS = ("awc", "awc-paper")
MAX_CLUSTERS = 16_384
# What the default budget of planes is of their bytes.
_PLANES_SHARE = 0.64


@dataclass(frozen=True)
class BuildConfig:
    """How clusters are built.

    What is None by default follows from the others (:meth:`resolved`). An option that could have no
    effect beside the others is an error, which names both.

    Args:
        method: ``awc`` (coverage clustering on importance) or ``awc-paper`` (the paper's, on binary
            patterns).
        importance: ``fisher``, ``norm`` or ``binary``, what tokens are clustered by and neurons
            priced by (see ``clusters/importance.py``). ``fisher`` (default with ``awc``) falls back
            to ``norm`` with a warning where memory does not suffice for a backward pass.
            ``awc-paper`` is always binary.
        allocation: how the budget is spent. ``global`` (default with ``awc``) cuts all sets at one
            price of a neuron (see ``sparse_runtime.artifact.bands``); ``uniform`` gives every set the
            same size, as ``awc-paper`` always does.
        verify: leave neurons that are needed by some of a cluster's tokens only to a look; needs,
            and is the default with, allocation ``global``.
        fisher_tokens: calibration tokens of the backward passes that estimate the loss's
            sensitivity (default 8,192; importance ``fisher`` only).
        loop_weights: weigh layers by what they leave out of the sparse model, see
            ``clusters/tuning/loop_weights.py``; needs, and is the default with, allocation
            ``global``.
        tune_tokens: calibration tokens on which biases are tuned in the sparse model, layer by layer
            (``clusters/tuning/local.py``), 0 for none; what does not help held-out text is not kept.
            Needs allocation ``global`` and cluster biases, and is 16,384 with them.
        distill: steps that tune biases, and a correction, against the dense model's predictions, after
            that; what does not help held-out text is not kept. Needs allocation ``global`` and cluster
            biases, and is 20 with them, but none of a model whose weights are offloaded.
        correction_rank: of a low-rank correction that is tuned beside the biases; its bytes come out
            of the budget, and in small models it is not worth them (default 0: none; docs/LOG.md).
            Needs ``distill``.
        cluster_bias: add, for each cluster, the mean of what its set leaves out (``awc`` only, where
            it is the default).
        num_clusters: K, 1 to 16,384.
        weights: bits of the planes (3 to 8) that clusters are built for, and that the FFNs' weights are
            packed in meanwhile; None for float weights. Needs allocation ``global`` and ``verify``.
        budget: cost share asked for, of all layers together, in (0, 1]: FFN bytes read per token,
            router included, over those of the dense FFN in bfloat16. Bits per FFN weight and token ÷ 16
            are the share. The density follows from it. Default 0.5, with ``weights`` 0.64 of what these
            take.
        router: ``auto`` tries several kinds on three layers and takes the one with the least estimated
            loss on held-out tokens at this budget; ``linear``; or the rank of a low-rank router.
        router_rounds: reassign–recompute rounds after the first training (``awc`` only, default 1).
        max_tokens: calibration tokens, one window at least; None takes all the text there is.
        window: tokens per calibration window.
        held_out_share: share of the windows kept from fitting, for early stop and the figures.
        clustering_tokens: at most this many tokens take part in the clustering's iterations (default
            32,768); the final sets and routers use all of them. ``awc`` only.
        seed: of windows, initialization and training, below 2³².
        memory_mib: bound, each, on the capture's buffers and on one layer's importance matrix; above
            it both go through files.
        percentile: scores above this percentile of their layer count as active (default 50; importance
            ``binary`` only).
        paper_init: ``random`` (default) or ``kmeans++``; ``awc-paper`` only.
        paper_pooled: one table of clusters for all layers, as in the paper, instead of one for each
            layer; ``awc-paper`` only.
        save_centroids: keep the float centroids in the artifact.

    Raises:
        ConfigError: a value of the wrong kind or out of range, or one that the others rule out.
    """

    method: Literal["awc", "awc-paper"] = "awc"
    importance: Literal["fisher", "norm", "binary"] | None = None
    allocation: Literal["global", "uniform"] | None = None
    verify: bool | None = None
    fisher_tokens: int | None = None
    loop_weights: bool | None = None
    tune_tokens: int | None = None
    distill: int | None = None
    correction_rank: int | None = None
    cluster_bias: bool | None = None
    num_clusters: int = 256
    weights: int | None = None
    budget: float | None = None
    router: str = "auto"
    router_rounds: int | None = None
    max_tokens: int | None = 65_536
    window: int = 512
    held_out_share: float = 0.1
    clustering_tokens: int | None = None
    seed: int = 0
    memory_mib: int = 1024
    percentile: float | None = None
    paper_init: Literal["random", "kmeans++"] | None = None
    paper_pooled: bool | None = None
    save_centroids: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_kind(field.name, getattr(self, field.name), str(field.type))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
        for name, (valid, expected) in _ranges(self).items():
            if not valid:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {expected}")
        if self.budget is not None:
            # On disk a budget is a float; 1 is as good as 1.0 to the user.
            object.__setattr__(self, "budget", float(self.budget))
        self.resolved()

    def resolved(self) -> BuildSettings:
        """These options with a value for each that was left out and plays a part.

        Raises:
            ConfigError: an option was given that the others leave without effect.
        """
        values = asdict(self)

        def settle(name: str, default: Any, possible: bool, reason: str, idle: Any = None) -> None:
            """Fill in an option; where it plays no part only ``idle`` or None may be given."""
            if possible:
                values[name] = default if values[name] is None else values[name]
            elif values[name] in (None, idle):
                values[name] = idle
            else:
                raise ConfigError(
                    f"{name} is {values[name]!r}, which has no effect with {reason}; leave {name} "
                    f"out, or change the other"
                )

        awc, method = self.method == "awc", f"method {self.method!r}"
        settle("importance", "fisher", awc, method, "binary")
        settle("allocation", "global", awc, method, "uniform")
        settle("cluster_bias", True, awc, method, False)
        settle("router_rounds", 1, awc, method, 0)
        settle("clustering_tokens", 32_768, awc, method)
        settle("paper_init", "random", not awc, method)
        settle("paper_pooled", False, not awc, method, False)
        importance = f"importance {values['importance']!r}"
        settle("fisher_tokens", 8192, values["importance"] == "fisher", importance)
        settle("percentile", 50.0, values["importance"] == "binary", importance)
        cuts = values["allocation"] == "global"
        reason = f"allocation {values['allocation']!r}" if awc else method
        settle("verify", True, cuts, reason, False)
        settle("loop_weights", True, cuts, reason, False)
        reason = "cluster_bias False" if cuts else reason
        settle(
            "weights", None, cuts and values["verify"], f"{reason} and verify {values['verify']}"
        )
        if values["budget"] is None:
            bits = values["weights"]
            values["budget"] = 0.5 if bits is None else (bits + 0.25) / 16 * _PLANES_SHARE
        settle("tune_tokens", 16_384, cuts and values["cluster_bias"], reason, 0)
        settle("distill", 20, cuts and values["cluster_bias"], reason, 0)
        settle("correction_rank", 0, values["distill"] > 0, f"distill {values['distill']}", 0)
        return BuildSettings(**values)


@dataclass(frozen=True)
class BuildSettings:
    """Resolved options, as of :class:`BuildConfig`; None where an option plays no part."""

    method: str
    importance: str
    allocation: str
    verify: bool
    fisher_tokens: int | None
    loop_weights: bool
    tune_tokens: int
    distill: int
    correction_rank: int
    cluster_bias: bool
    num_clusters: int
    weights: int | None
    budget: float
    router: str
    router_rounds: int
    max_tokens: int | None
    window: int
    held_out_share: float
    clustering_tokens: int | None
    seed: int
    memory_mib: int
    percentile: float | None
    paper_init: Literal["random", "kmeans++"] | None
    paper_pooled: bool
    save_centroids: bool

    def without_backward(self) -> BuildSettings:
        """What is left of them where no backward pass can run."""
        changes: dict[str, Any] = {"importance": "norm", "fisher_tokens": None}
        changes |= {"loop_weights": False, "distill": 0, "correction_rank": 0}
        return replace(self, **changes)

    def record(self) -> dict[str, Any]:
        """All settings, as JSON."""
        return asdict(self)


_CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "importance": IMPORTANCE_KINDS,
    "allocation": ("global", "uniform"),
    "paper_init": ("random", "kmeans++"),
}
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
}


def _check_kind(name: str, value: Any, annotation: str) -> None:
    """Refuse what is not of the annotated kind: True is no number, "no" is no truth value."""
    if value is None and annotation.endswith("| None"):
        return
    kind = "str" if annotation.startswith("Literal") else annotation.partition(" ")[0]
    fits = isinstance(value, _KINDS[kind]) and (kind == "bool" or not isinstance(value, bool))
    if not fits or (kind == "float" and not math.isfinite(value)):
        expected = {"str": "a string", "bool": "True or False", "int": "a whole number"}
        raise ConfigError(
            f"{name} is {value!r} ({type(value).__name__}); expected "
            f"{expected.get(kind, 'a finite number')}"
        )


def _ranges(config: BuildConfig) -> dict[str, tuple[bool, str]]:
    """Whether a field's value is in its range, and what is expected; fields that are None pass."""

    def at_least(name: str, least: int, expected: str) -> tuple[bool, str]:
        value = getattr(config, name)
        return value is None or value >= least, expected

    return {
        "num_clusters": (1 <= config.num_clusters <= MAX_CLUSTERS, f"1 to {MAX_CLUSTERS}"),
        "weights": (
            config.weights is None or config.weights in PLANE_BITS,
            f"one of {', '.join(map(str, PLANE_BITS))}, or None",
        ),
        "budget": (
            config.budget is None or 0 < config.budget <= 1,
            "a cost share above 0 and at most 1",
        ),
        "router_rounds": at_least("router_rounds", 0, "0 or more"),
        "window": at_least("window", 2, "2 or more"),
        "max_tokens": at_least(
            "max_tokens", config.window, f"at least one window, {config.window}, or None"
        ),
        "held_out_share": (0 < config.held_out_share < 1, "a share between 0 and 1"),
        "fisher_tokens": at_least("fisher_tokens", 1, "1 or more"),
        "tune_tokens": at_least("tune_tokens", 0, "0 or more"),
        "distill": at_least("distill", 0, "0 or more steps"),
        "correction_rank": at_least("correction_rank", 0, "0 or more"),
        "clustering_tokens": at_least("clustering_tokens", 1, "1 or more"),
        "seed": (0 <= config.seed < 2**32, "0 to 2³² − 1"),
        "memory_mib": at_least("memory_mib", 1, "1 or more"),
        "percentile": (
            config.percentile is None or 0 < config.percentile < 100,
            "a percentage between 0 and 100",
        ),
        "router": (_is_router(config.router), "auto, linear or a rank of 1 or more"),
    }


def _is_router(value: str) -> bool:
    return value in ("auto", "linear") or (value.isdecimal() and int(value) > 0)
