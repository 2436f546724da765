"""Model types whose FFNs are found by structure, by a tiny model of each."""

import copy

import pytest
import torch
from helpers import IDS, assert_same_state, logits, needs_library, random_cluster_set
from model_types import tiny_model_of_type

from sparse_runtime import ClusterSet, cost_report, reset_cost, sparsify, unsparsify
from sparse_runtime.models.ffn_layers import find_ffn_layers

GATED = """
cohere cohere2 cwm deepseek_v3 diffllama doge ernie4_5 evolla exaone4 flint gemma gemma2
gemma3_text granite granite_swa helium hyperclovax internlm3 iquestcoder lfm2 llama minicpm3
ministral3 mistral mllama olmo olmo2 olmo3 qwen2 qwen3 seed_oss smollm3 stablelm vaultgemma
youtu
""".split()  # noqa: SIM905
FUSED = ["glm", "glm4", "phi3", "phi4_multimodal"]
#: A language model inside of one for images, or more.
WRAPPERS = """
cohere2_vision cosmos3_omni deepseek_vl deepseek_vl_hybrid exaone4_5 gemma3 got_ocr2
granite_docling hyperclovax_vision_v2 idefics2 idefics3 internvl janus kimi_k25 lfm2_vl
lighton_ocr llava llava_next llava_next_video llava_onevision mistral3 molmo2
moss_transcribe_diarize muse_glimmer ovis2 paligemma pp_chart2table qianfan_ocr qwen2_5_vl
qwen2_vl qwen3_vl shieldgemma2 smolvlm video_llama_3 video_llava vipllava
""".split()  # noqa: SIM905
KINDS = [*GATED, *FUSED, *WRAPPERS]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@needs_library
def test_a_model_of_this_type(kind, tmp_path):
    model = tiny_model_of_type(kind)
    layers = find_ffn_layers(model)
    assert {layer.hidden_size for layer in layers} == {32}
    assert len(layers[0].projections) == (2 if kind in FUSED else 3)
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
