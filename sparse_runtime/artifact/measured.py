"""What cuts of an artifact read and lose on held-out text, and which cut keeps a promise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from sparse_runtime.errors import ConfigError
from sparse_runtime.printable import shown

#: What the domain that reads most may read beyond the budget.
DOMAIN_MARGIN = 0.01
# Of a normal distribution: 95 % lie within so many standard errors.
_INTERVAL = 1.96
# Domains, and cuts, of one artifact.
_MOST = 256
_AUDITED_LAYERS = 8
_KEYS = {"domains", "tokens", "verified", "cuts"}


def audited_layers(indices: Sequence[int]) -> tuple[int, ...]:
    """Layers that the guard audits: eight, evenly spaced out of an artifact's, or all if fewer."""
    ordered = sorted(indices)
    count = min(_AUDITED_LAYERS, len(ordered))
    return tuple(ordered[int((n + 0.5) * len(ordered) / count)] for n in range(count))


@dataclass(frozen=True)
class AuditLevels:
    """What an audit finds on text like the build's (``sparse_runtime.ffn.guard``).

    Attributes:
        errors: layer index -> mean ‖sparse(x) − dense(x)‖² per token.
        spread: standard deviation of a text's score.
    """

    errors: Mapping[int, float]
    spread: float


@dataclass(frozen=True)
class MeasuredCut:
    """One cut, run over held-out text with every token sparse.

    Attributes:
        aim: cost share that the cut expected of itself.
        shares: cost share of each domain, as of bfloat16 weights.
        kl: KL(dense ‖ sparse) of each domain in nats per token; None in what came from a format
            before 5.
        kl_error: its standard error.
        audit: what an audit of dense runs finds; None where nothing was audited.
    """

    aim: float
    shares: tuple[float, ...]
    kl: tuple[float, ...] | None = None
    kl_error: tuple[float, ...] | None = None
    audit: AuditLevels | None = None

    @property
    def promised(self) -> float:
        """The least budget that the cut keeps: the domains' mean, and none more than 0.01 above it."""
        return max(sum(self.shares) / len(self.shares), max(self.shares) - DOMAIN_MARGIN)


@dataclass(frozen=True)
class LossBudget:
    """A budget that was chosen for a loss.

    Attributes:
        budget: cost share.
        domain: that decided it.
        kl: of the domain at this budget, interpolated, in nats per token.
        interval: where 95 % of such measurements lie.
    """

    budget: float
    domain: str
    kl: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class MeasuredCuts:
    """Cuts that were measured when an artifact was built, and what they promise of others.

    Attributes:
        domains: name of each domain.
        tokens: that each was measured on.
        cuts: ascending in aim, and in what they promise.
        verified: whether they had neurons that looks decide on.
    """

    domains: tuple[str, ...]
    tokens: tuple[int, ...]
    cuts: tuple[MeasuredCut, ...] = ()
    verified: bool = True

    def with_cut(self, cut: MeasuredCut) -> MeasuredCuts:
        """With one more cut, which counts before those that contradict it."""
        cuts = [
            one
            for one in self.cuts
            if (one.aim < cut.aim and one.promised < cut.promised)
            or (one.aim > cut.aim and one.promised > cut.promised)
        ]
        return replace(self, cuts=tuple(sorted([*cuts, cut], key=lambda one: one.aim)))

    def aim_for(self, budget: float, whole: float = 1.0) -> float:
        """What a cut is to expect of itself for held-out text to keep a budget.

        Linear between the measured cuts. A cut of no neuron and one of all read what they expect.

        Args:
            budget: cost share.
            whole: cost share of all neurons: 1, or less in planes.
        """
        knots = [(0.0, 0.0), *((cut.promised, cut.aim) for cut in self.cuts), (whole, whole)]
        knots = [(x, y) for x, y in knots if x <= whole]
        return budget if budget >= whole else _interpolated(knots, budget)

    def budget_for(self, max_loss: float, domain: str | None = None) -> LossBudget:
        """The least budget whose loss is at most ``max_loss``, by the cuts that were measured.

        The logarithm of a loss is linear in the budget between two cuts.

        Args:
            max_loss: KL(dense ‖ sparse) in nats per token.
            domain: whose; None for the one that loses most.

        Raises:
            ConfigError: no loss has been measured, there is no such domain, or the loss is out of the
                range that has been measured.
        """
        cuts = [cut for cut in self.cuts if cut.kl is not None and cut.kl_error is not None]
        if not cuts or not self.domains:
            raise ConfigError(
                "the artifact does not say what its cuts lose: it was built before format 5, or "
                "without a global allocation; give a budget instead of a loss, or build it again"
            )
        if domain is not None and domain not in self.domains:
            raise ConfigError(
                f"the artifact has measured no domain {shown(domain)}; expected one of "
                f"{', '.join(map(repr, self.domains))}"
            )
        if not (isinstance(max_loss, int | float) and math.isfinite(max_loss)):
            raise ConfigError(f"max_loss is {max_loss!r}; expected a number above 0")
        chosen = self.domains if domain is None else (domain,)
        found = [self._budget_of(cuts, self.domains.index(name), max_loss) for name in chosen]
        return max(found, key=lambda one: one.budget)

    def _budget_of(self, cuts: Sequence[MeasuredCut], number: int, max_loss: float) -> LossBudget:
        name = self.domains[number]
        losses = [max(cut.kl[number], 1e-9) for cut in cuts if cut.kl is not None]
        errors = [cut.kl_error[number] for cut in cuts if cut.kl_error is not None]
        budgets = [cut.promised for cut in cuts]
        # More budget, less loss; noise of two cuts that are close may have it otherwise.
        for i in range(len(losses) - 1, 0, -1):
            losses[i - 1] = max(losses[i - 1], losses[i])
        if max_loss < losses[-1]:
            raise ConfigError(
                f"max_loss is {max_loss}; the least loss that was measured on {shown(name)} is "
                f"{losses[-1]:.4f}, at budget {budgets[-1]:.3f}: expected as much or more, or a budget"
            )
        if max_loss >= losses[0]:
            budget, kl = budgets[0], losses[0]
        else:
            by_loss = sorted(zip(map(math.log, losses), budgets, strict=True))
            budget, kl = _interpolated(by_loss, math.log(max_loss)), max_loss
        error = _interpolated(list(zip(budgets, errors, strict=True)), budget)
        interval = (max(0.0, kl - _INTERVAL * error), kl + _INTERVAL * error)
        return LossBudget(budget, name, kl, interval)

    def without_audits(self) -> MeasuredCuts:
        """Of cuts that are of no use to compare audits with."""
        return replace(self, cuts=tuple(replace(cut, audit=None) for cut in self.cuts))

    def audit_for(self, budget: float, *, verified: bool) -> AuditLevels | None:
        """What an audit finds of a cut for a budget: between two measured cuts, by logarithms.

        None where no such cut was audited. Layers that read all neurons in one of the two are left out.
        """
        cuts = [(cut.promised, cut.audit) for cut in self.cuts if cut.audit is not None]
        if not cuts or verified != self.verified:
            return None
        above = [cut for cut in cuts if cut[0] >= budget][:1] or cuts[-1:]
        below = [cut for cut in cuts if cut[0] <= budget][-1:] or cuts[:1]
        (x0, low), (x1, high) = below[0], above[0]
        part = 0.0 if x0 == x1 else min(max((budget - x0) / (x1 - x0), 0.0), 1.0)
        errors = {
            layer: math.exp((1 - part) * math.log(error) + part * math.log(high.errors[layer]))
            for layer, error in low.errors.items()
            if error > 0 and high.errors.get(layer, 0) > 0
        }
        return AuditLevels(errors, max(low.spread, high.spread)) if errors else None

    def record(self) -> dict[str, Any]:
        """As in ``config.json``."""
        return {
            "domains": list(self.domains),
            "tokens": list(self.tokens),
            "verified": self.verified,
            "cuts": [
                {
                    "aim": cut.aim,
                    "shares": list(cut.shares),
                    "kl": None if cut.kl is None else list(cut.kl),
                    "kl_error": None if cut.kl_error is None else list(cut.kl_error),
                    "audit": None
                    if cut.audit is None
                    else {
                        "layers": sorted(cut.audit.errors),
                        "errors": [cut.audit.errors[i] for i in sorted(cut.audit.errors)],
                        "spread": cut.audit.spread,
                    },
                }
                for cut in self.cuts
            ],
        }

    @staticmethod
    def is_record(value: Any) -> bool:
        """Whether a value read from JSON is what :meth:`record` gives."""
        if not (isinstance(value, dict) and value.keys() == _KEYS):
            return False
        if not isinstance(value["verified"], bool):
            return False
        domains, tokens, cuts = (value[key] for key in ("domains", "tokens", "cuts"))
        if not (isinstance(domains, list) and 0 < len(domains) <= _MOST):
            return False
        texts = all(isinstance(name, str) for name in domains) and len(set(domains)) == len(domains)
        if not (texts and _numbers(tokens, len(domains), 2**53)):
            return False
        if not (isinstance(cuts, list) and len(cuts) <= _MOST):
            return False
        return all(_is_cut(cut, len(domains)) for cut in cuts) and all(
            first["aim"] < second["aim"] for first, second in pairwise(cuts)
        )

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> MeasuredCuts:
        """Of what :meth:`record` gave, checked."""
        return cls(
            tuple(record["domains"]),
            tuple(record["tokens"]),
            tuple(
                MeasuredCut(
                    float(cut["aim"]),
                    tuple(map(float, cut["shares"])),
                    None if cut["kl"] is None else tuple(map(float, cut["kl"])),
                    None if cut["kl_error"] is None else tuple(map(float, cut["kl_error"])),
                    _audit_of(cut["audit"]),
                )
                for cut in record["cuts"]
            ),
            record["verified"],
        )

    @classmethod
    def from_excess(cls, excess: float) -> MeasuredCuts | None:
        """What formats 1 to 4 say: by how much held-out text read more than a cut expected.

        A cut was to aim lower by that excess between budgets of a quarter and of a half, and by less
        towards no neuron and all.
        """
        if not excess:
            return None
        cuts = tuple(MeasuredCut(share - excess, (share,)) for share in (0.25, 0.5))
        return cls(("held-out text",), (0,), cuts)


def _audit_of(record: dict[str, Any] | None) -> AuditLevels | None:
    if record is None:
        return None
    errors = map(float, record["errors"])
    return AuditLevels(dict(zip(record["layers"], errors, strict=True)), float(record["spread"]))


def _is_audit(value: Any) -> bool:
    if value is None:
        return True
    if not (isinstance(value, dict) and value.keys() == {"layers", "errors", "spread"}):
        return False
    layers = value["layers"]
    return (
        isinstance(layers, list)
        and 0 < len(layers) <= _AUDITED_LAYERS
        and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in layers)
        and layers == sorted(set(layers))
        and _numbers(value["errors"], len(layers), 1e30)
        and _numbers([value["spread"]], 1, 1e6)
    )


def _is_cut(value: Any, domains: int) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"aim", "shares", "kl", "kl_error", "audit"}
        and _is_audit(value["audit"])
        and _numbers([value["aim"]], 1, 1)
        and _numbers(value["shares"], domains, 2)
        and (value["kl"] is None) == (value["kl_error"] is None)
        and all(
            value[key] is None or _numbers(value[key], domains, 1e6) for key in ("kl", "kl_error")
        )
    )


def _numbers(values: Any, count: int, most: float) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(
            isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
            for value in values
        )
    )


def _interpolated(knots: Sequence[tuple[float, float]], x: float) -> float:
    """Linear between knots (x, y) in ascending order of x, and level beyond them."""
    if x <= knots[0][0]:
        return knots[0][1]
    for (x0, y0), (x1, y1) in pairwise(knots):
        if x <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return knots[-1][1]
