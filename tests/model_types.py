"""Tiny models of transformers' model types, made from each type's default config."""

from contextlib import suppress

import torch
import transformers
from transformers import CONFIG_MAPPING

from sparse_runtime.eval.report.models_markdown import model_classes

# Fields as configs name them, where they have them.
_SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 16,
    "max_window_layers": 1,
    "query_pre_attn_scalar": 8,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    # Of older types.
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_inner": 44,
    "n_positions": 128,
    "n_ctx": 128,
    "rotary_dim": 8,
    "ffn_hidden_size": 44,
    "ffn_dim": 44,
    "word_embed_proj_dim": 16,
    "decoder_ffn_dim": 44,
    "encoder_ffn_dim": 44,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "d_inner": 44,
    "num_heads": 4,
    "num_layers": 2,
    # Of vision towers.
    "depth": 1,
    "embed_dim": 32,
    "image_size": 28,
    "patch_size": 14,
}
# Of mixtures of experts, by the names that they give the number of experts.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_SIZES = {
    **dict.fromkeys(_EXPERTS, 4),
    "intermediate_size": 48,  # a multiple of 8
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
}
_OFTEN_NONE = ("pad_token_id", "head_dim", "q_lora_rank", "n_inner", "num_key_value_heads")


def tiny_model_of_type(kind):
    """A random model of a type, in eval mode; small."""
    config = _shrunk(CONFIG_MAPPING[kind]())
    torch.manual_seed(0)
    model = getattr(transformers, model_classes()[kind])._from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers' weights are too small to tell answers apart, and its biases zero.
            if parameter.ndim in (2, 3) or name.endswith(".bias"):
                parameter.normal_(std=0.2)
    return model


def _shrunk(config):
    sizes = _SIZES | (_EXPERT_SIZES if any(hasattr(config, name) for name in _EXPERTS) else {})
    for name, value in sizes.items():
        found = getattr(config, name, "missing")
        if isinstance(found, int) or (found is None and name in _OFTEN_NONE):
            with suppress(AttributeError, NotImplementedError):  # computed from others
                setattr(config, name, value)
    if hasattr(config, "qk_rope_head_dim"):
        config.head_dim = config.qk_rope_head_dim
    if isinstance(getattr(config, "rope_parameters", None), dict) and "_vl" in config.model_type:
        config.rope_parameters["mrope_section"] = [1, 1, 2]
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[:2])
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            _shrunk(getattr(config, name))
    return config
