"""Models of a known shape with random weights, for latency where no checkpoint is at hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

from sparse_runtime.architectures import find_ffn_layers
from sparse_runtime.bitmaps import pack_bits
from sparse_runtime.cluster_set import ClusterSet, LayerClusters
from sparse_runtime.errors import ConfigError
from sparse_runtime.fingerprint import model_fingerprint

SHAPES = {
    "mistral-7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": None,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
}


def random_model(
    shape: str, *, layers: int | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> nn.Module:
    """Make a Mistral-class model of a known shape with random weights, in eval mode.

    Weights repeat one random block of a million values: latency does not depend on them, and drawing
    seven billion takes minutes.

    Raises:
        ConfigError: the shape is not known, or ``layers`` is out of range.
    """
    if shape not in SHAPES:
        raise ConfigError(f"shape is {shape!r}; expected one of {', '.join(SHAPES)}")
    fields = dict(SHAPES[shape])
    if layers is not None:
        if layers < 1:
            raise ConfigError(f"layers is {layers}; expected 1 or more")
        fields["num_hidden_layers"] = layers
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig(**fields)).to(dtype)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    # to_empty leaves buffers unset too; the rotary frequencies are recomputed from the config.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            scale = parameter.shape[-1] ** -0.5
            _fill(parameter, (block * scale).to(dtype))
    return model


def random_clusters(
    model: nn.Module, *, density: float, num_clusters: int = 256, rank: int = 128, seed: int = 0
) -> ClusterSet:
    """Random sets of one density and random low-rank routers for a model.

    Raises:
        ConfigError: the density is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise ConfigError(f"density is {density}; expected more than 0 and at most 1")
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer in find_ffn_layers(model):
        hidden_size, neurons = layer.hidden_size, layer.intermediate_size
        scores = torch.rand(num_clusters, neurons, generator=generator)
        size = max(1, round(density * neurons))
        sets = torch.zeros_like(scores, dtype=torch.bool)
        sets.scatter_(1, scores.topk(size, dim=1).indices, True)
        packed = pack_bits(sets)
        layers[layer.index] = LayerClusters(
            active_sets=packed,
            static_set=packed[0].clone(),
            router_down=torch.randn(rank, hidden_size, generator=generator) * hidden_size**-0.5,
            router_up=torch.randn(num_clusters, rank, generator=generator) * rank**-0.5,
            router_bias=torch.zeros(num_clusters),
        )
    return ClusterSet(layers, model_fingerprint(model), {"method": "random", "density": density})


def _fill(parameter: Tensor, block: Tensor) -> None:
    flat = parameter.view(-1)
    for start in range(0, flat.numel(), block.numel()):
        part = flat[start : start + block.numel()]
        part.copy_(block[: part.numel()])
