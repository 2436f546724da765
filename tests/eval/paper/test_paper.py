"""The paper's figures on a tiny model."""

import pytest
import torch

from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.paper.binary_clustering import BINARY_CLUSTERINGS
from sparse_runtime.eval.paper.tables import paper_coverage, paper_perplexity


@pytest.fixture
def windows():
    return torch.randint(256, (12, 40), generator=torch.Generator().manual_seed(1))


def test_coverage_grid(tiny_model, windows):
    options = {"clusters": [1, 8], "densities": [0.5, 0.75], "layers": [0, 2]}
    rows = paper_coverage(tiny_model, windows[:8], windows[8:], **options)
    assert [(row["clusters"], row["density"]) for row in rows] == [
        (1, 0.5), (1, 0.75), (8, 0.5), (8, 0.75),
    ]  # fmt: skip
    assert rows == [
        {**row, "seconds": old["seconds"]}
        for old, row in zip(
            rows,
            paper_coverage(tiny_model, windows[:8], windows[8:], **options),
            strict=True,
        )
    ]
    for row in rows:
        assert row["chance"] == pytest.approx(row["density"], abs=0.08)
        assert row["chance"] < row["coverage"] <= 1
        assert row["fitted_coverage"] > row["chance"]
    one, eight = rows[0], rows[2]
    # One cluster is the static mask; eight fit the text better, on which they were fitted.
    assert one["coverage"] == pytest.approx(one["static"], abs=0.01)
    assert eight["fitted_coverage"] > one["fitted_coverage"]


def test_more_density_covers_more(tiny_model, windows):
    rows = paper_coverage(
        tiny_model, windows[:8], windows[8:], clusters=[4], densities=[0.4, 0.6, 0.8]
    )
    coverage = [row["coverage"] for row in rows]
    assert coverage == sorted(coverage)


def test_beside_other_binary_clusterings(tiny_model, windows):
    rows = paper_coverage(
        tiny_model, windows[:8], windows[8:], clusters=[4, 8], densities=[0.5], compare=True
    )
    assert [(row["method"], row["clusters"], row["density"]) for row in rows] == [
        (name, count, 0.5 if name == "awc-paper" else None)
        for count in (4, 8)
        for name in ("awc-paper", *BINARY_CLUSTERINGS)
    ]
    for row in rows:
        assert 0.2 < row["chance"] < row["coverage"] < 1
        assert row["precision"] > 0.5  # the share of active neurons
    # Ones that a point lacks cost less than ones that the centroid lacks.
    assert rows[3]["chance"] > rows[2]["chance"]


@pytest.mark.parametrize("layers", [[3], [], [-1]])
def test_unknown_layers(tiny_model, windows, layers):
    with pytest.raises(ConfigError, match="expected some of 0 to 2"):
        paper_coverage(
            tiny_model, windows[:8], windows[8:], clusters=[4], densities=[0.5], layers=layers
        )


def test_masks_hurt_more_the_sparser_they_are(tiny_model, windows):
    tokens = windows[8:].flatten()
    result = paper_perplexity(
        tiny_model, windows[:8], tokens, num_clusters=4, densities=[0.5, 0.97], window=40
    )
    sparse, nearly_dense = result["masks"]
    distance = [abs(row["ratio"] - 1) for row in (sparse, nearly_dense)]
    assert distance[0] > distance[1]
    assert set(sparse["projections"]) == {"gate", "up", "down"}
    assert result["thresholds_only"] != result["dense"]
