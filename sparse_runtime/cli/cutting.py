"""The artifact of ``--clusters``, and the budget of ``--budget`` or ``--max-loss``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.recut import recut
from sparse_runtime.cli.console import note
from sparse_runtime.cli.ranges import ABOVE_ZERO
from sparse_runtime.errors import ConfigError
from sparse_runtime.printable import printable

MaxLossOption = Annotated[
    float | None,
    typer.Option(
        help="In place of --budget: as little as loses no more than this on text held out of the "
        "build, as KL to the dense model in nats per token (0.05).",
        callback=ABOVE_ZERO.callback,
    ),
]
MaxLossDomainOption = Annotated[
    str | None,
    typer.Option(
        help="With --max-loss: the held-out text that counts (inspect names them) [default: the one "
        "that loses most]"
    ),
]


@dataclass(frozen=True)
class Cut:
    """What the sets of an artifact are to be cut for; None where its own holds.

    Args:
        budget: of ``--budget``.
        verify: of ``--verify``.
        max_loss: of ``--max-loss``.
        domain: of ``--max-loss-domain``.

    Raises:
        ConfigError: a budget beside a loss, or a domain without one.
    """

    budget: float | None = None
    verify: bool | None = None
    max_loss: float | None = None
    domain: str | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and self.max_loss is not None:
            raise ConfigError(
                f"--max-loss {self.max_loss} chooses a budget, and --budget is {self.budget}; leave "
                "one of them out"
            )
        if self.domain is not None and self.max_loss is None:
            raise ConfigError(
                f"--max-loss-domain {self.domain} is without --max-loss; give it as well"
            )

    @property
    def wanted(self) -> bool:
        """Whether sets are cut anew, for which centroids are loaded."""
        return any(value is not None for value in (self.budget, self.verify, self.max_loss))

    def load(self, clusters: str, revision: str | None, *, centroids: bool = False) -> ClusterSet:
        """The artifact, with centroids where they are wanted."""
        wanted = centroids or self.wanted
        return ClusterSet.from_pretrained(clusters, revision=revision, centroids=wanted)

    def of(self, model: Any, artifact: ClusterSet) -> ClusterSet:
        """The artifact cut for it, as it is if nothing is wanted. Raises ConfigError."""
        if not self.wanted:
            return artifact
        return recut(model, artifact, budget=self.budget_in(artifact), verify=self.verify)

    def budget_in(self, artifact: ClusterSet) -> float | None:
        """The budget, if one is wanted; says what was chosen for a loss. Raises ConfigError."""
        if self.max_loss is None:
            return self.budget
        found = artifact.budget_for(self.max_loss, self.domain)
        low, high = found.interval
        note(
            f"budget {found.budget:.3f} for a loss of {self.max_loss:g}: KL {found.kl:.4f} "
            f"({low:.4f} to {high:.4f} with 95 % confidence) on held-out {printable(found.domain)}"
        )
        return found.budget
