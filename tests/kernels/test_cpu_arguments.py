"""Arguments of every shape, dtype, layout and kind: an error, or the reference's answer."""

import ctypes

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels.cases import first_largest, flat_reference
from kernels.library import ops

from sparse_runtime.cost import packed_size
from sparse_runtime.kernels.looks import look_records
from sparse_runtime.kernels.reference import ACTIVATION_FUNCTIONS, activations

REJECTED = (ValueError, IndexError, RuntimeError)  # NotImplementedError is a RuntimeError
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.cfloat]
SIZES = [0, 1, 2, 7, 8, 9, 24]
EXAMPLES = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
BAD_IDS = [-1, -(2**63), 2**63 - 1, 2**32, 24]


def values(shape, dtype, seed=0):
    """Integers of -1 to 1: all sums of products here are exact in fp32."""
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=g, dtype=dtype)
    return torch.randint(-1, 2, shape, generator=g).to(dtype)


def overlapping(tensor):
    """Rows that begin one element after the one before."""
    length = sum(size - 1 for size in tensor.shape) + 1
    if tensor.numel() == 0:
        return tensor
    return values((length,), tensor.dtype).as_strided(tensor.shape, [1] * tensor.dim())


def misaligned(tensor):
    """The same values, one byte after where their dtype wants to begin."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor
    result = torch.frombuffer(bytearray(size + 1), dtype=tensor.dtype, offset=1)
    return result.view(tensor.shape).copy_(tensor)


def freed(tensor):
    """A tensor whose memory was given back, as sharding tools do."""
    result = tensor.clone()
    result.untyped_storage().resize_(0)
    return result


def wide(tensor):
    """Rows with NaN (or 255) between them: allowed."""
    gap = 3
    filler = torch.nan if tensor.is_floating_point() else 1
    whole = torch.full((*tensor.shape[:-1], tensor.shape[-1] + gap), filler).to(tensor.dtype)
    result = whole[..., : tensor.shape[-1]]
    return result.copy_(tensor)


SPOILED = {
    "dtype": lambda tensor, draw: tensor.to(draw(st.sampled_from(DTYPES))),
    "size": lambda tensor, draw: values(
        [draw(st.sampled_from(SIZES)) for _ in tensor.shape], tensor.dtype
    ),
    "transposed": lambda tensor, draw: values(tensor.shape[::-1], tensor.dtype).t(),
    "expanded": lambda tensor, draw: values([1] * tensor.dim(), tensor.dtype).expand(tensor.shape),
    "every other": lambda tensor, draw: values([2 * size for size in tensor.shape], tensor.dtype)[
        (slice(None, None, 2),) * tensor.dim()
    ],
    "overlapping": lambda tensor, draw: overlapping(tensor),
    "wide": lambda tensor, draw: wide(tensor),
    "misaligned": lambda tensor, draw: misaligned(tensor),
    "freed": lambda tensor, draw: freed(tensor),
    "negative view": lambda tensor, draw: torch._neg_view(tensor),
    "a dimension more": lambda tensor, draw: tensor[None],
    "a dimension less": lambda tensor, draw: values(tensor.shape[1:], tensor.dtype),
    "no dimension": lambda tensor, draw: values((), tensor.dtype),
    "meta": lambda tensor, draw: tensor.to("meta"),
    "sparse": lambda tensor, draw: tensor.to_sparse(),
    "ids": lambda tensor, draw: (
        torch.full_like(tensor, draw(st.sampled_from(BAD_IDS)))
        if tensor.dtype == torch.int64
        else tensor
    ),
    "other kind": lambda tensor, draw: draw(st.sampled_from([None, 3, 1.5, "silu", [tensor]])),
}


class Case:
    """Arguments of one call, some of them spoiled."""

    def __init__(self, data):
        self.draw = data.draw
        self.n, self.hidden, self.neurons, self.clusters, self.rank = (
            self.draw(st.sampled_from(SIZES)) for _ in range(5)
        )
        self.dtype = self.draw(st.sampled_from(FLOATS))
        self.activation = "relu"
        self.spoiled = []

    def ffn(self):
        weight = (self.neurons, self.hidden)
        shapes = {"x": (self.n, self.hidden), "w_gate": weight, "w_up": weight, "w_down_t": weight}
        return {k: values(s, self.dtype, seed) for seed, (k, s) in enumerate(shapes.items())}

    def sets(self):
        return {"sets": values((self.clusters, packed_size(self.neurons)), torch.uint8)}

    def ids(self):
        g = torch.Generator().manual_seed(4)
        return {"cluster_ids": torch.randint(0, max(self.clusters, 1), (self.n,), generator=g)}

    def router(self):
        given = self.draw(st.tuples(st.booleans(), st.booleans()))
        length = self.rank if given[0] else self.hidden
        return {
            "router_down": values((self.rank, self.hidden), self.dtype, 5) if given[0] else None,
            "router_up": values((self.clusters, length), self.dtype, 6),
            "router_bias": values((self.clusters,), self.dtype, 7) if given[1] else None,
        }

    def call(self, operation, tensors, *, usable=True, with_activation=False):
        """Spoil up to two arguments and call; the result, or None if the call was rejected."""
        names = sorted(name for name, tensor in tensors.items() if tensor is not None)
        for name in self.draw(st.lists(st.sampled_from(names), unique=True, max_size=2)):
            how = self.draw(st.sampled_from(sorted(SPOILED)))
            self.spoiled.append((name, how))
            tensors[name] = SPOILED[how](tensors[name], self.draw)
        arguments = list(tensors.values())
        if with_activation:
            names = ["relu"] * 5 + ["silu", "gelu", "gelu_tanh"]
            self.activation = self.draw(st.sampled_from([*names, "", "relu\0", "ü" * 50, None, 1]))
            arguments.append(self.activation)
        ops.cpu_force_isa(self.draw(st.sampled_from(ops.cpu_isas().split(","))))
        try:
            result = operation(*arguments)
        except REJECTED:
            usual = self.activation in ACTIVATION_FUNCTIONS
            assert self.spoiled or not usual or not usable, "good arguments were rejected"
            return None
        finally:
            ops.cpu_force_isa("")
        assert self.activation in ACTIVATION_FUNCTIONS
        return None if result.is_meta else result

    def check(self, actual, expected):
        expected = expected.to(actual.dtype)
        assert actual.shape == expected.shape
        if self.activation == "relu":
            assert torch.equal(actual, expected)
        else:
            assert torch.allclose(actual.double(), expected.double(), rtol=2**-7, atol=1e-4)


def double(tensors, *names):
    """In float64; None (w_up of an FFN without a gate) stays."""
    found = [tensors[name] for name in names]
    return [tensor if tensor is None else tensor.double() for tensor in found]


def logits(x, down, up, bias):
    inner = x.double() if down is None else (x.double() @ down.double().t()).to(x.dtype).double()
    return inner @ up.double().t() + (0 if bias is None else bias.double())


@EXAMPLES
@given(data=st.data())
def test_sparse_ffn(data):
    case = Case(data)
    tensors = case.ffn() | case.sets() | case.ids()
    usable = case.clusters > 0 or case.n == 0
    y = case.call(ops.cpu_sparse_ffn, tensors, usable=usable, with_activation=True)
    if y is not None:
        x, *weights = double(tensors, "x", "w_gate", "w_up", "w_down_t")
        case.check(
            y,
            flat_reference(x, *weights, tensors["sets"], tensors["cluster_ids"], case.activation),
        )


def _records(gate, up):
    """Rows without elements cannot be rounded, nor looked at by the reference."""
    return look_records(gate, up) if gate.shape[1] else torch.empty(len(gate), 0, dtype=torch.uint8)


@EXAMPLES
@given(data=st.data())
def test_verified_ffn(data):
    case = Case(data)
    tensors = case.ffn() | case.sets() | case.ids()
    looks, counted = data.draw(st.tuples(st.booleans(), st.booleans()))
    # Whatever h̃ is, a factor of zero leaves the neuron out and an infinite one confirms it.
    tensors |= {
        "maybe_sets": values((case.clusters, packed_size(case.neurons)), torch.uint8, 9),
        "look": _records(tensors["w_gate"], tensors["w_up"]),
        "factors": values((case.neurons,), torch.float32, 10).clamp_min(0) * torch.inf,
    }
    tensors["factors"].nan_to_num_(0, torch.inf)
    if not looks:
        tensors |= dict.fromkeys(("maybe_sets", "look", "factors"))
    counts = torch.tensor([3, 4])
    tensors["row_counts"] = counts if counted else None
    usable = case.clusters > 0 or case.n == 0

    def operation(*arguments):
        return ops.cpu_sparse_ffn(*arguments[:6], "relu", *arguments[6:])

    y = case.call(operation, tensors, usable=usable)
    if y is None:
        assert counts.tolist() == [3, 4], "a rejected call has counted"
        return
    if case.hidden == 0 and looks:
        assert y.numel() == 0
        return
    x, *weights = double(tensors, "x", "w_gate", "w_up", "w_down_t")
    extra = [tensors[name] for name in ("maybe_sets", "look", "factors")]
    extra = [tensor if tensor is None else tensor.resolve_neg() for tensor in extra]
    factors = extra[2]
    if factors is not None and not ((factors == 0) | factors.isposinf()).all():
        return  # spoiled so that rounding decides: -inf confirms an h̃ of 0, and no other
    expected_counts = torch.tensor([3, 4])
    expected = flat_reference(
        x, *weights, tensors["sets"], tensors["cluster_ids"], "relu", *extra, expected_counts
    )
    case.check(y, expected)
    if counted and not any(name == "row_counts" for name, _ in case.spoiled):
        assert torch.equal(counts, expected_counts)


@EXAMPLES
@given(data=st.data())
def test_dense_ffn(data):
    case = Case(data)
    tensors = case.ffn()
    y = case.call(ops.cpu_dense_ffn, tensors, with_activation=True)
    if y is not None:
        x, gate, up, down = double(tensors, *tensors)
        case.check(y, activations(x, gate, up, case.activation) @ down)


@EXAMPLES
@given(data=st.data())
def test_route(data):
    case = Case(data)
    tensors = {"x": values((case.n, case.hidden), case.dtype)} | case.router()
    usable = case.n == 0 or case.clusters > 0
    usable = usable and (tensors["router_down"] is None or case.rank > 0)
    ids = case.call(ops.cpu_route, tensors, usable=usable)
    if ids is not None:
        assert ids.dtype == torch.int64
        assert ids.shape == tensors["x"].shape[:1]
        if len(ids):
            assert torch.equal(ids, first_largest(logits(*tensors.values())))


@EXAMPLES
@given(data=st.data())
def test_routed_ffn(data):
    case = Case(data)
    tensors = case.ffn() | case.sets() | case.router()
    compensated, counted = data.draw(st.tuples(st.booleans(), st.booleans()))
    tensors["cluster_bias"] = (
        values((case.clusters, case.hidden), case.dtype, 8) if compensated else None
    )
    counts = torch.arange(case.clusters)
    tensors["cluster_counts"] = counts if counted else None
    corrected = data.draw(st.booleans())
    for seed, name in ((9, "correction_down"), (10, "correction_up")):
        tensors[name] = values((case.rank, case.hidden), case.dtype, seed) if corrected else None
    usable = case.n == 0 or case.clusters > 0
    usable = usable and (tensors["router_down"] is None or case.rank > 0)

    def operation(*arguments):
        *first, correction_down, correction_up, activation = arguments
        return ops.cpu_routed_ffn(
            *first, activation, correction_down=correction_down, correction_up=correction_up
        )

    y = case.call(operation, tensors, usable=usable, with_activation=True)
    if y is None:
        assert torch.equal(counts, torch.arange(case.clusters)), "a rejected call has counted"
        return
    router = [tensors[name] for name in ("x", "router_down", "router_up", "router_bias")]
    ids = first_largest(logits(*router)) if len(y) else torch.zeros(0, dtype=torch.int64)
    x, *weights = double(tensors, "x", "w_gate", "w_up", "w_down_t")
    expected = flat_reference(x, *weights, tensors["sets"], ids, case.activation)
    if tensors["cluster_bias"] is not None:
        expected += tensors["cluster_bias"].double()[ids]
    if tensors["correction_up"] is not None:
        expected += x @ tensors["correction_down"].double().t() @ tensors["correction_up"].double()
    case.check(y, expected)
    if counted and not any(name == "cluster_counts" for name, _ in case.spoiled):
        expected_counts = torch.arange(case.clusters) + ids.bincount(minlength=case.clusters)
        assert torch.equal(counts, expected_counts)


@EXAMPLES
@given(data=st.data())
def test_linear(data):
    case = Case(data)
    shapes = {"x": (case.n, case.hidden), "weight": (case.neurons, case.hidden)}
    tensors = {k: values(s, case.dtype, seed) for seed, (k, s) in enumerate(shapes.items())}
    biased = data.draw(st.booleans())
    tensors["bias"] = values((case.neurons,), case.dtype, 2) if biased else None
    y = case.call(ops.cpu_linear, tensors)
    if y is not None:
        x, weight = double(tensors, "x", "weight")
        bias = tensors["bias"]
        case.check(y, x @ weight.t() + (0 if bias is None else bias.double()))


@EXAMPLES
@given(data=st.data())
def test_read(data):
    case = Case(data)
    tensors = {"data": values((case.n * case.hidden,), torch.int64)}
    total = case.call(ops.cpu_read, tensors)
    if total is not None:
        assert total.item() == tensors["data"].sum().item()


def allocated_bytes():
    """Bytes that the process holds, by the sanitizer's or the C library's own count."""
    process = ctypes.CDLL(None)
    if hasattr(process, "__sanitizer_get_current_allocated_bytes"):
        count = process.__sanitizer_get_current_allocated_bytes
        count.restype = ctypes.c_size_t
        return count()

    class Usage(ctypes.Structure):
        _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]

    if not hasattr(process, "mallinfo2"):
        pytest.skip("needs glibc 2.33 or newer")
    process.mallinfo2.restype = Usage
    return process.mallinfo2().field7  # uordblks


def test_calls_leak_nothing():
    """Tensor handles, optional ones and strings belong to the call, also where it fails."""
    x, weight = torch.ones(2, 8), torch.ones(16, 8)
    sets, up = torch.full((3, 2), 255, dtype=torch.uint8), torch.ones(3, 4)
    down, bias, counts = torch.ones(4, 8), torch.ones(3), torch.zeros(3, dtype=torch.int64)
    ids, bad_ids = torch.tensor([0, 2]), torch.tensor([0, 3])
    ffn = (x, weight, weight, weight)

    def calls():
        ops.cpu_sparse_ffn(*ffn, sets, ids, "gelu_tanh")
        ops.cpu_dense_ffn(*ffn, "gelu_tanh")
        ops.cpu_route(x, down, up, bias)
        ops.cpu_routed_ffn(*ffn, sets, down, up, bias, torch.ones(3, 8), counts, "gelu_tanh")
        ops.cpu_linear(x, weight, torch.ones(16))
        ops.cpu_read(ids)
        for wrong in (
            lambda: ops.cpu_sparse_ffn(*ffn, sets, bad_ids, "silu"),
            lambda: ops.cpu_dense_ffn(*ffn, "an unknown name, too long for a short string"),
            lambda: ops.cpu_route(x, down, down, bias),
            lambda: ops.cpu_routed_ffn(*ffn, sets, down, up, up, None, counts, "silu"),
            lambda: ops.cpu_linear(x, weight, bias),
            lambda: ops.cpu_read(x),
            lambda: ops.cpu_force_isa("an unknown name, too long for a short string"),
        ):
            with pytest.raises(REJECTED):
                wrong()

    def growth(rounds):
        before = allocated_bytes()
        for _ in range(rounds):
            calls()
        return allocated_bytes() - before

    growth(50)
    # A leaked string or handle is 32 bytes or more for each of 400 rounds.
    assert min(growth(400) for _ in range(3)) < 400 * 16
