"""The FFN over neurons in planes in plain PyTorch: the definition that backends are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_runtime.kernels.operands import ExpertChoice, Stages
from sparse_runtime.kernels.planes import NeuronPlanes
from sparse_runtime.kernels.reference import activations


def plane_ffn_reference(
    x: Tensor,
    planes: NeuronPlanes,
    candidates: Tensor | None = None,
    stages: Stages | None = None,
    row_counts: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """Compute an FFN from planes, reading each neuron only as far as it matters.

    With h̃ and h the activations of a neuron by base values and by full ones, biases added,
    e = |h̃|·factor, and s(e) = 0 for e ≤ 1, else 1 (or, over a ramp of width w, min(1, (e − 1) / w)):

        skipped   e ≤ 1                 nothing
        counted   1 < e ≤ τ             s(e) · h̃ · down's base values
        refined   τ < e                 s(e) · (h̃ + s(e/τ)·(h − h̃)) · (base + s(e/τ)·(full − base))

    What is not a number is refined, not skipped. Without stages every candidate is refined whole.

    Args:
        x: hidden states [n, H].
        planes: the neurons.
        candidates: neurons that a token may use [n, I] bool; None for all of them.
        stages: thresholds, or None.
        row_counts: incremented by the neurons counted (the refined ones included), looked at and
            refined, summed over tokens [3] int64, or None.
        factors: of each token [n, I], in place of the stages' own.

    Returns:
        y [n, H] of x's dtype, computed in float32.
    """
    gate, up, down = planes.rounded()
    biases = planes.gate_bias, planes.up_bias

    def values(base: bool) -> Tensor:
        ups = None if up is None else up.values(base=base)
        return activations(x.float(), gate.values(base=base), ups, planes.activation, *biases)

    full, refined = values(base=False), None
    if candidates is None:
        candidates = torch.ones_like(full, dtype=torch.bool)
    if stages is None:
        h = full.masked_fill(~candidates, 0)
        output = h @ down.values()
        counted = refined = candidates
    else:
        look = values(base=True)
        evidence = look.abs() * (stages.factors if factors is None else factors)
        counted = candidates & ~(evidence <= 1)
        refined = counted & ~(evidence <= stages.tau)
        share = torch.where(counted, ramp(evidence, stages.width), 0)
        finer = torch.where(refined, ramp(evidence / stages.tau, stages.width), 0)
        h = (share * torch.where(finer > 0, look + finer * (full - look), look)).masked_fill(
            ~counted, 0
        )
        base_down = down.values(base=True)
        output = h @ base_down + (h * finer) @ (down.values() - base_down)
    if row_counts is not None:
        row_counts += torch.stack([counted.sum(), candidates.sum(), refined.sum()])
    return output.to(x.dtype)


def plane_experts_reference(
    x: Tensor,
    planes: NeuronPlanes,
    candidates: Tensor,
    stages: Stages | None,
    row_counts: Tensor,
    factors: Tensor | None,
    choice: ExpertChoice,
) -> Tensor:
    """Σ_j w_j·FFN of each token's experts, read as far as w_j·h̃ matters.

    Arguments as of :func:`plane_ffn_reference`; one expert's neurons come after the other's.
    """
    output = x.new_zeros(x.shape, dtype=torch.float32)
    for rows, tokens, counts in choice.parts(len(planes.look)):
        scaled = None
        if stages is not None:
            every = stages.factors.expand(len(x), -1) if factors is None else factors
            scaled = every[tokens, rows] * counts.abs().unsqueeze(-1)
        own = candidates[tokens, rows]
        found = plane_ffn_reference(x[tokens], planes.some(rows), own, stages, row_counts, scaled)
        output.index_add_(0, tokens, found.float() * counts.unsqueeze(-1))
    return output.to(x.dtype)


def ramp(evidence: Tensor, width: float) -> Tensor:
    """s(e): 0 to 1 over 1 < e ≤ 1 + width, for e > 1; a step for a width of 0; 1 for NaN."""
    if width == 0:
        return torch.ones_like(evidence)
    return ((evidence - 1) / width).clamp(0, 1).nan_to_num(nan=1.0)
