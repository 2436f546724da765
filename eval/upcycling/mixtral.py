"""A dense model's weights as those of a Mixtral, proven by numbers to compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.clusters.capture import not_finite
from sparse_runtime.errors import ConfigError, UnsupportedArchitectureError
from sparse_runtime.eval.upcycling.layer_experts import LayerExperts, cut_experts
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_single_ffns

#: Fields of a dense model's config that Mixtral's has too; those of the FFN are its own.
_SHARED_FIELDS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
    "vocab_size",
)
#: Neurons of an expert: transformers' grouped products take rows of whole 16 bytes.
_MULTIPLE = 8
_PROOF_TOKENS = 64
#: Of the largest logit: float32 over some dozens of layers, in another order of summation.
_PROOF_TOLERANCE = 1e-3


def check_dense(model: Any, experts: int) -> list[FFNLayer]:
    """The FFNs of a model that a mixture can be made of.

    Raises:
        ConfigError: the neurons cannot be split evenly.
        UnsupportedArchitectureError, NothingMatchedError: see ``find_ffn_layers``; or an FFN has no
            gate, or biases, or some layer has no FFN.
    """
    layers = find_single_ffns(model, "upcycling")
    for layer in layers:
        problem = None
        if layer.up is None:
            problem = "has no gate"
        elif any(bias is not None for bias in (*layer.biases, layer.down_bias)):
            problem = "has biases"
        if problem:
            raise UnsupportedArchitectureError(
                f"{layer.name} {problem}; expected down(act(gate(x)) * up(x)) without biases, as "
                "Mixtral's experts are"
            )
        size, rest = divmod(layer.intermediate_size, experts)
        if rest or size % _MULTIPLE:
            raise ConfigError(
                f"{layer.name} has {layer.intermediate_size} neurons, of which {experts} experts "
                f"cannot have the same multiple of {_MULTIPLE} each; give another number of experts"
            )
    sizes = {layer.intermediate_size for layer in layers}
    depth = model.config.num_hidden_layers
    if len(sizes) > 1 or len(layers) != depth:
        raise UnsupportedArchitectureError(
            f"{len(layers)} of {depth} layers have an FFN, of {sorted(sizes)} neurons; Mixtral has "
            "experts of one size in all layers"
        )
    return layers


def as_mixtral(
    model: Any, layers: Sequence[FFNLayer], experts: Sequence[LayerExperts], active: int
) -> Any:
    """Make a Mixtral of a dense model and the experts of each of its layers.

    Args:
        model: shares all other parameters with the result.
        layers: its FFNs.
        experts: of each.
        active: experts a token.

    Returns:
        A ``MixtralForCausalLM`` in eval mode.

    Raises:
        UnsupportedArchitectureError: the model has other parameters than Mixtral.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    shared = {n: getattr(model.config, n) for n in _SHARED_FIELDS if hasattr(model.config, n)}
    first = experts[0]
    config = MixtralConfig(
        **shared,
        intermediate_size=first.down.shape[-1],
        num_local_experts=len(first.router),
        num_experts_per_tok=active,
    )
    with torch.device("meta"):
        mixtral = MixtralForCausalLM(config)
    state = dict(model.state_dict())
    for number, (layer, own) in enumerate(zip(layers, experts, strict=True)):
        state = {n: t for n, t in state.items() if not n.startswith(f"{layer.name}.")}
        prefix = f"model.layers.{number}.mlp"
        state[f"{prefix}.gate.weight"] = own.router.to(layer.dtype)
        state[f"{prefix}.experts.gate_up_proj"] = own.gate_up.to(layer.dtype)
        state[f"{prefix}.experts.down_proj"] = own.down.to(layer.dtype)
    expected = mixtral.state_dict()
    for name in sorted(state.keys() | expected.keys()):
        found, wanted = (
            list(tensors[name].shape) if name in tensors else "none"
            for tensors in (state, expected)
        )
        if found != wanted:
            raise UnsupportedArchitectureError(
                f"a {type(model).__name__} cannot be saved as a Mixtral: of {name} it has {found}, "
                f"Mixtral {wanted}; expected a Llama or Mistral"
            )
    mixtral.load_state_dict(state, assign=True)
    mixtral.tie_weights()
    # Buffers are not in the state dict.
    mixtral.model.rotary_emb = type(mixtral.model.rotary_emb)(config).to(model.device)
    mixtral.config.dtype = model.dtype
    mixtral.generation_config = model.generation_config
    return mixtral.eval()


@torch.inference_mode()
def prove_form(model: Any, layers: Sequence[FFNLayer], experts: int, tokens: Tensor) -> None:
    """Check that a Mixtral with all experts active computes what the dense model does.

    Args:
        model: dense, in float32.
        layers: its FFNs.
        experts: E, a divisor of their numbers of neurons.
        tokens: some ids [n] int64.

    Raises:
        UnsupportedArchitectureError: it does not.
        ModelError: the dense model's logits are not finite.
    """
    labels = [torch.arange(layer.intermediate_size, device=layer.device) for layer in layers]
    whole = [
        cut_experts(
            layer, own % experts, torch.zeros(experts, layer.hidden_size).to(own.device), experts
        )
        for layer, own in zip(layers, labels, strict=True)
    ]
    ids = tokens[:_PROOF_TOKENS].unsqueeze(0).to(model.device)
    dense = model(input_ids=ids, use_cache=False).logits
    if not dense.isfinite().all():
        raise not_finite(model, "the logits of the dense model")
    ours = as_mixtral(model, layers, whole, experts)(input_ids=ids, use_cache=False).logits
    error = (ours - dense).abs().max() / dense.abs().max()
    if not error <= _PROOF_TOLERANCE:
        raise UnsupportedArchitectureError(
            f"a {type(model).__name__} (model type {model.config.model_type!r}) cannot be saved as a "
            f"Mixtral: with all experts active its logits are off by {error:.2g} of the largest; "
            "expected a Llama or Mistral"
        )
