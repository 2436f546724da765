"""Training of a router by expected coverage.

The loss is the coverage a token loses if its cluster is drawn from the router's softmax,

    L = −Σ_t Σ_k softmax(logits(x_t))_k · coverage(t, k)

rather than cross-entropy: sets of neighboring clusters overlap, so a near miss is nearly free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_runtime.predictors.routers import LowRankRouter, Router, new_router

# Tokens whose states are in float32 at a time.
_CHUNK_TOKENS = 8192


@dataclass(frozen=True)
class RouterTraining:
    """Settings of the router's training.

    Args:
        max_epochs: bound on passes over the training tokens.
        max_samples: bound on tokens seen, whatever the epochs.
        batch_tokens: tokens per step.
        learning_rate: peak of Adam's cosine schedule, for standardized inputs.
        patience: epochs without a better held-out coverage before stopping.
    """

    max_epochs: int = 3
    max_samples: int = 400_000
    batch_tokens: int = 1024
    learning_rate: float = 2e-3
    patience: int = 2


def initial_router(
    hidden_states: Tensor,
    assignment: Tensor,
    num_clusters: int,
    rank: int | None,
    *,
    ridge: float = 1e-2,
) -> Router:
    """Router in closed form: linear discriminant analysis of the assignment.

    logits_k = μ_kᵀ Σ⁻¹ x − ½ μ_kᵀ Σ⁻¹ μ_k + log π_k (Hastie et al., The Elements of Statistical
    Learning, eq. 4.10), with the pooled covariance Σ + ridge·tr(Σ)/H·I. A low-rank router keeps the
    leading directions of the cluster means in the space that Σ whitens.

    Args:
        hidden_states: [N, H], any float dtype.
        assignment: cluster of each token, int64 [N].
        num_clusters: K.
        rank: r, or None for a linear router.
        ridge: regularization of the covariance.
    """
    num_tokens, hidden_size = hidden_states.shape
    counts = torch.bincount(assignment, minlength=num_clusters).float()
    sums = hidden_states.new_zeros(num_clusters, hidden_size, dtype=torch.float32)
    within = hidden_states.new_zeros(hidden_size, hidden_size, dtype=torch.float32)
    for states, own in zip(
        hidden_states.split(_CHUNK_TOKENS), assignment.split(_CHUNK_TOKENS), strict=True
    ):
        x = states.float()
        sums.index_add_(0, own, x)
        within.addmm_(x.t(), x)
    overall = sums.sum(0) / num_tokens
    mean_square = within.diagonal().mean().item() / num_tokens
    # A mean over few tokens is mostly noise in H dimensions: shrink by eight tokens.
    means = (sums + 8 * overall) / (counts + 8).unsqueeze(-1)
    within -= (sums / counts.clamp_min(1).unsqueeze(-1)).t() @ sums
    within /= num_tokens
    within.diagonal().add_(ridge * within.diagonal().mean())
    factor = _cholesky(within, mean_square)
    whitened = torch.linalg.solve_triangular(factor, means.t() - overall.unsqueeze(-1), upper=False)
    prior = ((counts + 1) / (counts + 1).sum()).log()
    router = new_router(hidden_size, num_clusters, rank).to(hidden_states.device)
    with torch.no_grad():
        if isinstance(router, LowRankRouter):
            directions = torch.linalg.svd(whitened * counts.sqrt(), full_matrices=False).U
            basis = directions[:, : router.down.shape[0]]
            projected = basis.t() @ whitened
            router.down.zero_()[: basis.shape[1]] = torch.linalg.solve_triangular(
                factor.t(), basis, upper=True
            ).t()
            router.up.zero_()[:, : basis.shape[1]] = projected.t()
            squared = projected.square().sum(0)
            center = (router.up @ router.down) @ overall
        else:
            router.up.copy_(torch.linalg.solve_triangular(factor.t(), whitened, upper=True).t())
            squared = whitened.square().sum(0)
            center = router.up @ overall
        router.bias.copy_(prior - 0.5 * squared - center)
    return router


def _cholesky(covariance: Tensor, mean_square: float) -> Tensor:
    """Cholesky factor of a covariance, with as much of a ridge as it takes to have one.

    Repetitive text has hidden states that vary in few directions, or not at all, and rounding leaves
    their covariance indefinite.

    Args:
        covariance: [H, H].
        mean_square: of the states' elements, what the ridge is measured by.
    """
    ridge = max(1e-6 * mean_square, 1e-20)
    while True:
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if not failed or ridge > 1e6 * mean_square:
            return factor
        covariance = covariance.clone()
        covariance.diagonal().add_(ridge)
        ridge *= 10


def routed_coverage(router: Router, hidden_states: Tensor, coverage: Tensor) -> float:
    """Mean coverage of tokens under the router's own choice.

    Args:
        router: the router.
        hidden_states: [n, H].
        coverage: of each token by each cluster's set [n, K].
    """
    ids = route(router, hidden_states)
    return coverage.gather(1, ids.unsqueeze(-1)).float().mean().item()


def route(router: Router, hidden_states: Tensor) -> Tensor:
    """Cluster of each token by the router: hidden states [N, H] -> int64 [N]."""
    with torch.inference_mode():
        chunks = [router(x.float()).argmax(-1) for x in hidden_states.split(_CHUNK_TOKENS)]
    return torch.cat(chunks).clone()


def train_router(
    router: Router,
    hidden_states: Tensor,
    coverage: Tensor,
    held_out_states: Tensor,
    held_out_coverage: Tensor,
    *,
    generator: torch.Generator,
    config: RouterTraining | None = None,
) -> list[float]:
    """Train a router in place; it ends with the weights of its best held-out coverage.

    Args:
        router: start, as from :func:`initial_router`.
        hidden_states: [N, H], any float dtype.
        coverage: coverage of each token by each cluster's set [N, K], any float dtype.
        held_out_states: [M, H].
        held_out_coverage: [M, K].
        generator: order of the tokens, on the CPU.
        config: settings.

    Returns:
        Held-out coverage before training and after each epoch.
    """
    config = config or RouterTraining()
    num_tokens = len(hidden_states)
    epochs = max(1, min(config.max_epochs, config.max_samples // num_tokens))
    steps = epochs * -(-min(num_tokens, config.max_samples) // config.batch_tokens)
    optimizer = torch.optim.Adam(router.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = [routed_coverage(router, held_out_states, held_out_coverage)]
    best_state, best_epoch = _snapshot(router), 0
    for epoch in range(1, epochs + 1):
        order = torch.randperm(num_tokens, generator=generator)[: config.max_samples]
        for batch in order.to(hidden_states.device).split(config.batch_tokens):
            gain = coverage[batch].float()
            gain = gain - gain.mean(-1, keepdim=True)
            loss = -(router(hidden_states[batch].float()).softmax(-1) * gain).sum(-1).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        history.append(routed_coverage(router, held_out_states, held_out_coverage))
        if history[-1] > history[best_epoch]:
            best_state, best_epoch = _snapshot(router), epoch
        elif epoch - best_epoch >= config.patience:
            break
    router.load_state_dict(best_state)
    return history


def _snapshot(router: Router) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in router.state_dict().items()}
