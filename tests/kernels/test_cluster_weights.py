"""Weights of clusters: each token's factors are so many times as large, on every backend."""

import pytest
import torch
from kernels.cases import case
from kernels.library import EVERY_BACKEND, every_backend, ops, placed
from kernels.test_plane_kernels import TOLERANCE, distance, neurons

from sparse_runtime.kernels.bitmaps import pack_bits
from sparse_runtime.kernels.op import sparse_ffn
from sparse_runtime.kernels.operands import (
    ClusterTables,
    Compensation,
    Counters,
    FFNWeights,
    RouterWeights,
    Stages,
)
from sparse_runtime.kernels.plane_op import routed_plane_ffn
from sparse_runtime.kernels.plane_reference import plane_ffn_reference
from sparse_runtime.kernels.planes import LOOK_FORMAT, unpack_look
from sparse_runtime.kernels.reference import sparse_ffn_reference

WEIGHTS = torch.tensor([0.4, 1.0, 2.5])
TAU = 3.0


@pytest.fixture(params=EVERY_BACKEND)
def backend(request):
    with every_backend(request.param) as name:
        yield name


def factors_apart(looks, ids, generator):
    """Factors [I] that leave no |h̃| [n, I], times its token's weight, near a threshold."""
    weights = WEIGHTS[ids, None]
    factors = torch.zeros(looks.shape[1])
    for _ in range(200):
        tried = 8 * torch.rand(looks.shape[1], generator=generator) / looks.mean(0).clamp_min(1e-9)
        evidence = looks * tried * weights
        close = ((evidence - 1).abs() < 1e-3) | ((evidence / TAU - 1).abs() < 1e-3)
        factors = torch.where((factors == 0) & ~close.any(0), tried, factors)
    assert factors.all()
    return factors


@pytest.mark.parametrize("n", [1, 2, 5])
def test_over_planes(backend, n):
    g = torch.Generator().manual_seed(n)
    planes = neurons(4, 2, (200, 33), g)
    x = torch.randn(n, 200, generator=g)
    ids = torch.tensor([2, 0, 1, 0, 2])[:n]
    candidates = torch.rand(3, 33, generator=g) < 0.8
    gate, up, _ = planes.rounded()
    looks = torch.nn.functional.silu(x @ gate.values(base=True).T) * (x @ up.values(base=True).T)
    factors = factors_apart(looks.abs(), ids, g)
    counts = torch.zeros(3, dtype=torch.int64)
    expected = torch.cat(
        [
            plane_ffn_reference(
                x[t : t + 1],
                planes,
                candidates[ids[t : t + 1]],
                Stages(factors * WEIGHTS[ids[t]], TAU),
                counts,
            )
            for t in range(n)
        ]
    )
    x, factors, weights, sets, ids = placed(
        backend, x, factors, WEIGHTS, pack_bits(candidates), ids
    )
    programs = None
    if backend == "triton":
        from sparse_runtime.kernels.triton.ffn import num_counters

        programs = torch.zeros(num_counters(200), dtype=torch.int32, device=x.device)
    found = Counters(*(torch.zeros(3, dtype=torch.int64, device=x.device) for _ in "kr"), programs)
    y = routed_plane_ffn(
        x,
        planes.to(x.device) if backend == "triton" and x.is_cuda else planes,
        ClusterTables(sets, None, factors, weights),
        Stages(factors, TAU),
        RouterWeights(torch.zeros(3, 200), torch.zeros(3)),
        Compensation(),
        found,
        backend=backend,
        cluster_ids=ids,
    )
    assert found.rows.tolist() == counts.tolist()
    assert 0 < counts[2] < counts[0] < counts[1]
    assert distance(y.cpu(), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_over_floats(backend, n):
    given = case(n, (70, 131, 3), torch.float32, density=0.2, looks=True, seed=n)
    g = torch.Generator().manual_seed(n)
    gate, up = unpack_look(given.records, LOOK_FORMAT, 70)
    looks = torch.nn.functional.silu(given.x @ gate.T) * (given.x @ up.T)
    factors = factors_apart(looks.abs(), given.ids, g)
    weights = FFNWeights(*given.weights, given.activation, given.records)
    maybe, counts = pack_bits(given.maybe), torch.zeros(2, dtype=torch.int64)
    expected = torch.cat(
        [
            sparse_ffn_reference(
                given.x[t : t + 1],
                weights,
                ClusterTables(given.sets, maybe, factors * WEIGHTS[given.ids[t]]),
                given.ids[t : t + 1],
                counts,
            )
            for t in range(n)
        ]
    )
    assert counts[1] > 0
    found = torch.zeros(2, dtype=torch.int64)
    if backend == "cpu":
        y = ops.cpu_sparse_ffn(*given.arguments[:7], maybe, given.records, factors, found, WEIGHTS)
    else:
        x, ids, sets, maybe, records, factors, own, found, *matrices = placed(
            backend, given.x, given.ids, given.sets, maybe, given.records, factors, WEIGHTS, found,
            *given.weights,
        )  # fmt: skip
        tables = ClusterTables(sets, maybe, factors, own)
        there = FFNWeights(*matrices, given.activation, records)
        y = sparse_ffn(x, there, tables, ids, row_counts=found, backend=backend)
    assert found.tolist() == counts.tolist()
    assert distance(y.cpu(), expected) < 1e-4


def test_refusals():
    given = case(1, (70, 131, 3), torch.float32, looks=True)
    counts = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"cluster_weights has size 2.*expected K = 3"):
        ops.cpu_sparse_ffn(*given.arguments, counts, torch.ones(2))
    with pytest.raises(ValueError, match="cluster_weights does not have dtype float32"):
        ops.cpu_sparse_ffn(*given.arguments, counts, torch.ones(3).double())
    with pytest.raises(ValueError, match="cluster_weights without factors"):
        ops.cpu_sparse_ffn(*given.arguments[:7], None, None, None, counts, torch.ones(3))
    tables = ClusterTables(given.sets, *given.band[::2], torch.ones(2))
    weights = FFNWeights(*given.weights, given.activation, given.records)
    with pytest.raises(ValueError, match=r"cluster_weights is torch.float32 \(2,\)"):
        sparse_ffn(given.x, weights, tables, given.ids)
