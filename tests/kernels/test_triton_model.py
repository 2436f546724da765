"""A whole model by the Triton backend: beside the reference, compiled, and where it cannot run."""

import pytest
import torch
from helpers import cuttable_cluster_set, make_tiny_model, random_cluster_set

from sparse_runtime import (
    SparseConfig,
    cost_report,
    dense,
    recut,
    reset_cost,
    sparse_modules,
    sparsify,
    unsparsify,
)
from sparse_runtime.errors import BackendUnavailableError
from sparse_runtime.kernels import backends

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_ffn = pytest.importorskip("sparse_runtime.kernels.triton.ffn")
if DEVICE == "cpu" and not triton_ffn.INTERPRETED:
    pytest.skip("no GPU, and TRITON_INTERPRET was not set", allow_module_level=True)

IDS = torch.randint(0, 250, (2, 6), generator=torch.Generator().manual_seed(0)).to(DEVICE)
EVERY = {"prefill": "sparse"}


@pytest.fixture
def model(tiny_model):
    return tiny_model.to(DEVICE)


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("ids", [IDS, IDS[:1, :1]], ids=["several", "one"])
def test_agrees_with_the_reference(model, verify, ids):
    clusters = recut(model, cuttable_cluster_set(model), budget=0.5, verify=verify)
    found, counts = {}, {}
    for backend in ("triton", "reference"):
        sparsify(model, clusters, config=SparseConfig(backend=backend, **EVERY))
        assert {module.backend for module in sparse_modules(model)} == {backend}
        found[backend] = logits(model, ids)
        counts[backend] = [
            (module.cluster_counts.tolist(), module.row_counts.tolist())
            for module in sparse_modules(model)
        ]
        unsparsify(model)
    torch.testing.assert_close(found["triton"], found["reference"], atol=1e-4, rtol=1e-4)
    assert counts["triton"] == counts["reference"]
    assert not torch.allclose(found["triton"], logits(model, ids), atol=1e-2)


def test_generates_and_counts(model):
    sparsify(model, random_cluster_set(model, 0.4), backend="triton")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 258}
    prompt = torch.randint(0, 250, (1, 20), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    tokens = model.generate(prompt, **options)
    report = cost_report(model)
    # A prompt of 20 tokens is beyond the default's limit and dense; three steps are sparse.
    assert (report.sparse_tokens, report.dense_tokens) == (3 * 3, 20 * 3)
    unsparsify(model)
    sparsify(model, random_cluster_set(model, 0.4), backend="reference", max_sparse_tokens=8)
    assert torch.equal(model.generate(prompt, **options), tokens)
    reset_cost(model)
    with dense(model):
        assert not torch.equal(model.generate(prompt, **options), tokens)
    assert cost_report(model).sparse_tokens == 0


@pytest.mark.parametrize("verify", [False, True])
def test_compiles_as_one_graph(verify):
    """No break, and no second compilation as clusters change."""
    model = make_tiny_model(num_hidden_layers=1).to(DEVICE)
    sparsify(
        model,
        recut(model, cuttable_cluster_set(model), budget=0.5, verify=verify),
        backend="triton",
    )
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
    assert len(seen) > 1


def test_counters_follow_the_model(model):
    """A copy has counters of its own: two may run at once."""
    import copy

    sparsify(model, random_cluster_set(model, 0.4), backend="triton", **EVERY)
    other = copy.deepcopy(model)
    assert torch.equal(logits(model), logits(other))
    a, b = (sparse_modules(m)[0].counters.programs for m in (model, other))
    assert a.data_ptr() != b.data_ptr()
    assert not a.any()
    assert not [key for key in model.state_dict() if "counters" in key]


def test_where_it_cannot_run(tiny_model, monkeypatch):
    device, dtype = torch.device("cuda", 0), torch.float32
    monkeypatch.setattr(triton_ffn, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.raises(BackendUnavailableError, match=r"compute capability 6.1; .* need 7.0"):
        backends.resolve_backend("triton", device, dtype, strict=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backends.resolve_backend("auto", device, dtype, strict=True) == "triton"
    with pytest.raises(
        BackendUnavailableError, match="on cuda:0; the CPU kernels need them on the"
    ):
        backends.resolve_backend("cpu", device, dtype, strict=False)
    with pytest.raises(BackendUnavailableError, match="on cpu; the Triton kernels need a GPU"):
        sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), backend="triton")

    def missing(name):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(backends.importlib, "import_module", missing)
    with pytest.warns(UserWarning, match="run dense: Triton cannot be imported .* pip install"):
        assert backends.resolve_backend("auto", device, dtype, strict=False) == "dense"
    with pytest.raises(BackendUnavailableError, match=r"torch.float64; the kernels take bfl"):
        backends.resolve_backend("auto", device, torch.float64, strict=True)
