import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_runtime.clusters.paper import balanced_assignment as balanced_module
from sparse_runtime.clusters.paper import binary_patterns
from sparse_runtime.clusters.paper.awc_paper import (
    AWCPaperConfig,
    PackedPatterns,
    assign,
    balanced_assignment,
    binarize,
    chance,
    coverage,
    distances,
    fit_awc_paper,
    initial_kmeans_plus_plus,
    initial_random,
    percentile_threshold,
    precision,
    static_coverage,
    update_centroids,
)
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.kernels.bitmaps import unpack_bits


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_mask(rows: int, columns: int, seed: int, density: float = 0.5) -> Tensor:
    return torch.rand(rows, columns, generator=seeded(seed)) < density


def naive_distance(point: Tensor, centroid: Tensor) -> int:
    return sum(int(x and not c) for x, c in zip(point.tolist(), centroid.tolist(), strict=True))


def naive_balanced(points: Tensor, centroids: Tensor) -> tuple[list[int], list[int]]:
    owner, distance = [-1] * len(points), [-1] * len(points)
    for cluster, centroid in enumerate(centroids):
        free = [point for point, taken_by in enumerate(owner) if taken_by < 0]
        free.sort(key=lambda point: (naive_distance(points[point], centroid), point))
        for point in free[: len(points) // len(centroids)]:
            owner[point] = cluster
            distance[point] = naive_distance(points[point], centroid)
    return owner, distance


def planted(num_points: int, num_clusters: int, num_neurons: int) -> tuple[Tensor, Tensor]:
    """Points that agree with one of K masks of half density in 90 % of the neurons."""
    masks = random_mask(num_clusters, num_neurons, 1)
    labels = torch.arange(num_points) % num_clusters
    return masks[labels] ^ random_mask(num_points, num_neurons, 2, 0.1), labels


shapes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000))


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_packing_round_trip(shape: tuple[int, int, int]) -> None:
    mask = random_mask(*shape)
    patterns = PackedPatterns.from_dense(mask)
    assert torch.equal(patterns.dense(), mask.float())
    assert torch.equal(patterns.dense(dtype=torch.bool), mask)
    assert torch.equal(patterns.dense(3, 7, torch.float64), mask[3:7].double())
    assert torch.equal(patterns.counts(), mask.sum(-1))
    assert torch.equal(patterns.frequency(), mask.double().mean(0))
    assert torch.equal(unpack_bits(patterns.bits, shape[1]), mask)


def test_concat_and_select() -> None:
    a, b = random_mask(3, 11, 0), random_mask(5, 11, 1)
    both = PackedPatterns.concat([PackedPatterns.from_dense(a), PackedPatterns.from_dense(b)])
    assert torch.equal(both.dense(dtype=torch.bool), torch.cat([a, b]))
    assert torch.equal(both.select(torch.tensor([4, 0])).dense(dtype=torch.bool)[1], a[0])
    with pytest.raises(DataError, match=r"\[11, 12\]"):
        PackedPatterns.concat([both, PackedPatterns.from_dense(random_mask(2, 12, 0))])
    with pytest.raises(DataError, match=r"\[N, 2\]"):
        PackedPatterns(both.bits[:, :1], 11)


@pytest.mark.parametrize("percentile", [0.0, 12.5, 50.0, 99.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_percentile_threshold(percentile: float, dtype: torch.dtype) -> None:
    values = (torch.randn(20_001, generator=seeded()) * 0.01).to(dtype)
    exact = values.float().abs().sort().values[max(1, math.ceil(percentile / 100 * 20_001)) - 1]
    found = percentile_threshold(values.split(3_000), percentile)
    assert found == percentile_threshold([values.flip(0)], percentile)
    if dtype == torch.bfloat16:
        assert found == exact
    else:
        assert found <= exact <= found * (1 + 2**-12)


def test_percentile_threshold_edges() -> None:
    assert percentile_threshold([torch.tensor([0.0, 0.0, -3.0])], 50) == 0.0
    assert percentile_threshold([torch.tensor([1.0]), torch.tensor([[-2.0, 4.0]])], 50) == 2.0
    for bad in (-1.0, 100.0, math.nan):
        with pytest.raises(ConfigError, match="percentile"):
            percentile_threshold([torch.ones(3)], bad)
    with pytest.raises(DataError, match="no activations"):
        percentile_threshold([], 50)
    with pytest.raises(DataError, match="NaN"):
        percentile_threshold([torch.tensor([1.0, math.nan])], 50)


def test_binarize_compares_magnitudes_strictly() -> None:
    chunk = torch.tensor([[-2.0, 1.0, 0.5, -1.0, 0, 0, 0, 0, 3.0]])
    bits = binarize(chunk, 1.0)
    assert bits.tolist() == [[1, 1]]
    share = PackedPatterns(binarize(torch.randn(64, 100), 0.6745), 100).counts().sum() / 6400
    assert 0.45 < share < 0.55


def test_distance_by_hand() -> None:
    points = PackedPatterns.from_dense(torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]]))
    centroids = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    assert distances(points, centroids).tolist() == [[2, 0, 3], [0, 0, 0]]
    # The all-zero point is equally near to all: lowest cluster.
    assert assign(points, centroids).tolist() == [1, 0]


@given(st.integers(1, 30), st.integers(1, 60), st.integers(1, 21), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_balanced_assignment_equals_the_loop(k: int, n: int, width: int, seed: int) -> None:
    points = random_mask(max(n, k), width, seed)
    centroids = random_mask(k, width, seed + 1)
    expected_owner, expected_distance = naive_balanced(points, centroids)
    patterns = PackedPatterns.from_dense(points)
    owner, distance = balanced_assignment(patterns, centroids)
    assert owner.tolist() == expected_owner
    assert distance.tolist() == expected_distance


@pytest.mark.parametrize(("block", "group"), [(1, 1), (1, 3), (4096, 2)])
def test_balanced_assignment_whatever_the_blocks(
    monkeypatch: pytest.MonkeyPatch, block: int, group: int
) -> None:
    points, centroids = random_mask(301, 45, 5), random_mask(23, 45, 6)
    expected_owner, expected_distance = naive_balanced(points, centroids)
    monkeypatch.setattr(binary_patterns, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(balanced_module, "_GROUP_CLUSTERS", group)
    # 0 MiB: one cluster at a time.
    owner, distance = balanced_assignment(
        PackedPatterns.from_dense(points), centroids, memory_mib=block // 4096
    )
    assert owner.tolist() == expected_owner
    assert distance.tolist() == expected_distance


def test_selection_with_wide_keys_breaks_ties_by_column() -> None:
    table = torch.full((2, 4), 2**30, dtype=torch.int32)
    table[1, 3] = 7
    owner, distance = balanced_module._take_in_order(table, 2)
    assert owner.tolist() == [0, 0, 1, 1]
    assert distance.tolist() == [2**30, 2**30, 2**30, 7]


@given(st.integers(1, 8), st.integers(1, 30), st.integers(1, 20), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_assign_equals_the_loop(k: int, n: int, width: int, seed: int) -> None:
    points, centroids = random_mask(n, width, seed), random_mask(k, width, seed + 1)
    expected = [
        min(range(k), key=lambda cluster: (naive_distance(point, centroids[cluster]), cluster))
        for point in points
    ]
    assert assign(PackedPatterns.from_dense(points), centroids).tolist() == expected


def test_update_by_hand() -> None:
    points = torch.tensor(
        [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    )
    assignment = torch.tensor([0, 0, 0, 0, -1])
    old = torch.tensor([[0, 0, 0, 1, 1], [1, 0, 1, 0, 1]], dtype=torch.bool)
    patterns = PackedPatterns.from_dense(points)
    centroids, means, sizes = update_centroids(patterns, assignment, old, 0.5)
    # Means 1, .75, .5, 0, .25: the median, .5, is not above itself.
    assert means[0].tolist() == [1.0, 0.75, 0.5, 0.0, 0.25]
    assert centroids.tolist() == [[True, True, False, False, False], old[1].tolist()]
    assert sizes.tolist() == [4, 0]
    # 0.4-quantile: rank 1.6 of (0, .25, .5, .75, 1) is .4.
    assert update_centroids(patterns, assignment, old, 0.4)[0][0].tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("share", [0.2, 0.3, 0.4])
def test_update_quantile_and_density(share: float) -> None:
    points = random_mask(4001, 1001, 3, density=0.3)
    old = torch.zeros(1, 1001, dtype=torch.bool)
    centroids, means, _ = update_centroids(
        PackedPatterns.from_dense(points), torch.zeros(4001, dtype=torch.int64), old, share
    )
    assert torch.allclose(means[0], points.float().mean(0))
    quantile = torch.quantile(means.double(), share)
    assert torch.equal(centroids[0], means[0] > quantile)
    assert centroids.float().mean().item() == pytest.approx(1 - share, abs=0.02)


def test_update_ties_make_the_centroid_sparser() -> None:
    points = PackedPatterns.from_dense(torch.ones(3, 10))
    old = torch.ones(1, 10, dtype=torch.bool)
    assert not update_centroids(points, torch.zeros(3, dtype=torch.int64), old, 0.4)[0].any()


def test_initial_random_takes_sparse_patterns_first() -> None:
    mask = torch.cat([random_mask(50, 33, 0, 0.9), random_mask(20, 33, 1, 0.3)])
    mask[0] = torch.arange(33) < 19  # 14 zeros of 33: 0.42
    patterns = PackedPatterns.from_dense(mask)
    qualifies = (~mask).float().mean(-1) >= 0.4
    num_qualify = int(qualifies.sum())
    chosen, filled = initial_random(patterns, num_qualify, 0.4, seeded())
    assert filled == 0
    assert bool(qualifies[chosen].all())
    assert len(set(chosen.tolist())) == num_qualify
    chosen, filled = initial_random(patterns, 60, 0.4, seeded())
    assert filled == 60 - num_qualify
    assert len(set(chosen.tolist())) == 60
    assert int(qualifies[chosen].sum()) == num_qualify


def test_initial_random_boundary_counts_as_qualifying() -> None:
    patterns = PackedPatterns.from_dense(torch.arange(5).expand(1, 5) < 3)
    assert initial_random(patterns, 1, 0.4, seeded())[1] == 0


def test_kmeans_plus_plus_draws_from_every_planted_cluster() -> None:
    # Disjoint blocks: distance to another block is 8, inside a block 0.
    labels = torch.arange(200) % 5
    mask = torch.nn.functional.one_hot(labels, 5).repeat_interleave(8, dim=1)
    patterns = PackedPatterns.from_dense(mask)
    for seed in range(5):
        chosen = initial_kmeans_plus_plus(patterns, 5, seeded(seed))
        assert sorted(labels[chosen].tolist()) == [0, 1, 2, 3, 4]
    # Only five patterns differ: the rest is filled up, without repeats.
    chosen = initial_kmeans_plus_plus(patterns, 120, seeded())
    assert len(set(chosen.tolist())) == 120


@pytest.mark.parametrize("init", ["random", "kmeans++"])
@pytest.mark.parametrize("num_neurons", [64, 101])
def test_planted_clusters_are_recovered(init: str, num_neurons: int) -> None:
    points, labels = planted(1203, 6, num_neurons)
    patterns = PackedPatterns.from_dense(points)
    result = fit_awc_paper(
        patterns, AWCPaperConfig(6, init=init, top_percentile=0.4), generator=seeded(3)
    )
    ids = assign(patterns, result.centroids)
    found, by_chance = (f(patterns, result.centroids, ids) for f in (coverage, chance))
    static = static_coverage(patterns.frequency(), patterns, by_chance)
    assert found > by_chance + 0.15
    assert found > static + 0.05
    first, last = result.history[0], result.history[-1]
    assert last["coverage"] > first["coverage"]
    assert last["objective"] < first["objective"]
    assert first["moved"] == 1200
    assert all(step["unassigned"] == 3 for step in result.history)
    assert result.cluster_sizes.tolist() == [200] * 6
    assigned = result.assignment[result.assignment >= 0]
    assert torch.equal(assigned.bincount(), result.cluster_sizes)
    assert result.history[-1]["density"] == pytest.approx(result.centroids.float().mean().item())
    # A purity that chance (1/6) does not reach.
    purity = sum(int(labels[ids == k].bincount().max()) for k in range(6) if (ids == k).any())
    assert purity / len(labels) > 0.6


def test_history_matches_the_metrics() -> None:
    patterns = PackedPatterns.from_dense(random_mask(100, 37, 0))
    one = fit_awc_paper(patterns, AWCPaperConfig(7, max_iterations=1), generator=seeded())
    two = fit_awc_paper(patterns, AWCPaperConfig(7, max_iterations=2), generator=seeded())
    assert two.history[0] == one.history[0]
    expected = coverage(patterns, one.centroids, two.assignment)
    assert two.history[1]["coverage"] == pytest.approx(expected)
    assert two.history[1]["moved"] == int((one.assignment != two.assignment).sum())
    mean_distance = (
        distances(patterns, one.centroids)
        .gather(1, two.assignment.clamp_min(0).unsqueeze(-1))[two.assignment >= 0]
        .mean()
    )
    assert two.history[1]["objective"] == pytest.approx(mean_distance.item())


def test_stops_when_assignments_repeat() -> None:
    points, _ = planted(400, 4, 96)
    config = AWCPaperConfig(4, max_iterations=50)
    result = fit_awc_paper(PackedPatterns.from_dense(points), config, generator=seeded(1))
    assert len(result.history) < 50
    assert result.history[-1]["moved"] == 0
    assert all(step["moved"] > 0 for step in result.history[:-1])


@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_one_seed_one_result(init: str) -> None:
    patterns = PackedPatterns.from_dense(random_mask(150, 50, 0))
    config = AWCPaperConfig(9, init=init, max_iterations=3)
    a, b, c = (fit_awc_paper(patterns, config, generator=seeded(seed)) for seed in (4, 4, 5))
    assert torch.equal(a.centroids, b.centroids)
    assert torch.equal(a.assignment, b.assignment)
    assert a.history == b.history
    assert not torch.equal(a.centroids, c.centroids)


@pytest.mark.parametrize("init", ["random", "kmeans++"])
@pytest.mark.parametrize("num_clusters", [1, 23])
def test_one_cluster_and_one_point_a_cluster(init: str, num_clusters: int) -> None:
    mask = random_mask(23, 19, 0, 0.4)
    patterns = PackedPatterns.from_dense(mask)
    config = AWCPaperConfig(num_clusters, init=init)
    result = fit_awc_paper(patterns, config, generator=seeded())
    assert result.cluster_sizes.tolist() == [23 // num_clusters] * num_clusters
    if num_clusters == 1:
        assert torch.allclose(result.means[0], mask.float().mean(0))
    else:
        assert sorted(result.assignment.tolist()) == list(range(23))
        assert torch.equal(result.means[result.assignment].bool(), mask)


def test_metrics_equal_the_loops() -> None:
    mask, centroids = random_mask(40, 29, 0, 0.4), random_mask(6, 29, 1, 0.7)
    patterns = PackedPatterns.from_dense(mask)
    ids = torch.randint(-1, 6, (40,), generator=seeded())
    shared = active = chosen = count = 0
    density = 0.0
    for x, k in zip(mask, ids.tolist(), strict=True):
        if k >= 0:
            shared += int((x & centroids[k]).sum())
            active += int(x.sum())
            chosen += int(centroids[k].sum())
            density += centroids[k].float().mean().item()
            count += 1
    assert coverage(patterns, centroids, ids) == shared / active
    assert precision(patterns, centroids, ids) == shared / chosen
    assert chance(patterns, centroids, ids) == pytest.approx(density / count)


def test_static_coverage_by_hand() -> None:
    fit = torch.tensor([0.9, 0.1, 0.5, 0.5])
    held_out = PackedPatterns.from_dense(torch.tensor([[1, 1, 0, 1], [1, 0, 1, 0]]))
    assert static_coverage(fit, held_out, 0.5) == 3 / 5  # neurons 0 and, of the tie, 2
    assert static_coverage(fit, held_out, 1.0) == 1.0
    assert static_coverage(fit, held_out, 0.0) == 0.0


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"num_clusters": 0}, "num_clusters is 0"),
        ({"num_clusters": 16385}, "16384"),
        ({"num_clusters": 2, "top_percentile": 1.0}, "top_percentile is 1.0"),
        ({"num_clusters": 2, "top_percentile": math.nan}, "top_percentile"),
        ({"num_clusters": 2, "init": "first"}, "kmeans"),
        ({"num_clusters": 2, "init_min_zero_share": 1.5}, "init_min_zero_share"),
        ({"num_clusters": 2, "max_iterations": 0}, "max_iterations"),
    ],
)
def test_config_is_checked(settings_: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AWCPaperConfig(**settings_)


def test_more_clusters_than_patterns() -> None:
    patterns = PackedPatterns.from_dense(random_mask(5, 9, 0))
    with pytest.raises(ConfigError, match=r"num_clusters is 6.*only 5 patterns"):
        fit_awc_paper(patterns, AWCPaperConfig(6), generator=seeded())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_clusters() -> None:
    patterns = PackedPatterns.from_dense(random_mask(2000, 100, 0))
    for init in ("random", "kmeans++"):
        config = AWCPaperConfig(37, init=init)
        cpu = fit_awc_paper(patterns, config, generator=seeded())
        cuda = fit_awc_paper(patterns.to("cuda"), config, generator=seeded())
        assert torch.equal(cpu.centroids, cuda.centroids.cpu())
        assert torch.equal(cpu.assignment, cuda.assignment.cpu())
