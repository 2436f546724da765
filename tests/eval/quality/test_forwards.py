"""The decode-only protocol against a prompt and decode steps with a cache."""

import pytest
import torch
import torch.nn.functional as F
from helpers import random_cluster_set
from model_types import tiny_model_of_type

from sparse_runtime import SparseConfig, cost_report, dense, sparse_modules, sparsify, unsparsify
from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.latency.shapes import random_clusters
from sparse_runtime.eval.quality.artifact_quality import evaluate_quality
from sparse_runtime.eval.quality.forwards import dense_prompts
from sparse_runtime.eval.quality.perplexity import score_text, text_windows
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.output_head import swapped_forwards

IDS = torch.randint(0, 250, (96,), generator=torch.Generator().manual_seed(0))
SPARSE = SparseConfig(prefill="sparse", backend="reference")


@torch.inference_mode()
def decoded_nll(model, window, prompt):
    """Dense prefill into a cache, then sparse steps of one token; the loss of what follows."""
    with dense(model):
        output = model(window[None, :prompt], use_cache=True)
    total = 0.0
    for position in range(prompt, len(window)):
        target = window[position : position + 1]
        total += F.cross_entropy(output.logits[:, -1], target).item()
        output = model(target[None], past_key_values=output.past_key_values, use_cache=True)
    return total


@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_equals_decoding_with_a_cache(tiny_model, kind, looked):
    tiny_model = tiny_model if kind == "mistral" else tiny_model_of_type(kind)
    layers = len(find_ffn_layers(tiny_model))
    clusters = random_clusters(
        tiny_model, density=0.5, looked=0.4 if looked else 0.0, num_clusters=6, rank=4
    )
    sparsify(tiny_model, clusters, config=SPARSE)
    expected = [decoded_nll(tiny_model, window, 20) for window in IDS.view(3, 32)]
    steps = cost_report(tiny_model)
    for module in sparse_modules(tiny_model):
        module.reset_counts()
    with dense_prompts(tiny_model, 20):
        score = score_text(tiny_model, IDS, window=32, prompt_tokens=20)
    assert score.nll == pytest.approx(expected, rel=1e-4)
    assert score.scored == [12] * 3
    counted = cost_report(tiny_model)
    assert counted.sparse_tokens == steps.sparse_tokens == 3 * 12 * layers
    assert counted.dense_tokens == 3 * 20 * layers
    assert counted.cost_share == pytest.approx(steps.cost_share)
    every = score_text(tiny_model, IDS, window=32, prompt_tokens=20)
    assert every.nll != pytest.approx(expected, rel=1e-3)
    unsparsify(tiny_model)


def test_quality_after_a_prompt(tiny_model):
    clusters = random_cluster_set(tiny_model, 0.4)
    result = evaluate_quality(tiny_model, clusters, IDS, window=32, prompt_tokens=20)
    assert result["prompt_tokens"] == 20
    assert result["scored"] == [12] * 3
    with torch.inference_mode():
        logits = tiny_model(IDS.view(3, 32)).logits[:, 19:-1]
        loss = F.cross_entropy(logits.flatten(0, 1), IDS.view(3, 32)[:, 20:].flatten())
    assert result["perplexity"]["dense"] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert sum(result["nll"]["dense"]) == pytest.approx(36 * loss.item(), rel=1e-5)
    sparsify(tiny_model, clusters, config=SPARSE)
    expected = sum(decoded_nll(tiny_model, window, 20) for window in IDS.view(3, 32))
    unsparsify(tiny_model)
    assert sum(result["nll"]["sparse"]) == pytest.approx(expected, rel=1e-4)
    assert len({round(value, 6) for value in result["perplexity"].values()}) == 4


def test_forwards_of_the_instance_come_back(tiny_model):
    modules = [layer.mlp for layer in tiny_model.model.layers]
    own = modules[0].forward
    modules[0].forward = own
    with swapped_forwards({module: lambda x: x for module in modules}):
        assert modules[0](3) == modules[1](3) == 3
    assert modules[0].__dict__["forward"] is own
    assert all("forward" not in module.__dict__ for module in modules[1:])


@pytest.mark.parametrize(
    ("stride", "prompt", "expected"),
    [(8, 0, [7, 7, 3]), (8, 1, [7, 7, 3]), (8, 4, [4, 4]), (4, 4, [4, 4, 4, 4]), (8, 3, [5, 5, 1])],
)
def test_scored_after_the_prompt(stride, prompt, expected):
    windows = text_windows(torch.arange(20), 8, stride, prompt)
    assert [scored for _, scored in windows] == expected


@pytest.mark.parametrize("prompt", [-1, 7, 8])
def test_prompts_that_cannot_work(prompt):
    with pytest.raises(ConfigError, match=f"prompt_tokens is {prompt}; expected 0 to 6"):
        text_windows(torch.arange(20), 8, 8, prompt)
