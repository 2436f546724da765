"""sparsify and its exits, on a tiny random Mistral."""

import copy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import IDS, logits, random_cluster_set
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, DynamicCache

from sparse_runtime import (
    ClusterSet,
    SparseConfig,
    cost_report,
    dense,
    reset_cost,
    sparse_modules,
    sparsify,
    unsparsify,
)
from sparse_runtime.errors import (
    AlreadySparseError,
    BackendUnavailableError,
    ConfigError,
    FingerprintMismatchError,
    NothingMatchedError,
    NotSparseError,
    UnsupportedArchitectureError,
)
from sparse_runtime.kernels import backends, load_cpu_library
from sparse_runtime.kernels.bitmaps import set_sizes


def test_unsparsify_restores_bits_and_state_dict(tiny_model):
    before, state = logits(tiny_model), copy.deepcopy(tiny_model.state_dict())
    modules = [name for name, _ in tiny_model.named_modules()]
    strides = [p.stride() for p in tiny_model.parameters()]
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.3))
    sparse_state = tiny_model.state_dict()
    assert list(sparse_state) == list(state)
    assert all(torch.equal(sparse_state[key], state[key]) for key in state)
    unsparsify(tiny_model)
    assert torch.equal(logits(tiny_model), before)
    assert list(tiny_model.state_dict()) == list(state)
    assert [name for name, _ in tiny_model.named_modules()] == modules
    assert [p.stride() for p in tiny_model.parameters()] == strides


def test_sparse_differs_at_real_sparsity_and_matches_at_full_density(tiny_model):
    expected = logits(tiny_model)
    config = SparseConfig(prefill="sparse")
    sparsify(tiny_model, random_cluster_set(tiny_model, 1.0), config=config)
    # Logits of size ~1 through a few float32 sums of ≤ 100 terms: 1e-5 is 80 times the unit roundoff.
    torch.testing.assert_close(logits(tiny_model), expected, atol=1e-5, rtol=0)
    unsparsify(tiny_model)
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.3), config=config)
    assert (logits(tiny_model) - expected).abs().max() > 1e-3


def test_dense_context_restores_after_an_error(tiny_model):
    expected = logits(tiny_model)
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.3), config=SparseConfig(prefill="sparse"))
    sparse = logits(tiny_model)
    compared = []

    def fail_inside():
        with dense(tiny_model):
            compared.append(logits(tiny_model))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    torch.testing.assert_close(compared[0], expected, atol=1e-5, rtol=0)
    assert torch.equal(logits(tiny_model), sparse)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 5},
        {"num_beams": 3},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_generate_runs_sparse(tiny_model, options):
    sparsify(
        tiny_model, random_cluster_set(tiny_model, 0.3), config=SparseConfig(max_sparse_tokens=4)
    )
    reset_cost(tiny_model)
    out = tiny_model.generate(IDS, max_new_tokens=5, min_new_tokens=5, pad_token_id=0, **options)
    report = cost_report(tiny_model)
    assert out.shape[1] == IDS.shape[1] + 5
    layers = len(sparse_modules(tiny_model))
    # The prompt is prefilled densely; each later step routes every sequence (or beam).
    assert report.sparse_tokens == 4 * layers * options.get("num_beams", 1)
    assert report.dense_tokens == IDS.shape[1] * layers * (options.get("num_beams", 1))


def test_padded_batch_generates_what_single_sequences_do(tiny_model):
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.5), config=SparseConfig(prefill="sparse"))
    short = torch.tensor([[4, 8, 6]])
    batch = torch.cat([IDS, torch.cat([torch.zeros(1, 3, dtype=torch.int64), short], 1)])
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    together = tiny_model.generate(batch, attention_mask=mask, **options)[:, 6:]
    alone = [tiny_model.generate(ids, **options)[0, ids.shape[1] :] for ids in (IDS, short)]
    assert torch.equal(together, torch.stack(alone))


def test_cost_share_is_counted_from_the_sets(tiny_model):
    clusters = random_cluster_set(tiny_model, 0.3)
    sparsify(tiny_model, clusters, config=SparseConfig(prefill="sparse"))
    logits(tiny_model)
    report = cost_report(tiny_model)
    expected = tokens = 0
    for module in sparse_modules(tiny_model):
        hidden, neurons = module.cost.hidden_size, module.cost.intermediate_size
        router = sum(
            t.numel()
            for t in (module.router.down, module.router.up, module.router.bias)
            if t is not None
        )
        sizes = set_sizes(module.tables.active_sets).tolist()
        for cluster, count in enumerate(module.cluster_counts.tolist()):
            rows = sizes[cluster]
            expected += count * ((rows * 3 * hidden + router) * 4 + (neurons + 7) // 8)
            tokens += count
    assert tokens == IDS.numel() * len(sparse_modules(tiny_model)) == report.sparse_tokens
    assert report.cost_share == pytest.approx(expected / (tokens * 3 * hidden * neurons * 4))
    reset_cost(tiny_model)
    assert cost_report(tiny_model).sparse_tokens == 0


def test_save_pretrained_while_sparse_writes_the_dense_model(tiny_model, tmp_path):
    expected, state = logits(tiny_model), copy.deepcopy(tiny_model.state_dict())
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.3))
    tiny_model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert set(loaded.state_dict()) == set(state)
    assert torch.equal(logits(loaded), expected)


def test_load_state_dict_while_sparse(tiny_model):
    state = copy.deepcopy(tiny_model.state_dict())
    changed = {key: value * 0.5 for key, value in state.items()}
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.3))
    tiny_model.load_state_dict(changed)
    unsparsify(tiny_model)
    assert all(torch.equal(tiny_model.state_dict()[key], changed[key]) for key in state)


def test_survives_deepcopy_and_dtype_change(tiny_model):
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.3), config=SparseConfig(prefill="sparse"))
    copied = copy.deepcopy(tiny_model)
    assert torch.equal(logits(copied), logits(tiny_model))
    reset_cost(tiny_model)
    logits(copied)
    assert cost_report(tiny_model).sparse_tokens == 0
    assert logits(copied.to(torch.bfloat16)).dtype == torch.bfloat16


def test_compiled_decode_does_not_recompile_as_ids_change(tiny_model):
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.5))
    module = sparse_modules(tiny_model)[0]
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(), torch.compiler.set_stance(fail_on_recompile_after(compiled)):
        for _ in range(6):
            x = torch.randn(1, 1, module.cost.hidden_size, generator=generator) * 4
            torch.testing.assert_close(compiled(x), module(x))
    assert int((module.cluster_counts > 0).sum()) > 1


def fail_on_recompile_after(compiled):
    """Compile once in the default stance, then allow no recompilation."""
    with torch.inference_mode():
        compiled(torch.zeros(1, 1, compiled._orig_mod.cost.hidden_size))
    return "fail_on_recompile"


def test_backends_agree_and_count_alike(tiny_model):
    if not load_cpu_library():
        pytest.skip("libsparse_ffn_cpu.so is not built: pip install -e . with a C++ compiler")
    clusters = random_cluster_set(tiny_model, 0.4)
    for layer in clusters.layers.values():
        layer.cluster_bias = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    outputs, counts = [], []
    for backend in ("reference", "cpu"):
        config = SparseConfig(prefill="sparse", backend=backend)
        sparsify(tiny_model, clusters, config=config)
        outputs.append(logits(tiny_model))
        counts.append([module.cluster_counts.tolist() for module in sparse_modules(tiny_model)])
        unsparsify(tiny_model)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
    assert counts[0] == counts[1]
    assert sum(counts[0][0]) == IDS.numel()


def test_options_in_a_dictionary_are_no_config(tiny_model):
    with pytest.raises(ConfigError, match=r"config is a dict; expected a SparseConfig"):
        sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), config={"budget": 0.5})


def test_missing_library_warns_or_raises(tiny_model, monkeypatch):
    monkeypatch.setattr(backends, "load_cpu_library", lambda: False)
    clusters = random_cluster_set(tiny_model, 0.4)
    for config in (SparseConfig(backend="cpu"), SparseConfig(strict=True)):
        with pytest.raises(BackendUnavailableError, match="pip install"):
            sparsify(tiny_model, clusters, config=config)
    with pytest.warns(UserWarning, match="run dense"):
        sparsify(tiny_model, clusters)
    assert {module.backend for module in sparse_modules(tiny_model)} == {"dense"}
    expected = logits(unsparsify(tiny_model))
    with pytest.warns(UserWarning, match="run dense"):
        sparsify(tiny_model, clusters)
    assert torch.equal(logits(tiny_model), expected)
    assert cost_report(tiny_model).sparse_tokens == 0


@pytest.mark.parametrize(
    ("tokens", "path", "compiled"),
    [
        (1, "sparse", False),
        (2, "sparse", False),
        (2, "sparse", True),
        (3, "rows", False),
        (3, "rows", True),
        (16, "rows", False),
        (17, "dense", False),
        (17, "dense", True),
    ],
)
def test_what_a_call_does_follows_its_number_of_tokens(tiny_model, tokens, path, compiled):
    if not load_cpu_library():
        pytest.skip("libsparse_ffn_cpu.so is not built")
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4))
    (ffn, *_) = sparse_modules(tiny_model)
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(0))
    call = torch.compile(ffn, fullgraph=True, backend="eager") if compiled else ffn
    with torch.inference_mode():
        alone = {"sparse": ffn.sparse, "rows": ffn.all_rows, "dense": ffn.dense}[path](x)
        reset_cost(tiny_model)
        assert torch.equal(call(x), alone)
    report = cost_report(tiny_model)
    assert report.sparse_tokens == (tokens if path == "sparse" else 0)
    assert report.dense_reasons == ({} if path == "sparse" else {"long call": tokens})


def test_rule_can_be_set_and_is_shown(tiny_model):
    clusters = random_cluster_set(tiny_model, 0.4)
    for options, text in (
        ({}, "calls of ≤ 2 tokens sparse, longer ones dense"),
        ({"max_sparse_tokens": 1}, "calls of 1 token sparse, longer ones dense"),
        ({"prefill": "sparse"}, "every call sparse"),
    ):
        sparsify(tiny_model, clusters, **options)
        assert text in repr(tiny_model)
        unsparsify(tiny_model)


def test_without_looks_calls_of_any_size_agree(tiny_model):
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), prefill="sparse")
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(3))
    whole = logits(tiny_model, ids)
    with torch.inference_mode():
        for size in (1, 5, 7):
            cache, parts = DynamicCache(config=tiny_model.config), []
            for part in ids.split(size, dim=1):
                parts.append(tiny_model(input_ids=part, past_key_values=cache).logits)
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=0)


def test_first_call_of_a_size_measures_nothing(tiny_model, monkeypatch):
    """No clock decides what is computed: a call never times, and never touches the disk."""
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4))
    for clock in ("perf_counter", "monotonic", "time"):
        monkeypatch.setattr(f"time.{clock}", None)
    for size in (1, 2, 3, 9, 40):
        with torch.inference_mode():
            sparse_modules(tiny_model)[0](torch.ones(size, 32))
    assert cost_report(tiny_model).sparse_tokens == 3


def test_scoring_with_a_default_model_says_that_it_ran_dense(tiny_model, recwarn):
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4))
    prompt = IDS.repeat(1, 5)
    for _ in range(4):
        tiny_model.generate(prompt, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    assert not [w for w in recwarn if "ran dense" in str(w.message)]
    for _ in range(5):
        logits(tiny_model, prompt)
    (found,) = [str(w.message) for w in recwarn if "ran dense" in str(w.message)]
    assert 'prefill="sparse"' in found


def test_unsparsify_leaves_nothing_behind(tiny_model):
    def traces():
        return [
            (
                type(m),
                *(sorted(part) for part in (m.__dict__, m._modules, m._buffers)),
                *(len(m.__dict__[name]) for name in m.__dict__ if name.endswith("hooks")),
            )
            for m in tiny_model.modules()
        ]

    before = traces()
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.5), fast_linear=True)
    assert traces() != before
    unsparsify(tiny_model)
    assert traces() == before


def test_unknown_option(tiny_model):
    with pytest.raises(ConfigError, match=r"'prefil' is not known.*'prefill'"):
        sparsify(tiny_model, random_cluster_set(tiny_model, 0.5), prefil="sparse")


def test_sparsify_twice(tiny_model):
    clusters = random_cluster_set(tiny_model, 0.3)
    sparsify(tiny_model, clusters)
    with pytest.raises(AlreadySparseError, match="unsparsify"):
        sparsify(tiny_model, clusters)


@pytest.mark.parametrize(
    "call", [unsparsify, cost_report, reset_cost, lambda m: dense(m).__enter__()]
)
def test_dense_model_where_a_sparse_one_is_needed(tiny_model, call):
    with pytest.raises(NotSparseError, match="sparsify"):
        call(tiny_model)


def test_other_model_is_refused_and_left_alone(tiny_model):
    clusters = random_cluster_set(tiny_model, 0.3)
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(FingerprintMismatchError, match=r"64 of 576 .* up projection of layer 1"):
        sparsify(tiny_model, clusters)
    clusters.fingerprint["hidden_size"] += 1
    with pytest.raises(FingerprintMismatchError, match="hidden_size"):
        sparsify(tiny_model, clusters)
    with pytest.raises(NotSparseError):
        unsparsify(tiny_model)


def test_fingerprint_survives_rounding_to_bfloat16(tiny_model):
    clusters = random_cluster_set(tiny_model, 0.3)
    sparsify(tiny_model.to(torch.bfloat16), clusters)


def test_no_layer_matched(tiny_model):
    clusters = random_cluster_set(tiny_model, 0.3)
    shifted = {index + 100: layer for index, layer in clusters.layers.items()}
    with pytest.raises(NothingMatchedError, match="layers"):
        sparsify(tiny_model, ClusterSet(shifted, clusters.fingerprint, 0.3))


def test_a_model_without_an_ffn(tiny_model):
    sizes = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 16}
    bert = BertLMHeadModel(
        BertConfig(num_hidden_layers=1, num_attention_heads=2, is_decoder=True, **sizes)
    )
    with pytest.raises(
        NothingMatchedError, match=r"BertLMHeadModel \(model type 'bert'\) holds an FFN"
    ):
        sparsify(bert, random_cluster_set(tiny_model, 0.3))


def test_ffn_without_the_expected_linears(tiny_model):
    clusters = random_cluster_set(tiny_model, 0.3)
    for layer in tiny_model.model.layers:
        del layer.mlp.gate_proj
    what = r"layers.0.mlp: .*MistralMLP does not compute .* with up_proj \[44, 32\], .*raises Attr"
    with pytest.raises(UnsupportedArchitectureError, match=what):
        sparsify(tiny_model, clusters)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "gpu9"},
        {"backend": ["cpu"]},
        {"prefill": "some"},
        {"max_sparse_tokens": 0},
        {"max_sparse_tokens": 2.0},
        {"max_sparse_tokens": True},
        {"verify": "no"},
        {"budget": True},
        {"budget": float("nan")},
        {"strict": 1},
        {"layer_budgets": {"0": 1.0}},
    ],
    ids=str,
)
def test_config_out_of_range(options):
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        SparseConfig(**options)


def test_a_bound_on_calls_that_are_all_sparse():
    with pytest.raises(
        ConfigError, match="max_sparse_tokens is 1, which has no effect with prefill"
    ):
        SparseConfig(prefill="sparse", max_sparse_tokens=1)
    with pytest.raises(ConfigError, match="has no effect"):
        SparseConfig(max_sparse_tokens=4).with_options({"prefill": "sparse"})


@pytest.mark.slow
def test_resident_memory_grows_by_the_router_only():
    """In a process of its own: sparsify keeps no second copy, nor holes that look like one."""
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from helpers import make_tiny_model
        from helpers import random_cluster_set
        from sparse_runtime import sparsify, unsparsify
        from sparse_runtime.eval.latency.bench import _resident_mib

        model = make_tiny_model(hidden_size=1024, intermediate_size=8192, num_hidden_layers=8)
        clusters = random_cluster_set(model, 0.5)
        before = _resident_mib()
        for _ in range(3):
            sparsify(model, clusters, check_fingerprint=False)
            sparse = _resident_mib()
            unsparsify(model)
        weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        print((sparse - before) / weights)
    """
    folder = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), folder],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(result.stdout) < 0.03
