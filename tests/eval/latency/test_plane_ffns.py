"""The benchmark of FFNs over planes."""

import pytest

from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.latency import plane_ffns


def test_figures_of_a_small_shape(monkeypatch):
    monkeypatch.setattr(plane_ffns, "_LEAST_BYTES", 1e5)
    record = plane_ffns.bench_plane_ffns(128, 160, bits=(4, 5), rounds=2)
    assert [r["bits"] for r in record["formats"]] == [4, 5]
    for own in record["formats"]:
        assert (
            0
            < own["dense_ratio"]
            == pytest.approx(own["dense_gbps"] / record["read_gbps"], rel=1.0)
        )
        assert own["sparse_gbps"] > 0
        assert own["speedup"] > 0
    page = plane_ffns.report(record, 128, 160)
    assert "| 5 | " in page
    assert "make bench-planes" in page


def test_needs_the_kernels(monkeypatch):
    monkeypatch.setattr(plane_ffns, "load_cpu_library", lambda: False)
    with pytest.raises(SparseRuntimeError, match="nothing was measured"):
        plane_ffns.bench_plane_ffns(128, 160)
