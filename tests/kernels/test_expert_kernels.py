"""Experts by the CPU kernels against their definition: weights, looks, odd sizes, and refusals."""

import itertools

import pytest
import torch
from helpers import needs_library

from sparse_runtime.kernels import routed_ffn
from sparse_runtime.kernels.bitmaps import pack_bits
from sparse_runtime.kernels.looks import look_records
from sparse_runtime.kernels.operands import (
    ClusterTables,
    Compensation,
    Counters,
    ExpertChoice,
    FFNWeights,
    RouterWeights,
)
from sparse_runtime.kernels.reference import activations

pytestmark = needs_library

K = 5
SIZES = [(3, 8, 36), (4, 40, 64), (1, 24, 100)]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}


class Case:
    """Random experts, [E, 2I, H] and [E, H, I], clusters over their neurons, and tokens."""

    def __init__(self, sizes, dtype, *, looks, tokens=3, per_token=2, seed=0):
        self.experts, self.neurons, self.hidden = sizes
        generator = torch.Generator().manual_seed(seed)

        def random(*shape, std=1.0):
            return (torch.randn(shape, generator=generator) * std).to(dtype)

        total = self.experts * self.neurons
        self.gate_up = random(self.experts, 2 * self.neurons, self.hidden, std=self.hidden**-0.5)
        self.down_t = random(total, self.hidden, std=total**-0.5)
        gate, up = self.gate_up.chunk(2, dim=1)
        look = look_records(gate.flatten(0, 1), up.flatten(0, 1)) if looks else None
        self.weights = FFNWeights(
            self.gate_up.flatten(0, 1), None, self.down_t, "silu", look, None, None
        )
        kinds = torch.randint(0, 3, (K, total), generator=generator)
        self.sure, self.maybe = kinds == 0, (kinds == 1 if looks else None)
        self.factors = 2 + torch.rand(total, generator=generator) if looks else None
        counts = 0.5 + torch.rand(K, generator=generator) if looks else None
        self.tables = ClusterTables(
            pack_bits(self.sure), pack_bits(self.maybe) if looks else None, self.factors, counts
        )
        self.router = RouterWeights(random(K, self.hidden), random(K))
        self.bias = random(K, self.hidden)
        self.x = random(tokens, self.hidden)
        per_token = min(per_token, self.experts)
        order = torch.rand(tokens, self.experts, generator=generator).argsort(1)
        weights = torch.rand(tokens, per_token, generator=generator)
        self.choice = ExpertChoice(order[:, :per_token].contiguous(), weights, self.experts)

    def run(self, backend, choice=None):
        counters = Counters(torch.zeros(K, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
        y = routed_ffn(
            self.x,
            self.weights,
            self.tables,
            self.router,
            Compensation(self.bias),
            counters,
            backend=backend,
            choice=choice or self.choice,
        )
        return y.float(), counters


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", SIZES)
def test_kernel_equals_reference(sizes, dtype, looks):
    case = Case(sizes, dtype, looks=looks)
    found, counters = case.run("cpu")
    expected, own = case.run("reference")
    assert (found - expected).norm() < TOLERANCES[dtype] * expected.norm()
    assert torch.equal(counters.clusters, own.clusters)
    torch.testing.assert_close(counters.rows, own.rows, rtol=0.02, atol=1)


@pytest.mark.parametrize("sizes", SIZES)
def test_kernel_by_hand(sizes):
    """Σ_j w_j·down_e(mask ⊙ h_e), and the cluster's bias once."""
    case = Case(sizes, torch.float32, looks=False)
    ids = (case.x @ case.router.up.t() + case.router.bias).argmax(-1)
    expected = case.bias[ids].clone()
    for token, place in itertools.product(range(3), range(case.choice.index.shape[1])):
        expert = case.choice.index[token, place]
        gate, up = case.gate_up[expert].chunk(2)
        rows = slice(expert * case.neurons, (expert + 1) * case.neurons)
        h = activations(case.x[token : token + 1], gate, up, "silu")
        h = h * case.sure[ids[token], rows] * case.choice.weights[token, place]
        expected[token] += (h @ case.down_t[rows])[0]
    found, counters = case.run("cpu")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    read = case.sure.view(K, case.experts, -1).sum(-1)[ids].gather(1, case.choice.index)
    assert counters.rows[0] == read.sum()


def test_a_weight_counts_in_the_look():
    """A neuron is looked at with what its expert counts: next to nothing is computed without weight."""
    case = Case(SIZES[1], torch.float32, looks=True)
    case.tables.active_sets.zero_()
    all_weights = case.choice.weights
    rows = []
    for scale in (1e-6, 1.0, 1e6):
        choice = ExpertChoice(case.choice.index, all_weights * scale, case.experts)
        rows.append(case.run("cpu", choice)[1].rows.tolist())
    computed, looked = zip(*rows, strict=True)
    assert looked[0] == looked[1] == looked[2] > 0
    assert computed[0] == 0 < computed[1] < computed[2] == looked[2]


@pytest.mark.parametrize("index", [-1, 4, 2**40])
def test_an_index_beyond_the_experts_is_refused(index):
    case = Case(SIZES[1], torch.float32, looks=False)
    case.choice.index[1, 1] = index
    with pytest.raises(IndexError, match="0 <= index < experts"):
        case.run("cpu")


def test_choices_must_fit_the_tokens():
    case = Case(SIZES[1], torch.float32, looks=False)
    for index, weights in (
        (case.choice.index[:2], case.choice.weights),
        (case.choice.index, case.choice.weights[:, :1]),
        (case.choice.index.int(), case.choice.weights),
        (case.choice.index, case.choice.weights.double()),
    ):
        with pytest.raises((ValueError, TypeError), match="top_k"):
            case.run("cpu", ExpertChoice(index, weights, case.experts))
