"""What float weights are looked at by: base planes of gate and up, in the look records of planes.

18 % of a bfloat16 neuron's bytes tell whether a token needs it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.cost import GROUP
from sparse_runtime.kernels.planes import LOOK_FORMAT, Rounded, pack_look
from sparse_runtime.kernels.rounding import round_rows


def look_records(gate: Tensor, up: Tensor | None) -> Tensor:
    """Make the look records of an FFN's neurons.

    Args:
        gate: gate projection [I, H], bfloat16, float16 or float32.
        up: up projection [I, H], or None.

    Returns:
        records [I, R] uint8 in ``LOOK_FORMAT``, on the weights' device. A group of weights that holds
        NaN or infinity has NaN for its scale: its neuron is never skipped.
    """
    return pack_look(_rounded(gate), None if up is None else _rounded(up))


def _rounded(weight: Tensor) -> Rounded:
    finite = weight.isfinite()
    if finite.all():
        return round_rows(weight, LOOK_FORMAT)
    rounded = round_rows(weight.where(finite, 0), LOOK_FORMAT)
    padding = -weight.shape[1] % GROUP
    bad = F.pad(~finite, (0, padding)).unflatten(1, (-1, GROUP)).any(-1)
    return Rounded(
        rounded.hi, rounded.lo, rounded.scales.masked_fill(bad, float("nan")), LOOK_FORMAT
    )
