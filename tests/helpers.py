"""Builders shared by the tests."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sparse_runtime import ClusterSet
from sparse_runtime.artifact.bands import LayerCentroids
from sparse_runtime.artifact.measured import AuditLevels, MeasuredCut, MeasuredCuts
from sparse_runtime.eval.latency.shapes import random_clusters
from sparse_runtime.kernels import load_cpu_library

needs_library = pytest.mark.skipif(
    not load_cpu_library(), reason="libsparse_ffn_cpu.so is not built"
)
#: A prompt for a tiny model [1, 6].
IDS = torch.tensor([[5, 9, 2, 7, 1, 3]])


def logits(model, ids=IDS, **options):
    with torch.inference_mode():
        return model(input_ids=ids, **options).logits


def make_tiny_model(**changes):
    torch.manual_seed(0)
    fields = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "sliding_window": None,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    return MistralForCausalLM(MistralConfig(**(fields | changes))).eval()


def backwards(model):
    """A Mistral whose decoder runs its layers from the last to the first."""
    decoder, forward = model.model, model.model.forward

    def turned(*args, **kwargs):
        layers = decoder.layers
        decoder.layers = torch.nn.ModuleList(reversed(layers))
        try:
            return forward(*args, **kwargs)
        finally:
            decoder.layers = layers

    decoder.forward = turned
    return model


def make_tiny_model_of(kind="mistral", **changes):
    """A tiny ``mistral``, ``llama`` or ``qwen2`` of the same sizes; biases are random, too."""
    if kind == "mistral":
        return make_tiny_model(**changes)
    torch.manual_seed(0)
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    fields = make_tiny_model().config.to_dict()
    for name in ("sliding_window", "model_type", "architectures", "head_dim", "rope_parameters"):
        fields.pop(name)
    made = model(config(**(fields | changes))).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(".bias"):  # zeros, as transformers makes them
                parameter.normal_(std=0.2)
    return made


def assert_same_state(a, b):
    """Both modules hold equal tensors under the same names."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


def random_cluster_set(model, density, num_clusters=6, rank=4) -> ClusterSet:
    """Random sets and routers that fit a tiny model."""
    return random_clusters(model, density=density, num_clusters=num_clusters, rank=rank)


def random_centroids(num_clusters, num_neurons, *, seed, scale=1.0) -> LayerCentroids:
    """Centroids of log-normal importance; ``scale`` is that of e²."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = (torch.randn(num_clusters, num_neurons, generator=generator) - 2).exp()
    magnitudes *= scale**0.5
    spread = 1.2 + torch.rand(num_clusters, num_neurons, generator=generator)
    shares = torch.rand(num_clusters, generator=generator) + 0.1
    return LayerCentroids(
        mean_squares=magnitudes.square() * spread,
        mean_magnitudes=magnitudes,
        mean_activations=torch.randn(num_clusters, num_neurons, generator=generator),
        shares=shares / shares.sum(),
        neuron_weights=torch.rand(num_neurons, generator=generator) + 0.5,
    )


def cuttable_cluster_set(model) -> ClusterSet:
    """Random clusters of a tiny model with centroids; its layers matter ten times apart in e²."""
    result = random_cluster_set(model, 0.5)
    for index, layer in result.layers.items():
        layer.centroids = random_centroids(6, 44, seed=index, scale=10.0 ** (index - 1))
        generator = torch.Generator().manual_seed(index)
        layer.cluster_weights = torch.rand(6, generator=generator) + 0.5
    return result


def audited(error, spread=0.1) -> MeasuredCuts:
    """A cut at 0.5 of the tiny model, whose layers were off by ``error`` when it was built."""
    levels = AuditLevels(dict.fromkeys(range(3), error), spread)
    return MeasuredCuts(
        ("text",), (64,), (MeasuredCut(0.5, (0.5,), (0.1,), (0.1,), levels),), False
    )


def measured_cuts(*points: tuple[float, float, float]) -> MeasuredCuts:
    """Cuts measured on prose and code, of aim, share of prose and loss of prose.

    Code reads 0.02 more, and loses twice as much.
    """
    cuts = (
        MeasuredCut(aim, (share, share + 0.02), (kl, 2 * kl), (0.1 * kl, 0.1 * kl))
        for aim, share, kl in points
    )
    return MeasuredCuts(("prose", "code"), (1024, 512), tuple(cuts))
