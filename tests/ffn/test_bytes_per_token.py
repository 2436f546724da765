"""What a token reads: of the whole model, and of its FFNs in bits per weight."""

import pytest
import torch
from helpers import IDS, logits, make_tiny_model_of, needs_library, random_cluster_set

from sparse_runtime import cost_report, dense, reset_cost, sparse_modules, sparsify
from sparse_runtime.ffn.counts import bytes_per_token, count_cost, read_counts
from sparse_runtime.ffn.plane_packing import pack_model

# Of tiny models: three FFNs and an embedding, in elements.
FFNS, EMBEDDING = 3 * 3 * 32 * 44, 260 * 32
# Gate's and up's, and down's, bytes of all neurons in 6 bits: H = 32 counts as a group of 64.
PLANES_OF_6 = 3 * 44 * 3 * (64 * 6 // 8 + 2)


@pytest.fixture(params=["llama", "mistral", "qwen2"])
def kind(request):
    return request.param


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_model_reads_all_but_the_embedding(kind, tied, dtype):
    model = make_tiny_model_of(kind, tie_word_embeddings=tied).to(dtype)
    elements = sum(parameter.numel() for parameter in model.parameters())
    expected = elements if tied else elements - EMBEDDING
    assert bytes_per_token(model) == expected * dtype.itemsize


@pytest.mark.parametrize("tied", [False, True])
def test_planes_count_as_they_are_stored(kind, tied):
    """A tied head is packed beside the embedding, which is a look-up then."""
    model = make_tiny_model_of(kind, tie_word_embeddings=tied).bfloat16()
    elements = sum(parameter.numel() for parameter in model.parameters())
    packed = pack_model(model, 6)
    others = (elements if tied else elements - EMBEDDING) - FFNS
    assert bytes_per_token(packed) == 2 * others + PLANES_OF_6
    fully = pack_model(make_tiny_model_of(kind, tie_word_embeddings=tied).bfloat16(), 6, linears=8)
    stored = sum(p.numel() * p.element_size() for p in fully.parameters())
    assert bytes_per_token(fully) == stored - 2 * EMBEDDING


@needs_library
@pytest.mark.parametrize("options", [{}, {"weights": 6}, {"weights": 6, "linear_weights": 8}])
def test_sparse_ffns_count_what_they_read(kind, options):
    model = make_tiny_model_of(kind, tie_word_embeddings=True)
    clusters = random_cluster_set(model, 0.4)
    for layer in clusters.layers.values():
        layer.cluster_bias = torch.zeros(6, 32)
    sparsify(model, clusters, prefill="sparse", **options)
    whole = bytes_per_token(model)  # nothing ran yet
    logits(model)
    read = 0.0
    for module in sparse_modules(model):
        counts = read_counts(module)
        numbers = (counts.computed, counts.looked_at, counts.refined)
        read += module.cost.sparse_bytes(*(number / 6 for number in numbers))
    stored = PLANES_OF_6 if options else 4 * FFNS
    assert bytes_per_token(model) == pytest.approx(whole - stored + read)
    assert 0.1 * stored < read < 0.8 * stored
    reset_cost(model)
    assert bytes_per_token(model) == whole
    with dense(model):
        logits(model)
    assert bytes_per_token(model) == whole


@needs_library
def test_a_layer_without_clusters_counts_whole():
    model = make_tiny_model_of("llama")
    clusters = random_cluster_set(model, 0.4)
    del clusters.layers[1]
    whole = bytes_per_token(model)
    with pytest.warns(UserWarning, match=r"layers \[1\] stay dense"):
        sparsify(model, clusters, prefill="sparse")
    logits(model)
    saved = whole - bytes_per_token(model)
    assert saved == pytest.approx((1 - cost_report(model).cost_share) * 4 * FFNS * 2 / 3)


@needs_library
def test_bits_are_16_times_the_share_of_bfloat16(sparse_model):
    logits(sparse_model)
    report = cost_report(sparse_model)
    nominal = count_cost(sparse_modules(sparse_model), element_size=2).cost_share
    assert report.bits_per_weight == pytest.approx(16 * nominal)
    sparse_model.bfloat16()
    reset_cost(sparse_model)
    logits(sparse_model)
    report = cost_report(sparse_model)
    assert report.bits_per_weight == pytest.approx(16 * report.cost_share)
    assert 3 < report.bits_per_weight < 12


@needs_library
def test_dense_tokens_over_planes_read_the_planes():
    model = make_tiny_model_of("qwen2").bfloat16()
    sparsify(model, random_cluster_set(model, 0.4), weights=6)
    assert cost_report(model).cost_share == 1
    with dense(model):
        logits(model, IDS)
    report = cost_report(model)
    assert report.sparse_tokens == 0
    assert report.cost_share == report.overall_cost_share == pytest.approx(PLANES_OF_6 / FFNS / 2)
    assert report.bits_per_weight == pytest.approx(2 * 6.25)
