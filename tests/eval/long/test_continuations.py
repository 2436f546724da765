"""Continuations: repetition by hand, and batches that are what one prompt alone gives."""

import pytest
import torch
from helpers import random_cluster_set

from sparse_runtime import cost_report, sparsify
from sparse_runtime.errors import DataError
from sparse_runtime.eval.long.continuations import (
    compare_continuations,
    continue_prompts,
    distinct_share,
    repeated_share,
    same_tokens,
    spread_passages,
)


def test_shares_by_hand():
    assert repeated_share([1, 2, 3, 4, 5]) == 0
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_share([7] * 10) == pytest.approx(6 / 7)
    assert distinct_share([7] * 10) == pytest.approx(0.1)
    assert distinct_share([1, 2, 3]) == 1


def test_passages_are_spread_over_the_text():
    passages = spread_passages(torch.arange(100), 4, 20)
    assert passages[:, 0].tolist() == [0, 25, 50, 75]
    assert passages[1].tolist() == list(range(25, 45))
    with pytest.raises(DataError, match=r"100 tokens, too few for 6 prompts .* expected 120"):
        spread_passages(torch.arange(100), 6, 20)


def test_a_batch_is_sparse_and_what_single_prompts_give(tiny_model):
    prompts = torch.randint(0, 250, (3, 8), generator=torch.Generator().manual_seed(1))
    dense = continue_prompts(tiny_model, prompts, 12)
    assert dense.shape == (3, 12)
    sparsify(
        tiny_model, random_cluster_set(tiny_model, 0.3), backend="reference", max_sparse_tokens=3
    )
    sparse = continue_prompts(tiny_model, prompts, 12)
    report = cost_report(tiny_model)
    assert report.sparse_tokens == 3 * 3 * 11  # layers, prompts, tokens after the first
    assert report.dense_tokens == 3 * prompts.numel()
    single = torch.cat([continue_prompts(tiny_model, row[None], 12) for row in prompts])
    assert torch.equal(sparse, single)
    assert not torch.equal(sparse, dense)
    assert 1 <= same_tokens(dense, sparse) < 12  # the first is of the dense prompt


def test_sampling_is_seeded(tiny_model):
    prompts = torch.randint(0, 250, (2, 8), generator=torch.Generator().manual_seed(1))
    once, again, other = (
        continue_prompts(tiny_model, prompts, 12, temperature=1.0, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_comparison():
    dense = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]])
    sparse = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4], [1, 1, 1, 1, 1, 1, 1, 1]])
    repeated, distinct = compare_continuations(dense, sparse, text=dense)
    assert repeated["figure"] == "repeated_4grams"
    assert (repeated["text"], repeated["dense"]) == (0, 0)
    assert repeated["sparse"] == pytest.approx((1 / 5 + 4 / 5) / 2)
    assert repeated["difference_error"] == pytest.approx(0.3)
    assert distinct["sparse"] == pytest.approx((4 / 8 + 1 / 8) / 2)
    assert distinct["difference"] == pytest.approx(distinct["sparse"] - 1)
    assert same_tokens(dense, sparse) == 2.5
