"""Tell models apart: architecture fields and a hash over sampled FFN weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from sparse_runtime.architectures import find_ffn_layers

_SAMPLES_PER_MATRIX = 256


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Fingerprint a model by its FFN architecture and a sample of its FFN weights.

    The samples (256 per matrix, evenly spaced, of every FFN) are rounded to bfloat16 before they are
    hashed, so that one checkpoint gives one fingerprint whether it is loaded in float32 or bfloat16.
    ``weights_sha256`` is None where weights are offloaded and cannot be read.

    Raises:
        UnsupportedArchitectureError, NothingMatchedError: the model holds no supported FFN.
    """
    layers = find_ffn_layers(model)
    digest: Any = hashlib.sha256()
    for layer in layers:
        for linear in (layer.gate, layer.up, layer.down):
            if linear.weight.device.type == "meta":
                digest = None
                break
            digest.update(_sample(linear.weight))
        if digest is None:
            break
    return {
        "model_type": model.config.model_type,  # type: ignore[union-attr]
        "hidden_size": layers[0].hidden_size,
        "intermediate_size": layers[0].intermediate_size,
        "num_layers": len(layers),
        "activation": layers[0].activation,
        "weights_sha256": None if digest is None else digest.hexdigest(),
    }


def _sample(weight: torch.Tensor) -> bytes:
    columns = weight.shape[1]
    count = min(_SAMPLES_PER_MATRIX, weight.numel())
    flat = torch.arange(count, device=weight.device) * (weight.numel() // count)
    values = weight.detach()[flat // columns, flat % columns]
    return values.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()
