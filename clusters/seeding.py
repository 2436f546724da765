"""Random numbers that do not depend on which layers are fitted, or in what order."""

from __future__ import annotations

import torch


def layer_generator(seed: int, stream: int) -> torch.Generator:
    """A generator on the CPU, another for each seed and stream.

    Args:
        seed: of the whole run.
        stream: a layer's index, or a number beyond those of the layers; below 100,003.
    """
    return torch.Generator().manual_seed(seed * 100_003 + stream)
