"""Models of a known shape with random weights, for latency where no checkpoint is at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.layer_clusters import LayerClusters
from sparse_runtime.clusters.importance import importance_scorer
from sparse_runtime.cost import FFNCost
from sparse_runtime.errors import ConfigError
from sparse_runtime.kernels.bitmaps import pack_bits
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.fingerprint import model_fingerprint

SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": {
        "model_type": "mistral",
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
        "model_type": "mistral",
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
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
}


def empty_model(
    shape: str, *, layers: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """Make a model of a known shape on the meta device, in eval mode.

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
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        model: nn.Module = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    return model


def random_values(dtype: torch.dtype, *, seed: int = 0) -> Callable[[str, Sequence[int]], Tensor]:
    """Make weights by their names and shapes; norms are ones.

    They repeat one random block of a million values: latency does not depend on them, and drawing
    seven billion takes minutes.
    """
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed))

    def values(name: str, shape: Sequence[int]) -> Tensor:
        tensor = torch.empty(*shape, dtype=dtype)
        if name.endswith("norm.weight"):
            return tensor.fill_(1.0)
        _fill(tensor, (block * shape[-1] ** -0.5).to(dtype))
        return tensor

    return values


def random_model(
    shape: str, *, layers: int | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> nn.Module:
    """Make a model of a known shape with random weights (:func:`random_values`), in eval mode.

    Raises:
        ConfigError: the shape is not known, or ``layers`` is out of range.
    """
    model: Any = empty_model(shape, layers=layers, dtype=dtype)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    # to_empty leaves buffers unset too; the rotary frequencies are recomputed from the config.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    values = random_values(dtype, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values(name, parameter.shape))
    made: nn.Module = model
    return made


def random_clusters(
    model: nn.Module,
    *,
    density: float,
    looked: float = 0.0,
    confirmed: float = 0.4,
    num_clusters: int = 256,
    rank: int = 128,
    seed: int = 0,
) -> ClusterSet:
    """Random sets of one density and random low-rank routers for a model.

    Args:
        model: the model.
        density: bytes of the neurons that a token reads, looks included, over those of all neurons.
        looked: share of neurons that it looks at first.
        confirmed: share of these that are then computed, for normal hidden states.
        num_clusters: K.
        rank: of the routers.
        seed: of sets and routers.

    Raises:
        ConfigError: the shares are not in (0, 1], or leave nothing that is surely computed.
    """
    if not (0 < density <= 1 and 0 <= looked < 1):
        raise ConfigError(f"density is {density} and looked {looked}; expected shares up to 1")
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer in find_ffn_layers(model):
        hidden_size, neurons = layer.hidden_size, layer.intermediate_size
        cost = FFNCost(hidden_size, neurons, 0)
        sure = density - looked * (confirmed + cost.look_bytes / cost.neuron_bytes)
        if sure < 0 or sure + looked > 1:
            raise ConfigError(
                f"density {density} with {looked} looked at leaves {sure:.3f} surely computed; "
                "expected 0 or more, and no more than 1 with those looked at"
            )
        scores = torch.rand(num_clusters, neurons, generator=generator)
        order = scores.argsort(dim=1)
        sizes = [max(1, round(sure * neurons)), round(looked * neurons)]
        packed, maybe = (
            pack_bits(torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True))
            for chosen in order.split([*sizes, neurons - sum(sizes)], dim=1)[:2]
        )
        layers[layer.index] = LayerClusters(
            active_sets=packed,
            static_set=packed[0].clone(),
            router_down=torch.randn(rank, hidden_size, generator=generator) * hidden_size**-0.5,
            router_up=torch.randn(num_clusters, rank, generator=generator) * rank**-0.5,
            router_bias=torch.zeros(num_clusters),
            maybe_sets=maybe if looked else None,
            factors=_factors(layer, confirmed, generator) if looked else None,
        )
    record = {"method": "random", "density": density, "looked": looked}
    return ClusterSet(layers, model_fingerprint(model), budget=density, build=record)


#: τ that refines half of the neurons that :func:`staged_clusters` count: of |h| of normal hidden states
#: the upper quartile over the median, by measurement.
HALF_REFINED = 3.0


def staged_clusters(model: nn.Module, *, num_clusters: int = 256, rank: int = 128) -> ClusterSet:
    """Random clusters for weights in planes: of the neurons 80 % are looked at and 40 % counted."""
    layer = find_ffn_layers(model)[0]
    cost = FFNCost(layer.hidden_size, layer.intermediate_size, 0)
    looked, confirmed = 0.8, 0.5
    density = looked * (confirmed + cost.look_bytes / cost.neuron_bytes)
    return random_clusters(
        model,
        density=density,
        looked=looked,
        confirmed=confirmed,
        num_clusters=num_clusters,
        rank=rank,
    )


def _factors(layer: FFNLayer, confirmed: float, generator: torch.Generator) -> Tensor:
    """Factors [I] that confirm a share of the neurons of normal hidden states."""
    x = torch.randn(4, layer.hidden_size, generator=generator)
    scorer = importance_scorer(layer)
    sizes = scorer.activations(x.to(layer.device)).abs().flatten().cpu()
    sizes = sizes[sizes > 0]  # without those of experts that no token has
    limit = sizes[:: -(-len(sizes) // 100_000)].quantile(1 - confirmed)
    return torch.full((layer.intermediate_size,), 1 / limit.item())


def _fill(parameter: Tensor, block: Tensor) -> None:
    flat = parameter.view(-1)
    for start in range(0, flat.numel(), block.numel()):
        part = flat[start : start + block.numel()]
        part.copy_(block[: part.numel()])
