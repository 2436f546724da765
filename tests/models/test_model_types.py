"""Model types whose FFNs are found by structure, by a tiny model of each."""

import copy

import pytest
import torch
from helpers import IDS, assert_same_state, logits, needs_library, random_cluster_set
from model_types import tiny_model_of_type

from sparse_runtime import ClusterSet, cost_report, dense, reset_cost, sparsify, unsparsify
from sparse_runtime.errors import NothingMatchedError, UnsupportedArchitectureError
from sparse_runtime.ffn.plane_packing import pack_model, unpack_model
from sparse_runtime.models.ffn_layers import find_ffn_layers

GATED = """
cohere cohere2 cwm diffllama doge ernie4_5 evolla exaone4 flint gemma gemma2
gemma3_text granite granite_swa helium hyperclovax internlm3 iquestcoder lfm2 llama minicpm3
ministral3 mistral mllama olmo olmo2 olmo3 qwen2 qwen3 seed_oss smollm3 stablelm vaultgemma
youtu
""".split()  # noqa: SIM905
FUSED = ["glm", "glm4", "modernbert-decoder", "phi3", "phi4_multimodal"]
#: Without a gate, with biases or not.
PLAIN = """
arcee codegen falcon gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj jais2 nanochat nemotron
openai-gpt persimmon phi starcoder2
""".split()  # noqa: SIM905
#: Without a gate, written out in the forward of a larger module.
INLINE = """
bart bigbird_pegasus biogpt blenderbot blenderbot-small bloom marian mbart mpt mvp opt pegasus plbart
trocr whisper xglm xlnet
""".split()  # noqa: SIM905
#: A language model inside of one for images, or more.
WRAPPERS = """
cohere2_vision cosmos3_omni deepseek_vl deepseek_vl_hybrid exaone4_5 gemma3 got_ocr2
granite_docling hyperclovax_vision_v2 idefics2 idefics3 internvl janus lfm2_vl
lighton_ocr llava llava_next llava_next_video llava_onevision mistral3 molmo2
moss_transcribe_diarize muse_glimmer ovis2 paligemma pp_chart2table qianfan_ocr qwen2_5_vl
qwen2_vl qwen3_vl shieldgemma2 smolvlm video_llama_3 video_llava vipllava
""".split()  # noqa: SIM905
#: With layers of experts, some of which have an FFN beside them, or are after layers with one FFN.
EXPERTS = """
afmoe axk1 cohere2_moe deepseek_v3 ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo glm4_moe
glm4_moe_lite granitemoe granitemoe_swa granitemoeshared hy_v3 inkling_mm_model inkling_text kimi_k25
kolibri1 laguna mellum mimo_v2_flash minimax minimax_m2 mistral4 mixtral olmoe phimoe qwen2_moe
qwen3_moe qwen3_vl_moe solar_open unlimited_ocr zaya
""".split()  # noqa: SIM905
#: Those with an FFN beside the experts.
SHARED = """
afmoe axk1 deepseek_v3 ernie4_5_moe exaone_moe glm4_moe hy_v3 kolibri1 laguna mistral4 qwen2_moe
solar_open
""".split()  # noqa: SIM905
KINDS = [*GATED, *FUSED, *PLAIN, *INLINE, *WRAPPERS, *EXPERTS]
BIASED = ["gpt_neox", "phi", "starcoder2"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@needs_library
def test_a_model_of_this_type(kind, tmp_path):
    model = tiny_model_of_type(kind)
    layers = find_ffn_layers(model)
    assert {layer.hidden_size for layer in layers} == {32}
    expected = "fused" if kind in FUSED else "plain" if kind in (*PLAIN, *INLINE) else "gated"
    forms = [layer.form.kind for layer in layers]
    if kind in EXPERTS:
        assert set(forms) <= {"experts", "gated"}
        assert "experts" in forms
        assert (kind not in SHARED) or len(layers) > 2
    else:
        assert set(forms) == {expected}
    assert not any("vision" in layer.name for layer in layers)
    before, expected = copy.deepcopy(model), logits(model)
    greedy = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    text = model.generate(IDS, **greedy)

    random_cluster_set(model, 0.4).save_pretrained(tmp_path)
    sparsify(model, ClusterSet.from_pretrained(tmp_path), prefill="sparse")
    reset_cost(model)
    assert (logits(model) - expected).abs().max() > 1e-3
    report = cost_report(model)
    assert report.dense_tokens == 0
    assert report.sparse_tokens == IDS.numel() * len(layers)
    assert 0.3 < report.cost_share < 0.6
    unsparsify(model)
    assert_same_state(model, before)
    assert torch.equal(logits(model), expected)

    sparsify(model, random_cluster_set(model, 1.0), prefill="sparse")
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.generate(IDS, **greedy), text)


@needs_library
@pytest.mark.parametrize("kind", BIASED)
def test_biases_count(kind):
    """Before the activation and after; also those written to later."""
    model = tiny_model_of_type(kind)
    sparsify(model, random_cluster_set(model, 1.0), prefill="sparse")
    for layer in find_ffn_layers(model):
        for linear in layer.linears().values():
            assert linear.bias is not None
            before = logits(model)
            with torch.no_grad():
                linear.bias += torch.randn_like(linear.bias)
            found = logits(model)
            assert (found - before).abs().max() > 1e-2
            with dense(model):
                torch.testing.assert_close(found, logits(model), rtol=1e-3, atol=1e-3)
    linear.bias = None
    with pytest.warns(UserWarning, match="has another bias"):
        found = logits(model)
    with dense(model):
        torch.testing.assert_close(found, logits(model), rtol=1e-3, atol=1e-3)


@needs_library
@pytest.mark.parametrize("kind", ["gpt_neox", "arcee"])
def test_all_rows_of_plain_ffns(kind):
    """A few tokens by the kernels' dense call, without a cluster."""
    model = tiny_model_of_type(kind)
    expected = logits(model)
    sparsify(model, random_cluster_set(model, 0.3))
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


# transformers does not read gpt_neo's shrunk config; transposed matrices are not packed.
@pytest.mark.parametrize(
    "kind",
    [
        *FUSED,
        *sorted({*PLAIN} - {"gpt_neo", "gpt2", "openai-gpt"}),
        *("llava", "gemma3", "qwen2_5_vl"),
    ],
)
def test_planes(kind, tmp_path):
    """Packed, saved and loaded; checkpoints of wrappers have other names than their models."""
    model = tiny_model_of_type(kind)
    before = logits(model)
    packed = pack_model(model, 6)
    found = logits(packed)
    assert 1e-3 < (found - before).abs().max() < 0.5 * before.abs().max()
    packed.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_state(loaded, packed)
    assert torch.equal(logits(loaded), found)
    torch.testing.assert_close(logits(unpack_model(packed)), found, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "gpt_oss",
            r"mlp.experts \(GptOssExperts\) holds experts of another kind .* its parameters are",
        ),
        ("bert", r"holds an FFN: .*linear layers.* \(the nearest is .*\(BertOutput\)"),
        ("kosmos-2", r"Kosmos2TextFFN does not .*raises .*has ffn_layernorm \(LayerNorm\)"),
        ("bitnet", r"BitNetMLP does not .*it raises .*Beside its projections it has ffn_sub_norm"),
    ],
)
def test_what_cannot_run(kind, reason):
    with pytest.raises((UnsupportedArchitectureError, NothingMatchedError), match=reason):
        find_ffn_layers(tiny_model_of_type(kind))


class Adapter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = torch.nn.Linear(32, 4), torch.nn.Linear(4, 32)

    def forward(self, x):
        return self.up(torch.relu(self.down(x)))


def test_a_narrow_adapter_is_no_ffn():
    model = tiny_model_of_type("qwen3")
    for layer in model.model.layers:
        layer.adapter = Adapter()
    assert [layer.name for layer in find_ffn_layers(model)] == [
        f"model.layers.{i}.mlp" for i in (0, 1)
    ]
    model.model.layers[1].other_mlp = copy.deepcopy(model.model.layers[1].mlp)
    with pytest.raises(UnsupportedArchitectureError, match=r"holds 2 FFNs .*layers.1.other_mlp"):
        find_ffn_layers(model)


def test_a_module_of_many_linear_layers_is_passed_over():
    model = tiny_model_of_type("qwen3")
    many = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(14))
    model.model.layers[0].many = torch.nn.ModuleDict({str(i): m for i, m in enumerate(many)})
    assert len(find_ffn_layers(model)) == 2  # and at once: 14 layers have 87 billion orders


def test_names_and_order_do_not_matter():
    """gate and up the other way round in the module, under other names."""
    model = tiny_model_of_type("qwen3")
    mlp = model.model.layers[0].mlp

    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.a, self.b = mlp.down_proj, mlp.up_proj, mlp.gate_proj

        def forward(self, states):
            return self.out(self.a(states) * torch.nn.functional.silu(self.b(states)))

    model.model.layers[0].mlp = Mine()
    found = find_ffn_layers(model)[0]
    assert found.projections == ("b", "a", "out")
    assert found.activation == "silu"
    assert found.gate is mlp.gate_proj
