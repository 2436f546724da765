"""Biases tuned layer by layer: means of what is missing in the sparse model itself."""

import pytest
import torch
from helpers import backwards, make_tiny_model, random_centroids, random_cluster_set

from sparse_runtime import recut
from sparse_runtime.clusters.buffers import Buffers
from sparse_runtime.clusters.tuning import local
from sparse_runtime.clusters.tuning.distill import held_out_divergence
from sparse_runtime.clusters.tuning.local import shifted, tune_locally
from sparse_runtime.clusters.tuning.student import students


@pytest.fixture
def windows():
    return torch.randint(0, 250, (12, 30), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def cut(tiny_model):
    clusters = random_cluster_set(tiny_model, 0.5, num_clusters=4)
    for index, layer in clusters.layers.items():
        layer.centroids = random_centroids(4, 44, seed=index)
        layer.cluster_bias = torch.zeros(4, 32)
    return recut(tiny_model, clusters, budget=0.6, verify=True)


def hand_made(model, cut, windows, shrinkage):
    """Shifts by running the whole sparse model once for each layer."""
    shifts = {}
    with students(model, cut.layers, 0, 0) as modules, torch.no_grad():
        for index, student in modules.items():
            found = []
            handle = student.register_forward_pre_hook(
                lambda module, arguments, found=found: found.append(arguments[0][0])
            )
            for row in windows:
                model(row[None])
            handle.remove()
            ids, _, missing = student.compared(torch.cat(found))
            overall, rows = missing.mean(0), []
            for cluster in range(4):
                own = missing[ids == cluster]
                rows.append((own.sum(0) + shrinkage * overall) / (len(own) + shrinkage))
            shifts[index] = torch.stack(rows)
            # The layers behind it see it with its shift.
            student.shift.data.copy_(shifts[index])
    return shifts


def test_shifts_are_what_is_missing_behind_shifted_layers(tiny_model, cut, windows):
    found = tune_locally(tiny_model, cut, windows)
    expected = hand_made(tiny_model, cut, windows, local._SHRINKAGE)
    assert found.keys() == expected.keys() == {0, 1, 2}
    for index, shift in found.items():
        assert shift.abs().max() > 0.01
        torch.testing.assert_close(shift, expected[index], atol=1e-4, rtol=1e-3)
    in_files = tune_locally(tiny_model, cut, windows, buffers=Buffers(0))
    assert all(torch.equal(in_files[index], shift) for index, shift in found.items())


def test_they_bring_the_sparse_model_closer(tiny_model, cut, windows):
    before = held_out_divergence(tiny_model, cut, windows)
    tuned = shifted(cut, tune_locally(tiny_model, cut, windows))
    after = held_out_divergence(tiny_model, recut(tiny_model, tuned, budget=0.6), windows)
    assert after < 0.95 * before


def test_a_decoder_that_runs_whole_is_tuned_at_once(cut, windows):
    model = backwards(make_tiny_model())
    shifts = tune_locally(model, cut, windows)
    assert all(shift.abs().max() > 0.01 for shift in shifts.values())
