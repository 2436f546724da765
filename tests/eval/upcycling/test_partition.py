"""Experts out of neurons: balanced, by what acts together, the same for a seed."""

import pytest
import torch

from sparse_runtime.eval.upcycling.partition import (
    balanced_labels,
    chosen_experts,
    expert_mass,
    split_neurons,
)

EXPERTS, SIZE = 4, 12


@pytest.fixture
def groups():
    """Energy of tokens, each of which uses two of four groups of neurons; and the neurons' groups."""
    generator = torch.Generator().manual_seed(3)
    group = torch.arange(EXPERTS * SIZE)[torch.randperm(EXPERTS * SIZE, generator=generator)] % 4
    used = torch.rand(600, EXPERTS, generator=generator).topk(2).indices
    mask = torch.zeros(600, EXPERTS).scatter_(1, used, 1.0)[:, group]
    energy = (0.02 + mask) * torch.rand(600, EXPERTS * SIZE, generator=generator)
    return energy / energy.sum(-1, keepdim=True), group


def test_every_column_has_as_many_rows():
    scores = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    labels = balanced_labels(scores)
    assert labels.bincount(minlength=5).tolist() == [12] * 5
    own = scores.gather(1, labels[:, None]).mean()
    assert own > scores.mean() + 0.5


def test_a_tie_goes_to_the_first():
    assert balanced_labels(torch.zeros(4, 2)).tolist() == [0, 0, 1, 1]


def test_groups_that_act_together_are_found(groups):
    energy, group = groups
    labels = split_neurons(energy, EXPERTS, 2, torch.Generator().manual_seed(0))
    together = group[:, None] == group
    assert torch.equal(labels[:, None] == labels, together)
    mass = expert_mass(energy, labels, EXPERTS)
    assert torch.allclose(mass.sum(-1), torch.ones(600))
    assert (mass * chosen_experts(mass, 2)).sum(-1).mean() > 0.95


def test_the_seed_decides(groups):
    # Without groups, so that there are many splits of the same worth.
    energy = torch.rand(600, 48, generator=torch.Generator().manual_seed(1))
    a, b, c = (split_neurons(energy, 4, 2, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
