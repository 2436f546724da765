from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from sparse_runtime.clusters.paper.awc_paper import AWCPaperConfig, assign
from sparse_runtime.clusters.paper.binary_patterns import PackedPatterns
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.eval.paper.masks import (
    PROJECTIONS,
    PaperMasks,
    PaperPatterns,
    collect_paper_patterns,
    fit_paper_masks,
    paper_masks_applied,
    pattern_bytes,
    score_paper_masks,
)
from sparse_runtime.models.ffn_layers import find_ffn_layers

CONFIG = AWCPaperConfig(num_clusters=5, top_percentile=0.4, max_iterations=3)


@pytest.fixture
def model() -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return MistralForCausalLM(config).eval()


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(61, (6, 20), generator=torch.Generator().manual_seed(1))


def fit(
    model: MistralForCausalLM, windows: Tensor, pooled: bool
) -> tuple[PaperPatterns, PaperMasks]:
    patterns = collect_paper_patterns(model, windows)
    generator = torch.Generator().manual_seed(2)
    return patterns, fit_paper_masks(patterns, CONFIG, pooled=pooled, generator=generator)


@torch.inference_mode()
def linear_outputs(model: MistralForCausalLM, ids: Tensor) -> dict[tuple[int, str], Tensor]:
    """What the three linears of each FFN hand on, as seen by the rest of the model."""
    outputs: dict[tuple[int, str], Tensor] = {}
    handles = [
        getattr(layer, projection).register_forward_hook(
            lambda module, args, output, key=(layer.index, projection): outputs.update(
                {key: output.flatten(0, -2)}
            )
        )
        for layer in find_ffn_layers(model)
        for projection in PROJECTIONS
    ]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return outputs


def hook_counts(model: MistralForCausalLM) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_patterns_of_the_dense_model(model: MistralForCausalLM, windows: Tensor) -> None:
    found = collect_paper_patterns(model, windows, 50, enforce=False)
    dense = linear_outputs(model, windows)
    total = 0
    for (index, projection), output in dense.items():
        threshold = found.thresholds[index][projection]
        median = output.abs().flatten().sort().values[output.numel() // 2 - 1].item()
        assert threshold <= median <= threshold * (1 + 2**-11)
        patterns = found.patterns[index][projection]
        # Batching windows one by one may flip values within rounding of the threshold.
        mismatch = patterns.dense(dtype=torch.bool) != (output.abs() > threshold)
        assert mismatch.float().mean() < 1e-3
        assert patterns.frequency().mean().item() == pytest.approx(0.5, abs=0.005)
        total += patterns.bits.numel()
    assert pattern_bytes(model, windows.numel()) == total
    assert len(found.pooled("up")) == 2 * windows.numel()


def test_enforced_patterns_are_those_of_the_thresholded_model(
    model: MistralForCausalLM, windows: Tensor
) -> None:
    patterns, masks = fit(model, windows, pooled=True)
    with paper_masks_applied(model, masks, thresholds_only=True):
        outputs = linear_outputs(model, windows)
    for (index, projection), output in outputs.items():
        mismatch = patterns.patterns[index][projection].dense(dtype=torch.bool) != (output != 0)
        assert mismatch.float().mean() < 2e-3


@pytest.mark.parametrize("pooled", [True, False])
def test_masks_zero_what_the_nearest_centroid_lacks(
    model: MistralForCausalLM, windows: Tensor, pooled: bool
) -> None:
    _, masks = fit(model, windows, pooled)
    same_table = masks.centroids[0]["gate"] is masks.centroids[1]["gate"]
    assert same_table == pooled
    with paper_masks_applied(model, masks):
        outputs = linear_outputs(model, windows[:1])
        # Before masking: the inputs of the linears are what the masked model hands them.
        inputs: dict[tuple[int, str], Tensor] = {}
        handles = [
            getattr(layer, projection).register_forward_pre_hook(
                lambda module, args, key=(layer.index, projection): inputs.update({key: args[0][0]})
            )
            for layer in find_ffn_layers(model)
            for projection in PROJECTIONS
        ]
        with torch.inference_mode():
            model(input_ids=windows[:1])
        for handle in handles:
            handle.remove()
    for layer in find_ffn_layers(model):
        for projection in PROJECTIONS:
            linear, key = getattr(layer, projection), (layer.index, projection)
            with torch.inference_mode():
                dense = linear(inputs[key])
            table = masks.centroids[layer.index][projection]
            above = dense.abs() > masks.thresholds[layer.index][projection]
            mask = table[assign(PackedPatterns.from_dense(above), table)]
            assert torch.equal(outputs[key], dense * mask)
            assert 0.3 < mask.float().mean() < 0.8
        # Down's input is the product of two masked outputs.
        gate, up = outputs[layer.index, "gate"], outputs[layer.index, "up"]
        expected = torch.nn.functional.silu(gate) * up
        assert torch.allclose(inputs[layer.index, "down"], expected)


def test_thresholds_only_zeroes_half(model: MistralForCausalLM, windows: Tensor) -> None:
    _, masks = fit(model, windows, pooled=True)
    dense = linear_outputs(model, windows)
    with paper_masks_applied(model, masks, thresholds_only=True):
        sparse = linear_outputs(model, windows)
    for projection in ("gate", "up"):
        threshold = masks.thresholds[0][projection]
        output = dense[0, projection]
        assert torch.equal(sparse[0, projection], output * (output.abs() > threshold))
    for output in sparse.values():
        assert 0.4 < (output != 0).float().mean() < 0.6


@pytest.mark.parametrize("thresholds_only", [True, False])
def test_model_is_restored(
    model: MistralForCausalLM, windows: Tensor, thresholds_only: bool
) -> None:
    keys = list(model.state_dict())
    before = model(input_ids=windows).logits
    _, masks = fit(model, windows, pooled=True)
    assert hook_counts(model) == 0
    with paper_masks_applied(model, masks, thresholds_only=thresholds_only):
        assert hook_counts(model) == 6
        assert not torch.allclose(model(input_ids=windows).logits, before, atol=1e-4)
    assert torch.equal(model(input_ids=windows).logits, before)
    with pytest.raises(RuntimeError, match="inside"), paper_masks_applied(model, masks):
        raise RuntimeError("inside")
    assert hook_counts(model) == 0
    assert list(model.state_dict()) == keys


def test_hooks_are_removed_when_collecting_fails(
    model: MistralForCausalLM, windows: Tensor
) -> None:
    with torch.no_grad():
        find_ffn_layers(model)[1].up.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="NaN"):
        collect_paper_patterns(model, windows)
    assert hook_counts(model) == 0


def test_scores_on_held_out_text(model: MistralForCausalLM, windows: Tensor) -> None:
    patterns, masks = fit(model, windows, pooled=False)
    other = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(9))
    held_out = collect_paper_patterns(model, other, thresholds=patterns.thresholds)
    assert held_out.thresholds is patterns.thresholds
    scores = score_paper_masks(masks, patterns, held_out)
    assert set(scores) == set(PROJECTIONS)
    for row in scores.values():
        assert row["coverage"] > row["chance"] > 0.3
        assert 0.3 < row["precision"] < 1
        assert 0.4 < row["pattern_density"] < 0.6
        assert 0.3 < row["static"] < 1


def test_windows_of_any_kind(model: MistralForCausalLM, windows: Tensor) -> None:
    rows = collect_paper_patterns(model, [windows[0], windows[1:3], windows[3:, :7]])
    assert len(rows.patterns[1]["down"]) == 20 + 40 + 21


def test_generation_under_masks(model: MistralForCausalLM, windows: Tensor) -> None:
    _, masks = fit(model, windows, pooled=True)
    with paper_masks_applied(model, masks):
        tokens = model.generate(windows[:2, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 9)


def bad_masks(masks: PaperMasks) -> Iterator[tuple[PaperMasks, str]]:
    narrow = {0: {**masks.centroids[0], "up": masks.centroids[0]["up"][:, :-1]}}
    yield PaperMasks(masks.thresholds, masks.centroids | narrow, {}), "47 columns"
    yield PaperMasks({0: masks.thresholds[0]}, masks.centroids, {}), r"layers \[0\]"


def test_masks_of_another_model(model: MistralForCausalLM, windows: Tensor) -> None:
    _, masks = fit(model, windows, pooled=True)
    for bad, message in bad_masks(masks):
        with pytest.raises(ConfigError, match=message), paper_masks_applied(model, bad):
            pass
    with pytest.raises(ConfigError, match="oracle"), paper_masks_applied(model, masks, "router"):
        pass
    assert hook_counts(model) == 0


def test_bad_inputs(model: MistralForCausalLM, windows: Tensor) -> None:
    with pytest.raises(ConfigError, match="percentile is 100"):
        collect_paper_patterns(model, windows, 100)
    with pytest.raises(DataError, match="no windows"):
        collect_paper_patterns(model, [])
    with pytest.raises(ConfigError, match=r"layers \[7\]"):
        collect_paper_patterns(model, windows, thresholds={7: {}})
