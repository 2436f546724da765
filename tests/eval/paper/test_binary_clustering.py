"""The paper's opponents on patterns whose clusters are known."""

import pytest
import torch

from sparse_runtime.clusters.paper.binary_patterns import PackedPatterns, assign
from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.paper.binary_clustering import (
    BINARY_CLUSTERINGS,
    fit_factorization,
    fit_penalized,
    fit_relaxed_kmeans,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("fit", BINARY_CLUSTERINGS.values(), ids=BINARY_CLUSTERINGS)
def test_finds_planted_clusters(fit):
    random = generator()
    planted = torch.rand(3, 40, generator=random) > 0.5
    truth = torch.arange(300) % 3
    noise = torch.rand(300, 40, generator=random) < 0.05
    patterns = PackedPatterns.from_dense(planted[truth] ^ noise)
    best = min(
        (fit(patterns, 3, generator(seed)) for seed in range(5)),
        key=lambda c: int((c[assign(patterns, c)] ^ planted[truth]).sum()),
    )
    assert {tuple(row.tolist()) for row in best} == {tuple(row.tolist()) for row in planted}


def test_one_cluster_by_hand():
    # Neurons active for 4, 3, 2, 1 and none of four points.
    dense = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    patterns = PackedPatterns.from_dense(dense)
    for fit, ones in (
        (fit_relaxed_kmeans, 2),  # above one half
        (fit_factorization, 2),
        (lambda *arguments: fit_penalized(*arguments, penalty=0.5), 3),  # above 1/3
        (lambda *arguments: fit_penalized(*arguments, penalty=0.2), 4),  # above 1/6
        (lambda *arguments: fit_penalized(*arguments, penalty=4.0), 1),  # above 4/5
    ):
        assert fit(patterns, 1, generator()).tolist() == [[True] * ones + [False] * (5 - ones)]


def test_bad_settings():
    patterns = PackedPatterns.from_dense(torch.eye(4))
    for fit in BINARY_CLUSTERINGS.values():
        with pytest.raises(ConfigError, match="num_clusters is 5, but there are only 4 patterns"):
            fit(patterns, 5, generator())
        assert fit(patterns, 4, generator()).shape == (4, 4)
    with pytest.raises(ConfigError, match="penalty is 0"):
        fit_penalized(patterns, 2, generator(), penalty=0)
