"""Coverage clustering: each step against a loop, the objective's rise, planted clusters."""

import itertools

import pytest
import torch

from sparse_runtime.clusters.awc import (
    best_sets,
    cluster_means,
    coverage_matrix,
    fit_awc,
    top_sets,
)
from sparse_runtime.clusters.metrics import SetScorer, oracle_ids, oracle_price


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def planted(tokens=400, neurons=60, groups=4, seed=0):
    """Tokens of each group light up their own block of neurons, over weak noise."""
    g = generator(seed)
    labels = torch.randint(0, groups, (tokens,), generator=g)
    importance = 0.1 * torch.rand(tokens, neurons, generator=g)
    block = neurons // groups
    for group in range(groups):
        importance[labels == group, group * block : (group + 1) * block] += 1
    return importance * (0.5 + 5 * torch.rand(tokens, 1, generator=g)), labels


def test_coverage_and_means_match_a_loop():
    importance = torch.rand(11, 7, generator=generator())
    sets = torch.rand(3, 7, generator=generator(1)) < 0.5
    matrix = coverage_matrix(importance, sets)
    for t in range(11):
        for k in range(3):
            expected = importance[t][sets[k]].sum() / importance[t].sum()
            assert matrix[t, k].item() == pytest.approx(expected.item(), abs=1e-6)
    best, ids = best_sets(importance, sets)
    assert torch.equal(ids, matrix.argmax(-1))
    torch.testing.assert_close(best, matrix.max(-1).values)
    share = importance / importance.sum(-1, keepdim=True)
    means = cluster_means(importance, ids, 3, shrinkage=2.0)
    for k in range(3):
        own = share[ids == k]
        expected = (own.sum(0) + 2 * share.mean(0)) / (len(own) + 2)
        torch.testing.assert_close(means[k], expected)


def test_coverage_of_bfloat16_tells_clusters_apart():
    """Where the device has units for it, products round to it."""
    importance = planted(2000, 300, 6)[0].bfloat16()
    sets = top_sets(torch.rand(40, 300, generator=generator(1)), 120)
    found, expected = (coverage_matrix(values, sets) for values in (importance, importance.float()))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    best, ids = best_sets(importance, sets)
    lost = expected.max(-1).values - expected.gather(1, ids.unsqueeze(-1)).squeeze(-1)
    assert lost.mean() < 1e-4
    torch.testing.assert_close(best.mean(), expected.max(-1).values.mean(), atol=1e-3, rtol=0)


def test_objective_never_falls_and_sets_have_the_size_asked_for():
    importance = torch.rand(500, 40, generator=generator()) ** 3
    result = fit_awc(
        importance, num_clusters=12, set_size=15, generator=generator(), tolerance=-1.0
    )
    objective = [entry["objective"] for entry in result.history]
    assert len(objective) == 10
    assert all(b >= a - 1e-6 for a, b in itertools.pairwise(objective))
    assert objective[-1] > objective[0] + 0.01
    assert (result.active_sets.sum(-1) == 15).all()


def test_finds_planted_clusters():
    importance, labels = planted()
    result = fit_awc(importance, num_clusters=4, set_size=15, generator=generator(3))
    coverage = best_sets(importance, result.active_sets)[0].mean()
    static = top_sets(cluster_means(importance, torch.zeros_like(labels), 1), 15)
    assert coverage > 0.85
    assert best_sets(importance, static)[0].mean() < 0.5
    for group in range(4):
        assert len(result.assignment[labels == group].unique()) == 1


def test_deterministic_by_seed():
    importance, _ = planted()
    one, same, other = (
        fit_awc(importance, num_clusters=9, set_size=15, generator=generator(seed))
        for seed in (5, 5, 6)
    )
    assert torch.equal(one.active_sets, same.active_sets)
    assert not torch.equal(one.active_sets, other.active_sets)


def test_empty_clusters_are_reseeded():
    importance, _ = planted(groups=3)
    # Eight identical tokens leave most of their clusters empty at the first assignment.
    importance[:8] = importance[0]
    seeds = [s for s in range(40) if len(set(first_seeds(s, 6)) & set(range(8))) >= 2]
    result = fit_awc(importance, num_clusters=6, set_size=10, generator=generator(seeds[0]))
    assert result.history[0]["empty_clusters"] > 0
    assert len(result.assignment.unique()) > 6 - result.history[0]["empty_clusters"]


def first_seeds(seed, count):
    return torch.randperm(400, generator=generator(seed))[:count].tolist()


@pytest.mark.parametrize("clusters", [1, 20])
def test_one_cluster_and_one_per_token(clusters):
    importance = torch.rand(20, 30, generator=generator())
    result = fit_awc(importance, num_clusters=clusters, set_size=10, generator=generator())
    assert result.active_sets.shape == (clusters, 30)
    if clusters == 1:
        share = importance / importance.sum(-1, keepdim=True)
        assert torch.equal(result.active_sets, top_sets(share.mean(0, keepdim=True), 10))


def test_scorer_by_hand():
    sets = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    scorer = SetScorer(sets, torch.tensor([1, 0, 1, 0], dtype=torch.bool))
    importance = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 1.0, 3.0, 2.0]])
    scorer.add(importance, torch.tensor([0, 1]))
    scores = scorer.scores()
    expected = {
        "coverage": (0.7 + 0.5) / 2,
        "recall": (1.0 + 0.5) / 2,
        "precision": (1.0 + 0.5) / 2,
        "density": 0.5,
        "chance": 0.5,
        "oracle_coverage": (0.7 + 0.5) / 2,
        "router_top1": 0.5,  # the second token's two sets cover as much
        "static_coverage": (0.6 + 0.7) / 2,
        "static_recall": (0.5 + 1.0) / 2,
    }
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, abs=1e-6), name


def test_the_oracle_pays_for_large_sets():
    """The full set covers all of every token; the oracle takes it where it gains most."""
    sets = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    importance = torch.tensor([[5.0, 3.0, 1.0, 1.0], [1.0, 2.0, 1.0, 2.0], [0.0, 0.0, 1.0, 9.0]])

    def scores(ids):
        scorer = SetScorer(sets, sets[0])
        scorer.add(importance[:1], torch.tensor(ids[:1]))
        scorer.add(importance[1:], torch.tensor(ids[1:]))
        return scorer.scores()

    # Densities 1, 0.5, 0.5; the halves cover 0.8, 0.5 and 1.
    found = scores([0, 1, 2])
    assert found["density"] == pytest.approx(2 / 3)
    assert found["oracle_coverage"] == pytest.approx((0.8 + 1 + 1) / 3)
    assert found["router_top1"] == pytest.approx(1 / 3)
    # As many neurons as full sets, and as halves.
    assert scores([0, 0, 0])["oracle_coverage"] == 1
    assert scores([2, 1, 1])["oracle_coverage"] == pytest.approx((0.8 + 0.5 + 1) / 3)


def test_no_ids_of_as_few_neurons_cover_more():
    coverage = torch.rand(500, 12, generator=generator()) ** 2
    density = torch.linspace(0.2, 0.9, 12)
    for mean_density in (0.2, 0.4, 0.6, 0.9):
        price = oracle_price(coverage, density, mean_density)
        ids = oracle_ids(coverage, density, price)
        assert density[ids].mean() >= mean_density - 1e-5 or price == 0
        found = coverage.gather(1, ids.unsqueeze(-1)).mean()
        for seed in range(20):
            # Choices from random to nearly the best.
            noise = torch.rand(500, 12, generator=generator(seed)) * (20 - seed) / 10
            other = (coverage + noise - 0.05 * seed * density).argmax(-1)
            if density[other].mean() <= mean_density:
                assert coverage.gather(1, other.unsqueeze(-1)).mean() <= found + 1e-6
