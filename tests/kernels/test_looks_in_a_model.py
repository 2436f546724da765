"""Looks within a model: factors stay in float32, and bytes looked at are paid for."""

import pytest
import torch
from helpers import cuttable_cluster_set

from sparse_runtime import SparseConfig, cost_report, recut, reset_cost, sparse_modules, sparsify
from sparse_runtime.kernels import load_cpu_library
from sparse_runtime.kernels.bitmaps import unpack_bits

BACKENDS = ["reference", *(["cpu"] if load_cpu_library() else [])]
IDS = torch.randint(0, 250, (1, 5), generator=torch.Generator().manual_seed(0))


def sparse(model, backend):
    clusters = recut(model, cuttable_cluster_set(model), budget=0.5, verify=True)
    sparsify(model, clusters, config=SparseConfig(backend=backend, prefill="sparse"))
    return clusters


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [torch.nn.Module.bfloat16, torch.nn.Module.half])
def test_factors_stay_in_float32(tiny_model, backend, change):
    """The kernels refuse others; a look of a model in 16 bits decides by factors in 32."""
    clusters = sparse(tiny_model, backend)
    change(tiny_model)
    for index, module in enumerate(sparse_modules(tiny_model)):
        assert module.tables.factors.dtype == torch.float32
        assert module.router.up.dtype != torch.float32
        torch.testing.assert_close(
            module.tables.factors, clusters.layers[index].factors, rtol=0, atol=0
        )
    with torch.inference_mode():
        assert tiny_model(IDS).logits.isfinite().all()
    assert all(module.row_counts.all() for module in sparse_modules(tiny_model))


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_do_not_depend_on_batching(tiny_model, backend):
    """One call and calls of three tokens read the same neurons, and give the same logits."""
    sparse(tiny_model, backend)
    ids = torch.randint(0, 250, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        together = tiny_model(ids).logits
        counts = torch.stack([module.row_counts for module in sparse_modules(tiny_model)])
        reset_cost(tiny_model)
        cache, parts = None, []
        for part in ids.split(3, dim=1):
            output = tiny_model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert torch.equal(
        torch.stack([module.row_counts for module in sparse_modules(tiny_model)]), counts
    )
    torch.testing.assert_close(torch.cat(parts, dim=1), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_looks_are_paid_for(tiny_model, backend):
    """Counted by hand: each looked-at neuron reads its record, whether it is confirmed or not."""
    clusters = sparse(tiny_model, backend)
    reset_cost(tiny_model)
    inputs = {}
    for index, module in enumerate(sparse_modules(tiny_model)):
        module.register_forward_pre_hook(
            lambda _, args, index=index: inputs.__setitem__(index, args[0].reshape(-1, 32))
        )
    with torch.inference_mode():
        tiny_model(IDS)
    total = 0
    for index, module in enumerate(sparse_modules(tiny_model)):
        layer = clusters.layers[index]
        with torch.inference_mode():
            ids = module.cluster_ids(inputs[index])
        sure, maybe = (unpack_bits(sets[ids], 44) for sets in (layer.active_sets, layer.maybe_sets))
        looked = int((maybe & ~sure).sum())
        computed = int(module.row_counts[0])
        assert module.row_counts[1] == looked > 0
        assert int(sure.sum()) <= computed <= int((sure | maybe).sum())
        neuron, record = 3 * 32 * 4, 68  # bytes: float32, and one group of 64
        rows = computed * neuron + looked * record
        total += rows + len(ids) * module.cost.overhead_bytes
    assert cost_report(tiny_model).sparse_bytes == pytest.approx(total)
