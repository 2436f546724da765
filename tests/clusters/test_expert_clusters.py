"""Clusters of experts' neurons: means where they are read, Fisher weights, masks, and the budget."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import make_tiny_model
from model_types import tiny_model_of_type
from transformers import MixtralConfig, MixtralForCausalLM

from sparse_runtime import ClusterSet, cost_report, recut, reset_cost, sparsify, unsparsify
from sparse_runtime.clusters import BuildConfig, build_clusters
from sparse_runtime.clusters import fisher as fisher_module
from sparse_runtime.clusters.awc import cluster_means, fit_awc
from sparse_runtime.clusters.fisher import fisher_weights
from sparse_runtime.clusters.importance import importance_scorer
from sparse_runtime.clusters.tuning.student import divergence, students
from sparse_runtime.models.ffn_layers import find_ffn_layers

CONFIG = BuildConfig(num_clusters=4, budget=0.5, window=50, max_tokens=2000, router="4", distill=3)


@pytest.fixture
def model():
    return tiny_model_of_type("mixtral")


@pytest.fixture
def clusters(model, tiny_tokenizer, text):
    return build_clusters(model, tiny_tokenizer, [text], CONFIG)


def windows(count=4):
    return torch.randint(0, 250, (count, 30), generator=torch.Generator().manual_seed(1))


class TestMeans:
    def test_are_over_the_tokens_that_have_the_expert(self):
        """Two experts of two neurons; of the second cluster no token has the second."""
        values = torch.tensor([[1.0, 2, 0, 0], [3, 4, 5, 6], [7, 8, 0, 0]])
        present = torch.tensor([[True, False], [True, True], [True, False]])
        ids = torch.tensor([0, 0, 1])
        means = cluster_means(values, ids, 2, transform=lambda rows: rows, present=present)
        expected = torch.tensor([[2.0, 3, 5, 6], [7, 8, 5, 6]])
        torch.testing.assert_close(means, expected, rtol=1e-4, atol=1e-4)

    def test_borrow_where_tokens_are_few(self):
        """From all clusters' tokens, and where no token has the expert, from all experts' neurons."""
        values = torch.tensor([[2.0, 0, 0], [4, 6, 0]])
        present = torch.tensor([[True, False, False], [True, True, False]])
        means = cluster_means(
            values, torch.tensor([0, 1]), 2, 2.0, transform=lambda rows: rows, present=present
        )
        level = 12 / 3
        overall = torch.tensor([(6 + 2 * level) / 4, (6 + 2 * level) / 3, level])
        assert means[0, 0] == pytest.approx((2 + 2 * overall[0]) / 3)
        assert means[0, 1] == pytest.approx(overall[1])
        assert means[:, 2].tolist() == [level, level]

    def test_sets_hold_what_matters_where_it_is_read(self):
        """A rare expert's best neurons are in every set, though most tokens do not have it."""
        generator = torch.Generator().manual_seed(0)
        importance = torch.rand(400, 20, generator=generator) * 0.1
        importance[:, [3, 13]] = 1.0
        present = torch.ones(400, 2, dtype=torch.bool)
        present[20:, 1] = False
        importance[20:, 10:] = 0
        result = fit_awc(
            importance, num_clusters=3, set_size=4, generator=generator, present=present
        )
        assert result.active_sets[:, [3, 13]].all()


def test_fisher_weights_by_hand(model):
    """The gradient of w·h, over the tokens that have the expert, beside the layer's usual."""
    window = windows(1)
    layer = find_ffn_layers(model)[1]
    kept = []

    def explicit(states, index, weights):
        y = torch.zeros_like(states)
        for expert in range(layer.experts):
            tokens, place = (index == expert).nonzero(as_tuple=True)
            gate, up = layer.mlp.gate_up_proj[expert].chunk(2)
            h = F.silu(states[tokens] @ gate.t()) * (states[tokens] @ up.t())
            part = (h * weights[tokens, place].unsqueeze(-1)).detach().requires_grad_()
            kept.append(part)
            y = y.index_add(0, tokens, part @ layer.mlp.down_proj[expert].t())
        return y

    experts = layer.mlp
    del layer.parent.experts
    layer.parent.experts = explicit
    logits = model(input_ids=window, use_cache=False).logits[0].float()
    F.cross_entropy(logits, fisher_module._drawn(logits, window), reduction="sum").backward()
    del layer.parent.experts
    layer.parent.experts = experts
    sums = torch.stack([part.grad.square().sum(0) for part in kept])
    counts = torch.tensor([[len(part)] for part in kept])
    lengths = experts.down_proj.detach().square().sum(1)
    prior = fisher_module._EXPERT_TOKENS
    usual = lengths * sums.sum() / (counts * lengths).sum()
    expected = ((sums + prior * usual) / (counts + prior)).sqrt().flatten()
    model.zero_grad()
    torch.testing.assert_close(fisher_weights(model, window)[1].neurons, expected)


@pytest.mark.parametrize("verify", [False, True])
def test_a_student_is_the_sparse_model(model, clusters, verify):
    clusters = recut(model, clusters, budget=0.6, verify=verify)
    ids = windows(2)
    with students(model, clusters.layers, 0, 0) as modules, torch.no_grad():
        found = model(input_ids=ids).logits
        assert divergence(model, modules, ids) > 1e-4
    sparsify(model, clusters, backend="reference", prefill="sparse")
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
    if verify:  # looks see records of 4 bits, the student the exact activation
        assert (found - expected).norm() < 0.1 * expected.norm()
    else:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_budget_is_that_of_a_tokens_experts(model, clusters, tiny_tokenizer, text):
    for layer in clusters.layers.values():
        assert layer.experts == 4
        assert layer.centroids.expert_shares.shape == (4, 4)
        torch.testing.assert_close(layer.centroids.expert_shares.sum(-1), torch.full((4,), 2.0))
    ids = (
        tiny_tokenizer(Path(text).read_text(), return_tensors="pt").input_ids[:, :1000].view(20, 50)
    )
    for budget, verify in ((0.5, True), (0.5, False), (0.8, True)):
        cut = recut(model, clusters, budget=budget, verify=verify)
        sparsify(model, cut, backend="reference", prefill="sparse")
        with torch.inference_mode():
            model(input_ids=ids)
        assert cost_report(model).bits_per_weight == pytest.approx(16 * budget, abs=0.3)
        reset_cost(model)
        unsparsify(model)


def test_saved_loaded_and_cut_again(model, clusters, tmp_path):
    clusters.save_pretrained(tmp_path / "saved")
    loaded = ClusterSet.from_pretrained(tmp_path / "saved", centroids=True)
    one, other = (recut(model, artifact, budget=0.6) for artifact in (clusters, loaded))
    for index, layer in one.layers.items():
        assert other.layers[index].experts == 4
        same = layer.active_sets == other.layers[index].active_sets
        assert same.float().mean() > 0.95  # centroids are stored in bfloat16


def one_expert_of(model):
    """A Mixtral with one expert that always runs: the same function as a Mistral."""
    fields = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    config = MixtralConfig(**fields, num_local_experts=1, num_experts_per_tok=1)
    mixture = MixtralForCausalLM(config).eval()
    state = model.state_dict()
    for number in range(config.num_hidden_layers):
        prefix = f"model.layers.{number}.mlp."
        gate, up, down = (
            state.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down")
        )
        state[f"{prefix}experts.gate_up_proj"] = torch.cat([gate, up]).unsqueeze(0)
        state[f"{prefix}experts.down_proj"] = down.unsqueeze(0)
        state[f"{prefix}gate.weight"] = torch.zeros(1, config.hidden_size)
    mixture.load_state_dict(state)
    return mixture


def test_one_expert_is_a_plain_ffn(tiny_tokenizer, text):
    plain = make_tiny_model(intermediate_size=48)
    mixture = one_expert_of(plain)
    config = replace(CONFIG, num_clusters=1, router="linear", distill=0)
    built = [build_clusters(one, tiny_tokenizer, [text], config) for one in (plain, mixture)]
    for index, expected in built[0].layers.items():
        found = built[1].layers[index]
        assert found.experts == 1
        # Fisher weights of an expert are shrunk a little toward its layer's usual.
        ratio = found.centroids.neuron_weights / expected.centroids.neuron_weights
        assert ratio.std() < 0.1
        ratio = found.centroids.mean_activations / expected.centroids.mean_activations
        assert (ratio - 1).abs().median() < 0.05
    layers = [find_ffn_layers(one)[0] for one in (plain, mixture)]
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    expected, found = (importance_scorer(layer).activations(x) for layer in layers)
    torch.testing.assert_close(found, expected)
