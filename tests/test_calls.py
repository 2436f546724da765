"""A sparse call is a function of its input and the model: masks, threads, gradients, modes."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from helpers import IDS, logits, make_tiny_model, needs_library, random_cluster_set
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache, StaticCache

from sparse_runtime import cost_report, dense, reset_cost, sparse_modules, sparsify, unsparsify
from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.latency.shapes import random_clusters, random_model
from sparse_runtime.kernels import backends

pytestmark = needs_library
BATCH = torch.tensor([[0, 0, 0, 4, 8, 6], [5, 9, 2, 7, 1, 3]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])


# Masks


def test_a_padded_call_leaves_no_trace(sparse_model):
    hidden = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        calls = {
            "decoder": lambda: sparse_model.model(input_ids=BATCH.flip(0)).last_hidden_state,
            "get_decoder": lambda: sparse_model.get_decoder()(input_ids=IDS).last_hidden_state,
            "ffn": lambda: sparse_model.model.layers[0].mlp(hidden),
        }
        before = {name: call() for name, call in calls.items()}
        logits(sparse_model, BATCH, attention_mask=MASK)
        for name, call in calls.items():
            assert torch.equal(call(), before[name]), name


@pytest.mark.parametrize(
    "mask",
    [MASK.bool(), MASK.float(), None],
    ids=["bool", "float", "positional"],
)
def test_masks_of_any_form_mean_the_same(sparse_model, mask):
    expected = logits(sparse_model, BATCH, attention_mask=MASK)
    with torch.inference_mode():
        if mask is None:
            found = sparse_model(BATCH, MASK).logits
        else:
            found = sparse_model(input_ids=BATCH, attention_mask=mask).logits
    real = MASK.bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)


def test_a_mask_as_long_as_a_static_cache(sparse_model):
    expected = logits(sparse_model, IDS)
    long = torch.cat([torch.ones_like(IDS), torch.zeros(1, 10, dtype=torch.int64)], 1)
    for mask in (None, torch.ones_like(IDS), long):
        cache = StaticCache(config=sparse_model.config, max_cache_len=16)
        found = logits(sparse_model, IDS, attention_mask=mask, past_key_values=cache)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_padding_does_not_change_the_tokens_beside_it(sparse_model):
    found = logits(sparse_model, BATCH, attention_mask=MASK, position_ids=MASK.cumsum(1) - MASK)
    alone = logits(sparse_model, BATCH[:1, 3:])
    torch.testing.assert_close(found[:1, 3:], alone, atol=1e-5, rtol=0)


# Autograd, autocast, inference mode


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_sparsify_inside_any_mode(tiny_model, inside):
    clusters = random_cluster_set(tiny_model, 0.3)
    expected = copy.deepcopy(sparsify(tiny_model, clusters, prefill="sparse"))
    unsparsify(tiny_model)
    with inside():
        sparsify(tiny_model, clusters, prefill="sparse")
    assert not any(t.is_inference() for t in [*tiny_model.parameters(), *tiny_model.buffers()])
    with torch.no_grad():
        assert torch.equal(tiny_model(input_ids=IDS).logits, logits(expected))
    with inside():
        unsparsify(tiny_model)
    tiny_model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in tiny_model.parameters())


def test_autocast_of_a_model_with_float32_norms():
    model = make_tiny_model().to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model)
        sparsify(model, random_cluster_set(model, 1.0), prefill="sparse", fast_linear=True)
        found = logits(model)
    assert cost_report(model).dense_tokens == 0
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)


def test_autocast_of_float32_weights_runs_as_linear_does(tiny_model):
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(tiny_model)
        sparsify(
            tiny_model, random_cluster_set(tiny_model, 0.4), prefill="sparse", fast_linear=True
        )
        assert torch.equal(logits(tiny_model), expected)
    assert cost_report(tiny_model).dense_reasons == {"autocast": 3 * IDS.numel()}


# Dtypes and devices after sparsify


def test_factors_stay_float32_and_costs_follow_the_dtype(tiny_model):
    clusters = random_clusters(tiny_model, density=0.5, looked=0.5, num_clusters=6, rank=4)
    for layer in clusters.layers.values():
        layer.factors *= 1e6  # beyond float16
    sparsify(tiny_model, clusters, prefill="sparse", check_fingerprint=False)
    tiny_model.half()
    for module in sparse_modules(tiny_model):
        assert module.tables.factors.dtype == torch.float32
        assert module.tables.factors.isfinite().all()
        assert torch.equal(module.tables.factors, clusters.layers[module.layer_index].factors)
        assert module.cost.element_size == 2
        assert module.router.up.dtype == torch.float16
    tiny_model.float()
    for module in sparse_modules(tiny_model):
        assert module.cost.element_size == 4
        # Not rounded on the way.
        up = clusters.layers[module.layer_index].router_up
        assert torch.equal(module.router.up, up.float())


def test_another_dtype_chooses_the_backend_anew(tiny_model):
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), prefill="sparse")
    sparse = logits(tiny_model)
    tiny_model.double()
    with pytest.warns(UserWarning, match="float64"):
        logits(tiny_model)
    assert cost_report(tiny_model).dense_tokens > 0
    tiny_model.float()
    reset_cost(tiny_model)
    torch.testing.assert_close(logits(tiny_model), sparse)
    assert cost_report(tiny_model).dense_tokens == 0


# All or nothing, and bit for bit


def test_an_error_in_a_late_layer_leaves_the_model_as_it_was(tiny_model, monkeypatch):
    from sparse_runtime.ffn import sparse_ffn

    before = {name: p.stride() for name, p in tiny_model.named_parameters()}
    kinds = [type(m) for m in tiny_model.modules()]
    adopt, calls = sparse_ffn.SparseFFN.adopt, []

    def fail_third(self):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError("third layer")
        return adopt(self)

    monkeypatch.setattr(sparse_ffn.SparseFFN, "adopt", fail_third)
    with pytest.raises(MemoryError, match="third layer"):
        sparsify(tiny_model, random_cluster_set(tiny_model, 0.4))
    assert {name: p.stride() for name, p in tiny_model.named_parameters()} == before
    assert [type(m) for m in tiny_model.modules()] == kinds


def test_fast_linear_that_matches_nothing_leaves_the_model_as_it_was(tiny_model):
    class Own(nn.Linear):
        pass

    for layer in tiny_model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Own
    for layer in tiny_model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(layer.mlp, name).__class__ = nn.Linear
    with pytest.raises(SparseRuntimeError, match=r"no plain nn.Linear"):
        sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), fast_linear=True)
    assert not list(filter(lambda m: "Sparse" in type(m).__name__, tiny_model.modules()))


def test_the_artifact_stays_its_owner_s(tiny_model):
    clusters = random_cluster_set(tiny_model, 0.4)
    sparsify(tiny_model, clusters, prefill="sparse")
    before = logits(tiny_model)
    for layer in clusters.layers.values():
        layer.active_sets.zero_()
        layer.router_up.zero_()
    assert torch.equal(logits(tiny_model), before)


def test_an_artifact_of_some_layers_says_so(tiny_model):
    clusters = random_cluster_set(tiny_model, 0.4)
    del clusters.layers[1]
    with pytest.warns(UserWarning, match=r"layers \[1\] stay dense"):
        sparsify(tiny_model, clusters)


def test_unsparsify_leaves_what_the_user_made_fast(tiny_model):
    from sparse_runtime import fast_linear
    from sparse_runtime.kernels.linear import FastLinear

    def fast():
        return {n for n, m in tiny_model.named_modules() if type(m) is FastLinear}

    fast_linear(tiny_model)
    before = fast()
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), fast_linear=True)
    unsparsify(tiny_model)
    assert fast() == before != set()


def test_weights_are_put_back_under_an_adapter(tiny_model, tmp_path):
    peft = pytest.importorskip("peft")

    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4))
    for name in ("gate_proj", "down_proj"):
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[name]), tiny_model)
    save_file(tiny_model.state_dict(), tmp_path / "sparse.safetensors")
    unsparsify(tiny_model)
    assert all(weight.is_contiguous() for weight in tiny_model.parameters())


def test_a_replaced_projection_is_put_back(tiny_model):
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), prefill="sparse")
    mlp = tiny_model.model.layers[0].mlp
    before, mlp.down_proj = mlp.down_proj, nn.Linear(44, 32, bias=False)
    logits(tiny_model)
    assert before.weight.is_contiguous()
    assert not mlp.down_proj.weight.is_contiguous()


def test_state_dict_can_be_saved_as_it_is(tiny_model, tmp_path):
    state = copy.deepcopy(tiny_model.state_dict())
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4))
    del state["lm_head.weight"]
    found = tiny_model.state_dict()
    del found["lm_head.weight"]
    save_file(found, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_every_key_leads_to_its_parameter(tiny_model):
    names = [name for name, _ in tiny_model.named_parameters()]
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4))
    assert [name for name, _ in tiny_model.named_parameters()] == names
    assert set(tiny_model.state_dict()) >= set(names)
    for name in names:
        assert tiny_model.get_parameter(name) is dict(tiny_model.named_parameters())[name]
    assert tiny_model.model.layers[0].mlp.gate_proj.in_features == 32


# Generation


@pytest.mark.parametrize("wrap", ["peft", "compile"])
def test_generation_through_a_wrapper(tiny_model, wrap):
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), max_sparse_tokens=4)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = tiny_model.generate(BATCH, attention_mask=MASK, **options)
    if wrap == "peft":
        peft = pytest.importorskip("peft")

        config = peft.LoraConfig(r=2, target_modules=["q_proj"])  # adds nothing yet
        wrapper = peft.get_peft_model(tiny_model, config)
    else:
        wrapper = torch.compile(tiny_model, backend="eager")
    found = wrapper.generate(input_ids=BATCH, attention_mask=MASK, **options)
    assert torch.equal(found, expected)
    unsparsify(wrapper)
    assert not any("sparse" in name for name, _ in wrapper.named_modules())


def test_assisted_decoding_is_lossless_without_looks(tiny_model):
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), prefill="sparse")
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    prompt = IDS.repeat(1, 3)
    plain = tiny_model.generate(prompt, **options)
    assisted = tiny_model.generate(prompt, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(plain, assisted)


def test_a_chunked_prompt_means_what_a_whole_one_does(sparse_model):
    cache = DynamicCache(config=sparse_model.config)
    parts = [logits(sparse_model, part, past_key_values=cache) for part in IDS.split(2, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(sparse_model), atol=1e-5, rtol=0)


# The call itself


def test_arguments_are_those_of_the_ffn(tiny_model):
    mlp = tiny_model.model.layers[0].mlp
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    sparsify(tiny_model, random_cluster_set(tiny_model, 1.0))
    with torch.no_grad():
        assert torch.equal(mlp(x=x), mlp(x))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            mlp(torch.randn(2, 16))
        with pytest.raises(TypeError, match="'x'"):
            mlp(hidden=x)


def test_layers_that_were_copied_apart(sparse_model):
    layers = sparse_model.model.layers
    layers[1] = copy.deepcopy(layers[0])
    with dense(sparse_model):
        logits(sparse_model)
    assert cost_report(sparse_model).dense_reasons["dense()"] == 3 * IDS.numel()
    unsparsify(sparse_model)


def test_each_model_says_that_it_has_no_backend(tiny_model, monkeypatch):
    monkeypatch.setattr(backends, "load_cpu_library", lambda: False)
    for model in (tiny_model, copy.deepcopy(tiny_model)):
        with pytest.warns(UserWarning, match="run dense"):
            sparsify(model, random_cluster_set(model, 0.4))
        assert "every call dense" in str(model)


def test_checks_cost_little():
    """At the demo's size, in CPU time of the calling thread: 4 of 110 µs (docs/compatibility.md)."""
    model = random_model("smollm2-135m", layers=1)
    clusters = random_clusters(model, density=0.5, looked=0.5, num_clusters=256, rank=32)
    (ffn,) = sparse_modules(sparsify(model, clusters))
    x = torch.randn(1, 1, 576).to(model.dtype)

    def seconds(call, repeats):
        times = []
        for _ in range(7):
            started = time.thread_time()
            for _ in range(repeats):
                call()
            times.append((time.thread_time() - started) / repeats)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            assert ffn._is_plain_decode(x)
            checks = seconds(lambda: ffn._is_plain_decode(x), 300)
            whole = seconds(lambda: ffn(x), 100)
    finally:
        torch.set_num_threads(threads)
    assert checks < 0.1 * whole
