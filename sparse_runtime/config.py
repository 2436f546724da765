"""Run-time options of ``sparsify``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal

from sparse_runtime.errors import ConfigError
from sparse_runtime.kernels import BACKENDS
from sparse_runtime.kernels.planes import PLANE_BITS


@dataclass(frozen=True)
class SparseConfig:
    """How a sparse model runs.

    Args:
        backend: kernel backend; ``auto`` picks the best one for the device, and leaves the model
            dense, with a warning, where there is none. ``reference`` is for checking: it is slower
            than dense.
        strict: raise where the backend asked for cannot run, or an FFN can only run as it stands
            (docs/compatibility.md), instead of falling back with a warning.
        prefill: ``dense`` runs calls of many tokens through all neurons; ``sparse`` routes every
            token of every call, whatever its size (evaluation does).
        max_sparse_tokens: largest number of tokens in one call (batch · sequence) that is run
            sparsely; only with ``prefill="dense"``. None: 2 on a CPU, on a GPU what
            ``sparse-runtime tune`` found. ``sparse-runtime bench`` shows what is fastest where.
        fast_linear: also run the model's other linear layers (attention, output head) through the
            CPU kernels in calls of few tokens, where torch reads bfloat16 weights at half of the
            memory's speed; see :func:`sparse_runtime.fast_linear`.
        budget: cost share of all layers together, cut from the artifact's centroids; None keeps the
            artifact's own sets. Bits per FFN weight and token ÷ 16 are the share: 4 bits are 0.25.
        max_loss: in place of a budget: the smallest one whose loss on text held out of the build, as
            KL(dense ‖ sparse) in nats per token, was no more than this; see
            :meth:`ClusterSet.budget_for`. Other text may lose more.
        max_loss_domain: held-out text that counts for ``max_loss``; None for the one that loses most.
        verify: with or without the band of neurons that looks decide on; None keeps what the
            artifact has. The copies take 17 % of the FFN's memory.
        layer_budgets: layer index -> cost share of its own, 1 for dense; the others share what these
            leave of the budget.
        weights: bits of the FFNs' weights, packed in planes when the model is made sparse: 3, 4, 5, 6,
            7 or 8; None leaves them as they are, floats or packed already.
        linear_weights: bits of attention and head, packed likewise; None leaves them as they are.
        keep_float: keep the float weights that are packed, so that ``unsparsify`` gives back the model
            bit for bit. They stay in the CPU's memory beside the planes, and take what they took
            before: a bfloat16 model packed in 6 bits takes 1.4 times its memory instead of 0.4.
        tau: over planes, neurons whose look gives 1 < e ≤ tau are counted from their base planes, and
            refined beyond: 1 refines all that are counted, infinity none. None takes what sets were cut
            with, layer by layer, or 2 where they were cut for float weights.
        ramp: over planes, width of the ramp over which a neuron's share grows from 0 to 1; 0: a step.
        guard: audit prompts, where the artifact says what to expect, and decode those sequences dense
            that clusters do not fit (``sparse_runtime.ffn.guard``); only with ``prefill="dense"``.
        check_fingerprint: refuse an artifact that was built for other weights; model type, sizes and
            layers must fit in any case.
    """

    backend: str = "auto"
    strict: bool = False
    prefill: Literal["dense", "sparse"] = "dense"
    max_sparse_tokens: int | None = None
    fast_linear: bool = False
    budget: float | None = None
    max_loss: float | None = None
    max_loss_domain: str | None = None
    verify: bool | None = None
    layer_budgets: Mapping[int, float] | None = None
    weights: int | None = None
    linear_weights: int | None = None
    keep_float: bool = False
    tau: float | None = None
    ramp: float = 0.0
    guard: bool = True
    check_fingerprint: bool = True

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend is {self.backend!r}; expected one of {', '.join(BACKENDS)}")
        if self.prefill not in ("dense", "sparse"):
            raise ConfigError(f"prefill is {self.prefill!r}; expected 'dense' or 'sparse'")
        for name in ("strict", "fast_linear", "keep_float", "guard", "check_fingerprint"):
            _check(name, getattr(self, name), _is_bool, "True or False")
        _check(
            "max_sparse_tokens",
            self.max_sparse_tokens,
            lambda v: v is None or (_is_whole(v) and v >= 1),
            "a whole number of 1 or more, or None",
        )
        if self.prefill == "sparse" and self.max_sparse_tokens is not None:
            raise ConfigError(
                f"max_sparse_tokens is {self.max_sparse_tokens}, which has no effect with prefill "
                "'sparse'; leave max_sparse_tokens out, or change the other"
            )
        for name in ("weights", "linear_weights"):
            bits = getattr(self, name)
            _check(
                name,
                bits,
                lambda v: v is None or (_is_whole(v) and v in PLANE_BITS),
                f"one of {', '.join(map(str, PLANE_BITS))}, or None",
            )
        if self.keep_float and self.weights is None and self.linear_weights is None:
            raise ConfigError(
                "keep_float is True without weights or linear_weights, so that all stays float; give "
                "one of them, or leave keep_float out"
            )
        _check(
            "tau",
            self.tau,
            lambda v: v is None or (_is_number(v) and v >= 1),
            "a number of 1 or more, or None",
        )
        _check(
            "ramp",
            self.ramp,
            lambda v: _is_number(v) and 0 <= v < math.inf,
            "a finite number of 0 or more",
        )
        check_cut(self.budget, self.verify, self.layer_budgets)
        _check(
            "max_loss",
            self.max_loss,
            lambda v: v is None or (_is_number(v) and 0 < v < math.inf),
            "a number above 0, or None",
        )
        if self.max_loss is not None and self.budget is not None:
            raise ConfigError(
                f"max_loss is {self.max_loss}, which chooses a budget, and budget is {self.budget}; "
                "leave one of them out"
            )
        if self.max_loss is None and self.max_loss_domain is not None:
            raise ConfigError(
                f"max_loss_domain is {self.max_loss_domain!r}, which has no effect without max_loss; "
                "give it as well, or leave the other out"
            )

    @property
    def cuts(self) -> bool:
        """Whether sets are cut anew, for which an artifact's centroids are needed."""
        wanted = (self.budget, self.max_loss, self.verify, self.layer_budgets or None)
        return any(value is not None for value in wanted)

    def with_options(self, options: dict[str, Any]) -> SparseConfig:
        """Return a copy with some fields changed.

        Raises:
            ConfigError: a name is no field, or a value is out of range.
        """
        names = [field.name for field in fields(self)]
        unknown = sorted(set(options) - set(names))
        if unknown:
            raise ConfigError(f"option {unknown[0]!r} is not known; expected some of {names}")
        return replace(self, **options)


def check_cut(budget: Any, verify: Any, layer_budgets: Any) -> None:
    """Check what sets are to be cut for; None where the artifact's own holds.

    Raises:
        ConfigError: a value is of the wrong kind or out of range.
    """
    share = "a cost share above 0 and at most 1"
    _check("budget", budget, lambda v: v is None or _is_share(v), f"{share}, or None")
    _check("verify", verify, lambda v: v is None or _is_bool(v), "True, False or None")
    _check(
        "layer_budgets",
        layer_budgets,
        lambda v: v is None or isinstance(v, Mapping),
        "a mapping of layer index to cost share, or None",
    )
    for index, own in (layer_budgets or {}).items():
        _check("a layer of layer_budgets", index, _is_whole, "a whole number")
        _check(f"layer_budgets[{index}]", own, _is_share, share)


def _check(name: str, value: Any, is_valid: Callable[[Any], bool], expected: str) -> None:
    if not is_valid(value):
        raise ConfigError(f"{name} is {value!r}; expected {expected}")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= 1
