"""A model in planes by the Triton backend: beside the reference, compiled, where it cannot run."""

import math

import pytest
import torch
from helpers import make_tiny_model, random_cluster_set

from sparse_runtime import (
    cost_report,
    dense,
    reset_cost,
    sparse_modules,
    sparsify,
    unsparsify,
)
from sparse_runtime.errors import BackendUnavailableError
from sparse_runtime.eval.latency.shapes import random_clusters
from sparse_runtime.ffn.plane_modules import PlaneLinear
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.kernels import backends, plane_op
from sparse_runtime.kernels.plane_op import dense_plane_ffn, plane_linear
from sparse_runtime.kernels.planes import PlaneFormat

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_ffn = pytest.importorskip("sparse_runtime.kernels.triton.ffn")
if DEVICE == "cpu" and not triton_ffn.INTERPRETED:
    pytest.skip("no GPU, and TRITON_INTERPRET was not set", allow_module_level=True)

IDS = torch.randint(0, 250, (2, 6), generator=torch.Generator().manual_seed(0)).to(DEVICE)
EVERY = {"prefill": "sparse"}
# What makes planes rather than runs models of them.
MAKING = ("sparse_runtime.cpu_round_rows", "sparse_runtime.cpu_pack_plane")


@pytest.fixture(autouse=True)
def resolved_anew():
    """What runs where is remembered."""
    plane_op._resolved.cache_clear()
    yield
    plane_op._resolved.cache_clear()


@pytest.fixture
def called(monkeypatch):
    """Names of the operations over planes that ran, the most recent last."""
    names = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function).removesuffix(".default")
            if name.startswith("sparse_runtime.") and name not in MAKING:
                names.append(name.removeprefix("sparse_runtime."))
            return function(*args, **(kwargs or {}))

    with Spy():
        yield names


def tiny():
    return make_tiny_model(num_hidden_layers=1).to(DEVICE)


def clusters_with_looks():
    """Every neuron a candidate of some clusters, half of them counted for normal hidden states."""
    return random_clusters(tiny(), density=0.7, looked=0.6, confirmed=0.5, num_clusters=6, rank=4)


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids).logits


def counts(model):
    return [
        (module.cluster_counts.tolist(), module.row_counts.tolist())
        for module in sparse_modules(model)
    ]


def sparse(backend, bits, **options):
    return sparsify(tiny(), clusters_with_looks(), weights=bits, backend=backend, **options)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize(
    ("tau", "ramp"), [(1.0, 0.0), (3.0, 0.5), (math.inf, 0.0)], ids=["full", "ramp", "base"]
)
def test_agrees_with_the_reference(bits, tau, ramp):
    options = {"tau": tau, "ramp": ramp, **EVERY}
    found, expected = sparse("triton", bits, **options), sparse("reference", bits, **options)
    assert {module.backend for module in sparse_modules(found)} == {"triton"}
    for ids in (IDS, IDS[:1, :1]):
        torch.testing.assert_close(logits(found, ids), logits(expected, ids), atol=1e-4, rtol=1e-4)
        assert counts(found) == counts(expected)
    counted, looked, refined = torch.tensor([rows for _, rows in counts(found)]).sum(0).tolist()
    assert 0 < counted < looked
    assert refined == {1.0: counted, math.inf: 0}.get(tau, refined)
    if tau == 3:
        assert 0 < refined < counted
    with dense(found):
        assert not torch.allclose(logits(found), logits(expected), atol=1e-2)


@pytest.mark.parametrize("bits", [4, 5])
def test_without_factors_candidates_are_refined_whole(bits):
    clusters = random_cluster_set(tiny(), 0.4)
    found, expected = (
        sparsify(tiny(), clusters, weights=bits, backend=backend, **EVERY)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(logits(found), logits(expected), atol=1e-4, rtol=1e-4)
    assert counts(found) == counts(expected)


def test_clusters_that_are_given():
    """Instead of the router's, as in evaluations."""
    found, expected = sparse("triton", 6, **EVERY), sparse("reference", 6, **EVERY)
    outputs = []
    for model in (found, expected):
        (module,) = sparse_modules(model)
        with module.swapped(route=lambda x: torch.arange(len(x), device=x.device) % 5):
            outputs.append(logits(model))
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)
    assert counts(found) == counts(expected)
    assert counts(found)[0][0] == [3, 3, 2, 2, 2, 0]
    assert not torch.allclose(outputs[0], logits(found), atol=1e-2)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("tokens", [1, 12, 40], ids=["one", "few", "many"])
def test_dense_is_all_neurons(bits, tokens, called):
    """Few tokens by kernels, many by unpacked rows: never by the reference."""
    model = sparse("triton", bits, **EVERY)
    ids = torch.arange(tokens, device=DEVICE).reshape(1, tokens)
    with dense(model):
        found = logits(model, ids)
    few = tokens <= plane_op.MAX_KERNEL_TOKENS["triton"]
    wanted = "triton_dense_plane_ffn" if few else "triton_plane_values"
    assert set(called) == {wanted}
    with pytest.warns(UserWarning, match="packed values"):
        unsparsify(model)
    torch.testing.assert_close(found, logits(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", [PlaneFormat(3), PlaneFormat(3, 2), PlaneFormat(4, 4)], ids=str)
@pytest.mark.parametrize("n", [0, 1, 16, 17])
def test_linear_layers(form, n, called):
    generator = torch.Generator().manual_seed(1)
    linear = torch.nn.Linear(200, 70)
    layer = PlaneLinear.from_linear(linear, form).to(DEVICE)
    x = torch.randn(n, 200, generator=generator).to(DEVICE)
    with torch.no_grad():
        expected = layer.to_linear()(x)
        del called[:]
        found = plane_linear(x, layer.planes, form, layer.bias, backend="triton")
        # Every other row: what is no row of its own is copied.
        twice = x.repeat_interleave(2, dim=1)[:, ::2]
        again = plane_linear(twice, layer.planes, form, layer.bias, backend="triton")
    assert set(called) == {"triton_plane_linear" if n <= 16 else "triton_plane_values"}
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(again, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    model = pack_model(tiny().to(dtype), 6)
    planes = model.model.layers[0].mlp.planes
    for n in (1, 5, 30):
        x = torch.randn(n, 32, generator=torch.Generator().manual_seed(n)).to(DEVICE, dtype)
        found = dense_plane_ffn(x, planes, backend="triton")
        expected = dense_plane_ffn(x.float(), planes, backend="reference")
        assert found.dtype == dtype
        assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("n", [1, 16, 40])
def test_all_rows_in_a_graph(n):
    """Calls by kernels and by unpacked rows can be captured, and follow what changes after that."""
    model = pack_model(tiny().bfloat16(), 6, linears=8)
    ffn, linear = model.model.layers[0].mlp, model.model.layers[0].self_attn.q_proj
    x = torch.randn(n, 32, device=DEVICE, dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            ffn(x), linear(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = ffn(x), linear(x)
        for seed in range(3):
            x.copy_(torch.randn(n, 32, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            for found, module in zip(captured, (ffn, linear), strict=True):
                assert found.any()
                assert torch.equal(found, module(x))


def test_generates_and_counts():
    model = sparse("triton", 5)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 258}
    prompt = torch.randint(0, 250, (1, 20), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    tokens = model.generate(prompt, **options)
    report = cost_report(model)
    assert (report.sparse_tokens, report.dense_tokens) == (3, 20)
    other = sparse("reference", 5, max_sparse_tokens=8)
    assert torch.equal(other.generate(prompt, **options), tokens)
    assert counts(other) == counts(model)


def test_compiles_as_one_graph():
    """No break, and no second compilation as clusters change."""
    model = tiny()
    clusters = random_clusters(model, density=0.7, looked=0.6, num_clusters=6, rank=4)
    sparsify(model, clusters, weights=6, linear_weights=8, backend="triton", tau=2.0)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    seen = set()
    for token in (3, 50, 120, 200):
        ids = torch.tensor([[token]], device=DEVICE)
        expected = logits(model, ids)
        reset_cost(model)
        with torch.inference_mode():
            found = compiled(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        seen |= {tuple(module.cluster_counts.tolist()) for module in sparse_modules(model)}
        assert cost_report(model).sparse_tokens == 1
    assert len(graphs) == 1
    assert "triton_plane_ffn" in graphs[0].code
    assert len(seen) > 1
    torch._dynamo.reset()


@pytest.mark.parametrize("tokens", [4, 30], ids=["few", "many"])
def test_dense_calls_compile(tokens):
    model = tiny()
    clusters = random_cluster_set(model, 0.4)
    sparsify(model, clusters, weights=6, backend="triton", max_sparse_tokens=1)
    ids = torch.arange(tokens, device=DEVICE).reshape(1, tokens)
    expected = logits(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        found = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_a_packed_model_takes_the_kernels_of_its_device(monkeypatch, called):
    """Nobody names a backend there."""
    model = pack_model(tiny(), 6, linears=8)
    if DEVICE == "cpu":  # as if it were a GPU
        monkeypatch.setattr(plane_op, "_resolved", lambda *asked: "triton")
    found = logits(model, IDS[:1])
    assert set(called) == {"triton_plane_linear", "triton_dense_plane_ffn"}
    monkeypatch.setattr(plane_op, "_resolved", lambda *asked: "reference")
    del called[:]
    torch.testing.assert_close(found, logits(model, IDS[:1]), atol=1e-4, rtol=1e-4)
    assert not called


def test_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(triton_ffn, "INTERPRETED", False)
    with pytest.raises(BackendUnavailableError, match="on cpu; the Triton kernels need a GPU"):
        sparsify(tiny().cpu(), clusters_with_looks(), weights=6, backend="triton")
    layer = PlaneLinear.from_linear(torch.nn.Linear(64, 8), PlaneFormat(4))
    x = torch.ones(1, 64)
    with pytest.raises(BackendUnavailableError, match="on cpu; the Triton kernels need a GPU"):
        plane_linear(x, layer.planes, layer.format, backend="triton")
    with pytest.raises(BackendUnavailableError, match=r"torch.float64; the kernels take"):
        plane_linear(x.double(), layer.planes, layer.format, backend="cpu")
    card = torch.device("cuda", 0)

    def missing(name):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(backends.importlib, "import_module", missing)
    with pytest.warns(UserWarning, match="unpacked in each call: .* Triton cannot be imported"):
        assert plane_op._resolved("auto", card, torch.bfloat16) == "reference"


def test_without_the_library_it_says_so(monkeypatch):
    monkeypatch.setattr(backends, "load_cpu_library", lambda: False)
    layer = PlaneLinear.from_linear(torch.nn.Linear(64, 8, bias=False), PlaneFormat(4))
    x = torch.ones(1, 64)
    with pytest.warns(UserWarning, match=r"unpacked in each call: .*libsparse_ffn_cpu.so is not"):
        found = layer(x)
    torch.testing.assert_close(found, layer.to_linear()(x))
