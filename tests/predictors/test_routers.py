"""Routers: shapes, the closed form, and training that helps on held-out tokens."""

import pytest
import torch

from sparse_runtime.predictors import LinearRouter, LowRankRouter, new_router
from sparse_runtime.predictors.training import (
    RouterTraining,
    initial_router,
    route,
    routed_coverage,
    train_router,
)


def separable(tokens=3000, hidden=24, clusters=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(clusters, hidden, generator=g)
    labels = torch.randint(0, clusters, (tokens,), generator=g)
    # Directions of unequal spread: nearest center is wrong, the covariance matters.
    spread = torch.linspace(0.2, 4, hidden)
    x = centers[labels] + spread * torch.randn(tokens, hidden, generator=g)
    coverage = 0.3 + 0.1 * torch.rand(tokens, clusters, generator=g)
    coverage[torch.arange(tokens), labels] = 0.9
    return x, labels, coverage


def test_shapes_and_sum():
    x = torch.randn(5, 8)
    for router, rank in ((LinearRouter(8, 3), None), (LowRankRouter(8, 3, 2), 2)):
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter)
        down = torch.eye(8) if router.down is None else router.down
        expected = x @ down.t() @ router.up.t() + router.bias
        torch.testing.assert_close(router(x), expected)
        assert type(new_router(8, 3, rank)) is type(router)


@pytest.mark.parametrize("rank", [None, 5, 3])
def test_closed_form_beats_chance_and_nearest_mean(rank):
    x, labels, _ = separable()
    router = initial_router(x[:2000], labels[:2000], 6, rank)
    accuracy = (route(router, x[2000:]) == labels[2000:]).float().mean()
    means = torch.stack([x[:2000][labels[:2000] == k].mean(0) for k in range(6)])
    nearest = (torch.cdist(x[2000:], means).argmin(-1) == labels[2000:]).float().mean()
    assert accuracy > 0.5
    if rank is None:
        assert accuracy > nearest


def test_full_rank_low_rank_router_equals_the_linear_one():
    x, labels, _ = separable()
    linear, low = (initial_router(x, labels, 6, rank) for rank in (None, 6))
    torch.testing.assert_close(low(x).softmax(-1), linear(x).softmax(-1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("rank", [None, 4])
def test_training_raises_held_out_coverage(rank):
    x, _, coverage = separable()
    g = torch.Generator().manual_seed(0)
    router = new_router(24, 6, rank)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=g)
    history = train_router(
        router,
        x[:2000],
        coverage[:2000],
        x[2000:],
        coverage[2000:],
        generator=g,
        config=RouterTraining(max_epochs=20, batch_tokens=128, learning_rate=1e-2),
    )
    assert max(history) > max(history[0] + 0.01, 0.85)
    assert routed_coverage(router, x[2000:], coverage[2000:]) == pytest.approx(max(history))


def test_keeps_the_best_epoch_and_stops_early():
    x, labels, coverage = separable()
    router = initial_router(x[:2000], labels[:2000], 6, None)
    # Held-out targets that contradict the training: every step makes things worse.
    wrong = coverage[2000:].roll(1, dims=-1)
    wrong = wrong.gather(1, route(router, x[2000:]).roll(1).unsqueeze(-1).expand_as(wrong))
    wrong[torch.arange(1000), route(router, x[2000:])] = 1.0
    before = {name: value.clone() for name, value in router.state_dict().items()}
    history = train_router(
        router,
        x[:2000],
        1 - coverage[:2000],
        x[2000:],
        wrong,
        generator=torch.Generator().manual_seed(0),
        config=RouterTraining(max_epochs=20, learning_rate=0.1, patience=2),
    )
    assert len(history) == 4 - 1
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())
