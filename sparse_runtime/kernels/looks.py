"""What float weights are looked at by: base planes of gate and up, in the look records of planes.

18 % of a bfloat16 neuron's bytes tell whether a token needs it.
"""

from __future__ import annotations

from torch import Tensor

from sparse_runtime.kernels.planes import LOOK_FORMAT, pack_look
from sparse_runtime.kernels.rounding import nearest_codes


def look_records(gate: Tensor, up: Tensor | None) -> Tensor:
    """Make the look records of an FFN's neurons.

    Args:
        gate: gate projection [I, H], bfloat16, float16 or float32.
        up: up projection [I, H], or None.

    Returns:
        records [I, R] uint8 in ``LOOK_FORMAT``, on the weights' device. A group of weights that holds
        NaN or infinity has NaN for its scale: its neuron is never skipped.
    """
    own_up = None if up is None else nearest_codes(up, LOOK_FORMAT)
    return pack_look(nearest_codes(gate, LOOK_FORMAT), own_up)
