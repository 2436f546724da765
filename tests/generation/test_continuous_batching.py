"""transformers' continuous batching with a sparse model: tokens of several sequences in one call."""

import pytest
import torch
from helpers import random_cluster_set
from transformers import GenerationConfig

from sparse_runtime import cost_report, sparsify

configuration = pytest.importorskip("transformers.generation.configuration_utils")
if not hasattr(configuration, "ContinuousBatchingConfig"):
    pytest.skip("transformers has another continuous batching", allow_module_level=True)

NEW_TOKENS = 10
PROMPTS = [
    torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 9, 17, 30, 12, 8)
]


def batched(model):
    """Answers to the prompts, which arrive together."""
    found = model.generate_batch(
        PROMPTS,
        generation_config=GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=258
        ),
        # As many as the prompts need: by default it takes most of the memory there is.
        continuous_batching_config=configuration.ContinuousBatchingConfig(
            num_blocks=16, page_size=32, max_batch_tokens=64
        ),
    )
    answers = {tuple(one.prompt_ids): one.generated_tokens for one in found.values()}
    return [answers[tuple(prompt)] for prompt in PROMPTS]


def one_by_one(model):
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 258}
        with torch.inference_mode():
            output = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def test_every_call_sparse(tiny_model):
    """A token's neurons do not depend on the sequences beside it."""
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), prefill="sparse")
    found = batched(tiny_model)
    assert cost_report(tiny_model).dense_tokens == 0
    assert found == one_by_one(tiny_model)


def test_by_the_rule(tiny_model):
    """Six sequences are a call of six tokens, and those run dense on a CPU."""
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), max_sparse_tokens=2)
    found = batched(tiny_model)
    report = cost_report(tiny_model)
    assert set(report.dense_reasons) == {"long call"}
    dense = report.dense_tokens / 3
    assert dense >= sum(map(len, PROMPTS)) + 0.8 * len(PROMPTS) * (NEW_TOKENS - 1)
    assert all(len(answer) == NEW_TOKENS for answer in found)
