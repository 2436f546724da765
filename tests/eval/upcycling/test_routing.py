"""Routers learn which experts hold the most, and weigh those near equally."""

import torch

from sparse_runtime.eval.upcycling.partition import chosen_experts
from sparse_runtime.eval.upcycling.routing import expert_weights, train_router


def test_a_linear_rule_is_learned():
    generator = torch.Generator().manual_seed(0)
    rule = torch.randn(6, 16, generator=generator)
    states = 30 * torch.randn(3000, 16, generator=generator)
    mass = (states @ rule.T / 60).softmax(-1)
    router = train_router(states[:2000], mass[:2000], 2, torch.Generator().manual_seed(0))
    again = train_router(states[:2000], mass[:2000], 2, torch.Generator().manual_seed(0))
    assert torch.equal(router, again)
    weights = expert_weights(states[2000:], router, 2)
    found = (mass[2000:] * (weights > 0)).sum(-1).mean()
    best = (mass[2000:] * chosen_experts(mass[2000:], 2)).sum(-1).mean()
    by_chance = 2 / 6
    assert found - by_chance > 0.95 * (best - by_chance)
    assert torch.allclose(weights.sum(-1), torch.ones(1000))
    assert (weights[weights > 0] - 0.5).abs().max() < 0.1
    assert (weights[weights > 0] - 0.5).abs().max() > 1e-4
