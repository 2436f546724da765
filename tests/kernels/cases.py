"""Inputs of the sparse FFN and what must come out, for the tests of every backend."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_runtime.kernels import ClusterTables, FFNWeights, sparse_ffn, sparse_ffn_reference
from sparse_runtime.kernels.bitmaps import pack_bits
from sparse_runtime.kernels.looks import look_records
from sparse_runtime.kernels.planes import LOOK_FORMAT, unpack_look
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS

#: Hidden size, neurons, clusters.
SHAPES = [(16, 40, 3), (33, 67, 5), (8, 1, 1), (1, 9, 2), (70, 131, 4), (200, 301, 4), (576, 48, 2)]

# Error over the largest output. Everything between the inputs and the output is fp32: a sum of m
# products errs by about sqrt(m) of fp32's unit roundoff 2**-24, m <= 1100 here, and the output is
# rounded once, by at most the unit roundoff of its dtype.
ACCUMULATION = 32 * 2**-24
TOLERANCE = {
    torch.float32: ACCUMULATION,
    torch.bfloat16: 2**-8 + ACCUMULATION,
    torch.float16: 2**-11 + ACCUMULATION,
}


def flat(operation):
    """An operation over objects, called as torch.library's are: with single tensors."""

    def call(
        x, w_gate, w_up, w_down_t, sets, cluster_ids, activation="silu",
        maybe_sets=None, look=None, factors=None, row_counts=None, **options,
    ):  # fmt: skip
        weights = FFNWeights(w_gate, w_up, w_down_t, activation, look)
        tables = ClusterTables(sets, maybe_sets, factors)
        return operation(x, weights, tables, cluster_ids, row_counts=row_counts, **options)

    return call


flat_sparse_ffn = flat(sparse_ffn)
flat_reference = flat(sparse_ffn_reference)


def assert_close(actual, expected, tolerance, scale=None):
    """Errors of at most ``tolerance`` of ``scale``, or of the largest output; zero is no largest."""
    assert actual.shape == expected.shape
    scale = expected.abs().max() if scale is None else scale
    assert scale > 0
    assert (actual.cpu().double() - expected).abs().max() <= tolerance * scale


@dataclass
class Case:
    """Arguments of one call. Masks are bool [K, I]; without ``looks`` there is no maybe band."""

    x: Tensor
    weights: list[Tensor]
    sure: Tensor
    ids: Tensor
    activation: str
    maybe: Tensor
    records: Tensor
    factors: Tensor
    above: Tensor  # bool [n, I]: a look would confirm the neuron
    looks: bool

    @property
    def sets(self) -> Tensor:
        return pack_bits(self.sure)

    @property
    def band(self) -> list[Tensor | None]:
        """maybe_sets, look, factors."""
        return [pack_bits(self.maybe), self.records, self.factors] if self.looks else [None] * 3

    @property
    def arguments(self) -> tuple:
        """Of sparse_ffn, up to the factors."""
        return (self.x, *self.weights, self.sets, self.ids, self.activation, *self.band)

    @property
    def looked(self) -> Tensor:
        """Neurons that are looked at, bool [n, I]: those in both bands are sure."""
        return self.maybe[self.ids] & ~self.sure[self.ids] & self.looks

    @property
    def computed(self) -> Tensor:
        return self.sure[self.ids] | (self.looked & self.above)

    @property
    def counts(self) -> list[int]:
        """What row_counts is incremented by."""
        return [int(self.computed.sum()), int(self.looked.sum())]

    def exact(self) -> Tensor:
        """The output in float64."""
        x, *weights = (tensor.double() for tensor in (self.x, *self.weights))
        every = torch.arange(len(x))
        return flat_reference(x, *weights, pack_bits(self.computed), every, self.activation)

    def dense(self) -> Case:
        """The same with all neurons."""
        return replace(self, sure=torch.ones_like(self.sure), looks=False)


def case(n, shape, dtype, *, activation="silu", density=0.5, looks=False, seed=0):
    """Random arguments. Factors are a percent off one token's h̃, or in the widest gap of several."""
    hidden, neurons, clusters = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, hidden, generator=g).to(dtype)
    weights = [
        (torch.randn(neurons, hidden, generator=g) * hidden**-0.5).to(dtype) for _ in range(3)
    ]
    sure, maybe = (torch.rand(clusters, neurons, generator=g) for _ in range(2))
    sure, maybe = sure < density, maybe < 0.6  # some in both
    if density > 0:
        sure[:, 0] = True
    ids = torch.randint(0, clusters, (n,), generator=g)
    records = look_records(*weights[:2])
    gate, up = (part.double() for part in unpack_look(records, LOOK_FORMAT, hidden))
    h = ACTIVATION_FUNCTIONS[activation](x.double() @ gate.t()) * (x.double() @ up.t())
    factors = _beside(h.abs()) if n == 1 else _in_the_widest_gap(h.abs())
    above = h.abs() * factors > 1
    return Case(x, weights, sure, ids, activation, maybe, records, factors, above, looks)


def close_calls(n, hidden, neurons):
    """Arguments of sparse_ffn, up to the factors, in which rounding decides about some neurons.

    Each neuron's bound is what float32 gives for one of the tokens. Output k of a token is zero where
    it left out neuron k.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, hidden, generator=g)
    gate, up = torch.randn(2, neurons, hidden, generator=g)
    records = look_records(gate, up)
    gates, ups = unpack_look(records, LOOK_FORMAT, hidden)
    h = ACTIVATION_FUNCTIONS["silu"](x @ gates.t()) * (x @ ups.t())
    factors = 1 / h.abs()[torch.arange(neurons) % n, torch.arange(neurons)]
    sure, maybe = torch.rand(2, 4, neurons, generator=g)
    sets, band = pack_bits(sure < 0.2), pack_bits(maybe < 0.8)
    ids = torch.randint(0, 4, (n,), generator=g)
    return x, gate, up, torch.eye(neurons, hidden), sets, ids, "silu", band, records, factors


def _beside(h):
    """Bounds that rounding does not cross, and other mistakes do: 1 % below or above, in turns."""
    sides = 1 + 0.01 * (-1) ** torch.arange(h.shape[1])
    judged = h[0] > 1e-3 * h.max()  # others may be far off, relatively
    return torch.where(judged, sides / h[0].clamp_min(1e-30), 0).float()


def _in_the_widest_gap(h):
    largest = h.amax(0, keepdim=True)
    # What is smaller than a thousandth of that is not told apart.
    ordered = torch.cat([h, 1.5 * largest]).clamp_min(1e-3 * largest.clamp_min(1))
    ordered = ordered.sort(dim=0).values.log()
    widest = ordered.diff(dim=0).argmax(0, keepdim=True)
    middle = (ordered.gather(0, widest) + ordered.gather(0, widest + 1)).squeeze(0) / 2
    return (-middle).exp().float()


def spaced(tensor):
    """The same values in every other of rows that have NaN, or ones, between them; None of None."""
    if tensor is None:
        return None
    filler = torch.nan if tensor.is_floating_point() else -1 if tensor.dtype == torch.int64 else 255
    rows, length = tensor.shape
    whole = torch.full((2 * rows, length + 14), filler).to(tensor.dtype)
    whole[::2, 8 : 8 + length] = tensor
    return whole[::2, 8 : 8 + length]


def integers(*shape, dtype, seed=0):
    """Small integers: every sum of their products is exact in fp32."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=g).to(dtype)


def first_largest(logits):
    """The lowest index among the largest logits."""
    return (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
