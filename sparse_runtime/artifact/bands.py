"""Which neurons of a cluster are computed, looked at first, or skipped, for any budget.

Two things are traded for each neuron of each cluster: the loss that leaving it out is estimated to
cost, e² = (h·w·v)² with the Fisher weights w of neurons and v of clusters (the factor ½ is common to
all), and the bytes it takes, at a price of λ for those of a bfloat16 neuron. With l, c and r the bytes
of its look, of counting and of refining it in parts of these, and ρ² the share of e² that is still lost
where it is counted by its base planes:

    never:  E[e²]                                 the neuron is skipped
    sure:   c·λ                                   it is computed; float weights only
    maybe:  l·λ + E[min(e², c·λ + ρ²e², (c + r)·λ)]
                                                  a look decides, token by token

The cheapest wins, and one λ for all layers and clusters is bisected to the budget. After a look a
neuron is counted where e² > c·λ, and refined where e² > c·λ·τ², with τ² = r / (c·ρ²). Float weights
have r = 0 and ρ = 0, and c = 1; without verification there is no third band, and a neuron is computed
where E[e²] > λ.

Of a mixture of experts h is a neuron's times what the token's router gives its expert, and means are
over the tokens that have the expert, as nothing is read of it for others; sums over a token's neurons
weigh each by P(expert | cluster).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_runtime.cost import FFNCost

# τ of neurons that are never refined; JSON knows no infinity.
_NEVER = 1e6


@dataclass(repr=False)
class LayerCentroids:
    r"""How a layer's neurons behave in each cluster, on average: what bands are cut from.

    Attributes:
        mean_squares: mean e² over each cluster's tokens [K, I].
        mean_magnitudes: mean \|e\| [K, I].
        mean_activations: mean h [K, I].
        shares: share of the tokens in each cluster [K].
        neuron_weights: w [I], so that e = h·w.
        expert_shares: of a mixture of E experts, share of each cluster's tokens that have each [K, E];
            means are over these tokens, and the neurons are the experts' one after the other. None of a
            single FFN.
    """

    mean_squares: Tensor
    mean_magnitudes: Tensor
    mean_activations: Tensor
    shares: Tensor
    neuron_weights: Tensor
    expert_shares: Tensor | None = None

    def __repr__(self) -> str:
        return "LayerCentroids({} clusters, {} neurons)".format(*self.mean_squares.shape)

    def every(self, step: int) -> LayerCentroids:
        """Of every ``step``-th neuron only, of each expert."""

        def some(values: Tensor) -> Tensor:
            experts = 1 if self.expert_shares is None else self.expert_shares.shape[1]
            return values.unflatten(-1, (experts, -1))[..., ::step].flatten(-2)

        return replace(
            self,
            mean_squares=some(self.mean_squares),
            mean_magnitudes=some(self.mean_magnitudes),
            mean_activations=some(self.mean_activations),
            neuron_weights=some(self.neuron_weights),
        )

    def weighted(self, cluster_weights: Tensor | None) -> LayerCentroids:
        """Where the e of a cluster's tokens counts so many times [K]; None: once."""
        if cluster_weights is None:
            return self
        factor = cluster_weights.float().unsqueeze(-1)
        return replace(
            self,
            mean_squares=self.mean_squares.float() * factor.square(),
            mean_magnitudes=self.mean_magnitudes.float() * factor,
        )

    def per_token(self, of_neurons: Tensor) -> float:
        """Mean over tokens of the sum over their neurons of values [K, I]."""
        return (self.shares @ self.of_tokens(of_neurons).sum(-1)).item()

    def of_tokens(self, of_neurons: Tensor) -> Tensor:
        """Values [K, I] of neurons where they are read as means over all tokens, float32."""
        values = of_neurons.float()
        if self.expert_shares is None:
            return values
        own = values.unflatten(-1, (self.expert_shares.shape[1], -1))
        return (own * self.expert_shares.unsqueeze(-1)).flatten(-2)

    def overall(self, of_neurons: Tensor) -> Tensor:
        """Mean of values [K, I] of neurons over all tokens that read them, float32 [I]."""
        means = self.shares @ self.of_tokens(of_neurons)
        if self.expert_shares is None:
            return means
        shares = (self.shares @ self.expert_shares).clamp_min(1e-30).unsqueeze(-1)
        return (means.unflatten(-1, (len(shares), -1)) / shares).flatten()

    def static_set(self, size: float) -> Tensor:
        """The ``size`` neurons that matter most where they are read, bool [I].

        Args:
            size: of a token; of experts' neurons as many more as there are more of them.
        """
        overall = self.overall(self.mean_squares)
        if self.expert_shares is not None:
            size *= self.expert_shares.shape[1] / (self.shares @ self.expert_shares).sum().item()
        top = overall.topk(min(len(overall), max(1, round(size)))).indices
        return torch.zeros_like(overall, dtype=torch.bool).index_fill_(0, top, True)


@dataclass(frozen=True)
class StageCosts:
    """What a layer's neurons cost, by how far they are read, in parts of a float neuron's bytes.

    Attributes:
        look: of a look; None without verification.
        count: of computing a neuron, after its look if there is one.
        refine: of reading the residual planes too; 0 where there are none.
        base_error: ρ², share of e² that is lost where a neuron is counted by its base planes.
        looks_first: whether every neuron is looked at before it is computed, as planes are.
    """

    look: float | None = None
    count: float = 1.0
    refine: float = 0.0
    base_error: float = 0.0
    looks_first: bool = False

    @classmethod
    def of(cls, cost: FFNCost, base_error: float = 0.0, *, verify: bool = True) -> StageCosts:
        """Of a layer's neurons, by their bytes.

        Args:
            cost: of the layer.
            base_error: ρ².
            verify: False: planes are read whole, and nothing is decided on the way.
        """
        if cost.looks_first and not verify:
            return cls(count=cost.whole_bytes / cost.dense_bytes)
        look, count, refine = (
            size / cost.neuron_bytes
            for size in (cost.look_bytes, cost.count_bytes, cost.refine_bytes)
        )
        looks = cost.looks_first or cost.verified
        error = base_error if cost.refine_bytes else 0.0
        return cls(look if looks else None, count, refine, error, cost.looks_first)

    @property
    def tau(self) -> float:
        """τ: neurons are refined where e is so many times what they are counted at; 1 at least."""
        gain = self.count * self.base_error
        return max(1.0, math.sqrt(self.refine / gain)) if gain > 0 else _NEVER

    def refined_from(self, price: float) -> float:
        """e² from which a neuron is refined, at a price λ."""
        return price * self.count * self.tau**2


@dataclass
class Bands:
    """The bands of one layer at one λ, and what they are expected to cost.

    Attributes:
        sure: computed, bool [K, I].
        maybe: computed if a look says so, bool [K, I]; None without verification.
        left_out: expected h of what a token's neurons leave out [K, I], over all tokens.
        computed: neurons computed per token, mean over clusters.
        looked: neurons looked at per token, mean over clusters.
        refined: neurons refined per token, mean over clusters.
        loss: estimated loss per token, mean over clusters.
        share_left_out: that loss as a share of Σ e² over all neurons.
    """

    sure: Tensor
    maybe: Tensor | None
    left_out: Tensor
    computed: float
    looked: float
    refined: float
    loss: float
    share_left_out: float


def cut_bands(centroids: LayerCentroids, price: float, stages: StageCosts) -> Bands:
    """Cut the bands of a layer.

    Args:
        centroids: of the layer.
        price: λ, the estimated loss that reading one bfloat16 neuron must save, > 0.
        stages: what neurons cost.
    """
    squares = centroids.mean_squares.float()
    activations = centroids.mean_activations.float()
    sure = squares > price * stages.count
    if stages.look is None:
        # The best neuron at least: a set is never empty.
        sure.scatter_(1, squares.argmax(-1, keepdim=True), True)
        loss = squares.masked_fill(sure, 0)
        computed = centroids.per_token(sure)
        left_out = centroids.of_tokens(activations.masked_fill(sure, 0))
        return Bands(sure, None, left_out, computed, 0.0, 0.0, *_losses(loss, centroids))
    magnitudes, threshold = centroids.mean_magnitudes.float(), price * stages.count
    tail = _LogNormal(squares, magnitudes, threshold)
    kept, exceeds, refined = tail.loss, tail.exceeds, torch.zeros(())
    if stages.base_error:
        finer = _LogNormal(squares, magnitudes, stages.refined_from(price))
        kept = kept + stages.base_error * (finer.loss - tail.loss)
        refined = finer.exceeds
    cost = stages.look * price + threshold * exceeds + stages.refine * price * refined
    maybe = kept + cost < (squares if stages.looks_first else squares.clamp_max(threshold))
    sure = torch.zeros_like(maybe) if stages.looks_first else sure & ~maybe
    loss = torch.where(maybe, kept, squares).masked_fill(sure, 0)
    left_out = torch.where(maybe, activations * tail.small_part, activations).masked_fill(sure, 0)
    return Bands(
        sure,
        maybe,
        centroids.of_tokens(left_out),
        centroids.per_token(sure + exceeds * maybe),
        centroids.per_token(maybe),
        centroids.per_token(refined * maybe),
        *_losses(loss, centroids),
    )


def _losses(loss: Tensor, centroids: LayerCentroids) -> tuple[float, float]:
    """Mean over clusters of what neurons lose [K, I], and that as a share of Σ e²."""
    lost, whole = centroids.per_token(loss), centroids.per_token(centroids.mean_squares)
    return lost, lost / max(whole, 1e-30)


def all_neurons(centroids: LayerCentroids) -> Bands:
    """Bands of a layer that computes every neuron, by all its bits."""
    sure = torch.ones_like(centroids.mean_squares, dtype=torch.bool)
    neurons = centroids.per_token(sure)
    return Bands(sure, None, torch.zeros(sure.shape), neurons, neurons, neurons, 0.0, 0.0)


class _LogNormal:
    """What verification at λ leaves of neurons whose e is log-normal with given moments.

    With ln|e| ~ N(m, s²): s² = ln(E[e²] / E[|e|]²), and all three values are partial moments (Johnson,
    Kotz and Balakrishnan, Continuous Univariate Distributions, vol. 1, section 14).

    Attributes:
        exceeds: P(e² > λ).
        loss: E[e²; e² ≤ λ].
        small_part: E[|e|; e² ≤ λ] / E[|e|].
    """

    def __init__(self, squares: Tensor, magnitudes: Tensor, price: float) -> None:
        squares = squares.clamp_min(1e-30)
        variance = (squares / magnitudes.square().clamp_min(1e-30)).log().clamp_min(1e-3)
        s = variance.sqrt()
        # ln √λ in standard deviations from the mean of ln|e|, which is ln √E[e²] − s².
        distance = (0.5 * math.log(price) - 0.5 * squares.log()) / s + s
        self.exceeds = torch.special.ndtr(-distance)
        self.loss = squares * torch.special.ndtr(distance - 2 * s)
        self.small_part = torch.special.ndtr(distance - s)
