"""Inputs of the sparse FFN and what must come out, for the tests of every backend."""

import torch

from sparse_runtime.bitmaps import pack_bits
from sparse_runtime.kernels.low_bit import dequantize_rows, quantize_rows, rounded_tokens
from sparse_runtime.kernels.reference import sparse_ffn_reference

#: Hidden size, neurons, clusters.
SHAPES = [(16, 40, 3), (33, 67, 5), (8, 1, 1), (1, 9, 2), (200, 301, 4), (576, 48, 2)]


def case(n, hidden, neurons, clusters, dtype, density=0.5, seed=0):
    """x, the three weights, a bool mask [K, I] with at least one neuron somewhere, ids."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, hidden, generator=g).to(dtype)
    weights = [
        (torch.randn(neurons, hidden, generator=g) * hidden**-0.5).to(dtype) for _ in range(3)
    ]
    mask = torch.rand(clusters, neurons, generator=g) < density
    mask[:, 0] = True
    return x, weights, mask, torch.randint(0, clusters, (n,), generator=g)


def exact(x, weights, mask, ids, activation="silu"):
    x, *weights = (t.double() for t in (x, *weights))
    return sparse_ffn_reference(x, *weights, pack_bits(mask), ids, activation)


def verified_case(n, hidden, neurons, clusters, dtype, seed=0):
    """Arguments of an operation, and bool masks [n, I] of what it computes and looks at.

    Factors lie in the widest gap of each neuron's h̃, so that no rounding decides.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, hidden, generator=g).to(dtype)
    weights = [
        (torch.randn(neurons, hidden, generator=g) * hidden**-0.5).to(dtype) for _ in range(3)
    ]
    ids = torch.randint(0, clusters, (n,), generator=g)
    draws = torch.rand(clusters, neurons, generator=g)
    sure, maybe = draws < 0.3, (draws > 0.2) & (draws < 0.8)  # some in both: sure
    low_bit = quantize_rows(*weights[:2])
    gate, up = (part.double() for part in dequantize_rows(low_bit, hidden))
    rounded = rounded_tokens(x).double()
    h = (torch.nn.functional.silu(rounded @ gate.t()) * (rounded @ up.t())).abs()
    ordered = torch.cat([h.new_full((1, neurons), 1e-4), h, h.amax(0, keepdim=True) * 10 + 1])
    ordered = ordered.sort(dim=0).values.clamp_min(1e-6).log()
    widest = ordered.diff(dim=0).argmax(0, keepdim=True)
    middle = (ordered.gather(0, widest) + ordered.gather(0, widest + 1)).squeeze(0) / 2
    factors = (-middle).exp().float()
    looked = maybe[ids] & ~sure[ids]
    computed = sure[ids] | (looked & (h * factors > 1))
    arguments = (x, *weights, pack_bits(sure), ids, "silu", pack_bits(maybe), low_bit, factors)
    return arguments, computed, looked


def verified_exact(arguments, computed):
    """The output in float64 for known neurons: one cluster for each token."""
    x, *weights = (tensor.double() for tensor in arguments[:4])
    return sparse_ffn_reference(x, *weights, pack_bits(computed), torch.arange(len(x)), "silu")
