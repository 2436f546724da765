"""Tuning the experts of a whole mixture to predict what its dense model does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_runtime.progress import ProgressReporter, SilentProgress

_LEARNING_RATE = 2e-4
#: Share of the steps over which the learning rate rises.
_WARM_UP = 0.1


def distill(
    mixture: Any,
    dense: Any,
    windows: Tensor,
    *,
    steps: int,
    progress: ProgressReporter | None = None,
) -> list[float]:
    """Tune the experts' weights by KL to the dense model's predictions, in place.

    Routers, attention and all else stay as they are.

    Args:
        mixture: as of ``as_mixtral``, in float32.
        dense: what it is made of.
        windows: token ids [W, window] int64; one a step, in turns.
        steps: 0 changes nothing.
        progress: reports one unit per step.

    Returns:
        KL of each step, in nats per token.
    """
    names = ("gate_up_proj", "down_proj")
    tuned = [getattr(layer.mlp.experts, n) for layer in mixture.model.layers for n in names]
    for parameter in mixture.parameters():
        parameter.requires_grad_(False)
    for parameter in tuned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(tuned, lr=_LEARNING_RATE, betas=(0.9, 0.95))
    warm = max(1, round(_WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    losses = []
    with (progress or SilentProgress()).task("distill", steps) as advance:
        for step in range(steps):
            ids = windows[step % len(windows)].unsqueeze(0).to(dense.device)
            with torch.no_grad():
                target = dense(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            predicted = mixture(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            loss = torch.nn.functional.kl_div(
                predicted, target, reduction="batchmean", log_target=True
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(tuned, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            advance(1)
    for parameter in mixture.parameters():
        parameter.requires_grad_(False)
    return losses
