"""A linear router that names a token's experts from its hidden state, as Mixtral's does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.eval.upcycling.partition import chosen_experts

_STEPS = 600
_BATCH = 1024
_LEARNING_RATE = 3e-3
#: Spread of a router's logits. Softmax makes the chosen experts' weights of them, which are to be near
#: equal, as the dense FFN adds its neurons with weight one; which experts are chosen does not depend
#: on it.
_SPREAD = 0.05


def train_router(states: Tensor, mass: Tensor, active: int, generator: torch.Generator) -> Tensor:
    """Train a router to choose each token's ``active`` experts with the most mass.

    Logistic regression, in which a choice counts by the mass that a wrong one would lose.

    Args:
        states: the FFN's inputs [n, H] float32.
        mass: of each expert [n, E] float32.
        active: experts a token; below E.
        generator: draws batches.

    Returns:
        Weights [E, H] float32.
    """
    target = chosen_experts(mass, active)
    ordered = mass.sort(-1, descending=True).values
    threshold = (ordered[:, active - 1] + ordered[:, active]) / 2
    stakes = (mass - threshold.unsqueeze(-1)).abs()
    stakes /= stakes.mean().clamp_min(1e-20)
    size = states.square().mean().sqrt().clamp_min(1e-20)
    weight = torch.zeros(mass.shape[1], states.shape[1], device=states.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS):
        rows = torch.randint(len(states), (_BATCH,), generator=generator).to(states.device)
        logits = states[rows] / size @ weight.T
        loss = F.binary_cross_entropy_with_logits(logits, target[rows], weight=stakes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        spread = (states @ weight.T).std().clamp_min(1e-20)
        return weight.detach() * (_SPREAD / spread)


def expert_weights(states: Tensor, router: Tensor, active: int) -> Tensor:
    """The weights with which Mixtral adds the experts' outputs: [n, E], 0 where not chosen."""
    probabilities = (states @ router.T).softmax(-1)
    kept = probabilities * chosen_experts(probabilities, active)
    return kept / kept.sum(-1, keepdim=True)
