"""Standard errors against what they say: the spread of means over many samples."""

import numpy as np
import pytest

from sparse_runtime.eval.quality.standard_errors import beside, mean_error, paired


def test_errors_are_the_spread_of_means():
    generator = np.random.default_rng(0)
    hard = generator.normal(size=(2000, 50))
    dense = hard + 0.1 * generator.normal(size=hard.shape)
    sparse = hard - 0.3 + 0.1 * generator.normal(size=hard.shape)
    own = [mean_error(row) for row in dense]
    assert np.mean(own) == pytest.approx(dense.mean(1).std(), rel=0.05)
    differences = [paired(*rows) for rows in zip(dense, sparse, strict=True)]
    found = np.mean([row["difference_error"] for row in differences])
    assert found == pytest.approx((sparse - dense).mean(1).std(), rel=0.05)
    assert found < 0.2 * np.mean(own)  # what is hard for both has gone
    assert differences[0]["difference"] == pytest.approx(sparse[0].mean() - dense[0].mean())


def test_one_document_has_no_error():
    assert beside([1.0], [0.5]) == {
        "dense": 1.0, "dense_error": None, "sparse": 0.5, "sparse_error": None,
        "difference": -0.5, "difference_error": None,
    }  # fmt: skip
