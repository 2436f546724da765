"""The opponents' masks by hand, their cost shares against a count, and that nothing stays behind."""

import pytest
import torch
from torch import nn

from sparse_runtime.architectures import FFNLayer, find_ffn_layers
from sparse_runtime.clusters.importance import importance_scorer
from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.baselines import (
    Cats,
    CatsMasks,
    Teal,
    TealMasks,
    captured_states,
    check_baselines,
    fit_baseline,
)
from sparse_runtime.eval.deja_vu import DejaVu, DejaVuMasks, reduced_rank_start
from sparse_runtime.eval.masked_ffn import masked_ffns, threshold_for

WINDOWS = torch.randint(0, 250, (12, 32), generator=torch.Generator().manual_seed(0))
SMALL_DEJA_VU = DejaVu(rank=4, steps=60, batch_tokens=128)
METHODS = [Teal(), Cats(), SMALL_DEJA_VU]


@pytest.fixture
def layer():
    """Two neurons on two inputs, with relu: h = relu([x0, 2·x1])·[x0 + x1, x0 − x1]."""

    def linear(rows):
        result = nn.Linear(2, 2, bias=False)
        result.weight.data = torch.tensor(rows)
        return result

    gate, up = linear([[1.0, 0.0], [0.0, 2.0]]), linear([[1.0, 1.0], [1.0, -1.0]])
    down = linear([[1.0, 2.0], [3.0, 4.0]])
    mlp = nn.Module()
    return FFNLayer(0, "mlp", nn.Module(), "mlp", mlp, gate, up, down, "relu")


@pytest.fixture
def fitted(tiny_model):
    def fit(method, budgets):
        with captured_states(tiny_model, WINDOWS) as states:
            return fit_baseline(tiny_model, method, states, budgets), states.layer(0)

    return fit


def test_teal_by_hand(layer):
    masks = TealMasks(x_threshold=1.0, h_threshold=1.0)
    output, cost, computed = masks(layer, torch.tensor([[3.0, 0.5], [2.0, -4.0]]))
    # [3, 0.5] -> [3, 0]: h = [3, 0]·[3, 3] = [9, 0]. [2, −4]: h = [2, 0]·[−2, 6] = [−4, 0].
    assert output.tolist() == [[9.0, 27.0], [-4.0, -12.0]]
    # One of two inputs and one of two activations; both inputs and one of two activations.
    assert cost.tolist() == pytest.approx([(2 * 0.5 + 0.5) / 3, (2 * 1 + 0.5) / 3])
    assert computed is None


def test_cats_by_hand(layer):
    masks = CatsMasks(threshold=1.5)
    output, cost, computed = masks(layer, torch.tensor([[3.0, 0.5], [1.0, 2.0], [2.0, 2.0]]))
    # relu(gate) = [3, 1], [1, 4] and [2, 4]: what is not above 1.5 is skipped.
    # h = [3·3.5, 0], [0, 4·(−1)] and [2·4, 4·0].
    assert output.tolist() == [[10.5, 31.5], [-8.0, -16.0], [8.0, 24.0]]
    assert computed.tolist() == [0.5, 0.5, 1.0]
    assert cost.tolist() == pytest.approx([2 / 3, 2 / 3, 1.0])


def test_deja_vu_by_hand(layer):
    masks = DejaVuMasks(
        down=torch.tensor([[1.0, 0.0]]),
        up=torch.tensor([[1.0], [-1.0]]),
        bias=torch.tensor([0.0, 1.0]),
        threshold=0.5,
    )
    output, cost, computed = masks(layer, torch.tensor([[3.0, 0.5], [-1.0, 2.0], [0.25, 9.0]]))
    # Scores [x0, 1 − x0]: [3, −2] and [−1, 2] compute one neuron, and [0.25, 0.75] the second.
    # h = [3·3.5, 0], [0, 4·(−3)] and [0, 18·(−8.75)].
    assert output.tolist() == [[10.5, 31.5], [-24.0, -48.0], [-315.0, -630.0]]
    assert computed.tolist() == [0.5, 0.5, 0.5]
    # The predictor has 2 + 2 weights and 2 biases, the FFN 12 weights.
    assert cost.tolist() == pytest.approx([0.5 + 6 / 12] * 3)


def test_thresholds():
    values = torch.tensor([[5.0, 1.0], [4.0, 2.0]])
    assert threshold_for(values, 0.5) == 2.0
    assert threshold_for(values, 0.25) == 4.0
    assert threshold_for(values, 0.0) == 5.0
    assert threshold_for(values, 1.0) == float("-inf")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_expected_cost_is_the_budget(tiny_model, fitted, method):
    budgets = [0.55, 0.8, 1.0]
    masks, states = fitted(method, budgets)
    layer = find_ffn_layers(tiny_model)[0]
    with torch.inference_mode():
        shares = [of_layers[0](layer, states).cost_shares.mean().item() for of_layers in masks]
        dense = layer.mlp(states)
        near, far = ((m[0](layer, states).output - dense).norm() for m in (masks[1], masks[0]))
    assert shares == pytest.approx(budgets, abs=0.01)
    assert 0 < near < far < dense.norm()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_cost_share_is_what_was_counted(tiny_model, fitted, method):
    """Against entries counted at the inputs of the FFNs and of their down projections."""
    (masks,), _ = fitted(method, [0.6])
    layers = find_ffn_layers(tiny_model)
    kept_x, kept_h = [], []
    handles = []
    for layer in layers:
        threshold = getattr(masks[layer.index], "x_threshold", 0.0)
        handles += [
            layer.mlp.register_forward_pre_hook(
                lambda m, a, t=threshold: kept_x.append((a[0][:, 8:].abs() > t).sum().item())
            ),
            layer.down.register_forward_pre_hook(
                lambda m, a: kept_h.append((a[0] != 0).sum().item())
            ),
        ]
    with masked_ffns(tiny_model, masks, prompt_tokens=8) as meter, torch.inference_mode():
        tiny_model(WINDOWS[:2])
    for handle in handles:
        handle.remove()
    # Each FFN runs its down projection twice: for the prompts, densely, and for the rest.
    assert kept_h[::2] == [2 * 8 * 44] * 3
    tokens = 2 * 24 * 3
    assert meter.calls == tokens
    share_x, share_h = sum(kept_x) / (tokens * 32), sum(kept_h[1::2]) / (tokens * 44)
    expected = {
        "teal": (2 * share_x + share_h) / 3,
        "cats": (1 + 2 * share_h) / 3,
        "deja-vu": share_h + (4 * (32 + 44) + 44) / (3 * 32 * 44),
    }
    assert meter.cost_share == pytest.approx(expected[method.name], rel=1e-5)
    assert 0.4 < meter.cost_share < 0.8
    if method.name != "teal":
        assert meter.computed == pytest.approx(share_h, rel=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_model_is_restored(tiny_model, fitted, method):
    with torch.inference_mode():
        before = tiny_model(WINDOWS).logits
        state = {name: value.clone() for name, value in tiny_model.state_dict().items()}
        (masks,), _ = fitted(method, [0.6])
        with masked_ffns(tiny_model, masks, prompt_tokens=8):
            masked = tiny_model(WINDOWS).logits
        torch.testing.assert_close(masked[:, :8], before[:, :8], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(masked[:, 8:], before[:, 8:], atol=1e-2)
        with pytest.raises(RuntimeError, match="inside"), masked_ffns(tiny_model, masks):
            raise RuntimeError("inside")
        assert torch.equal(tiny_model(WINDOWS).logits, before)
    assert all("forward" not in module.__dict__ for module in tiny_model.modules())
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(value, state[name])
        assert value.grad is None


def test_deja_vu_learns_what_a_token_needs(tiny_model, fitted):
    """The share of Σ e² that the chosen neurons hold: chance, at the start, trained, at best."""
    layer = find_ffn_layers(tiny_model)[0]
    covered = []
    for steps in (0, 400):
        (masks,), states = fitted(DejaVu(16, steps, batch_tokens=128, learning_rate=1e-2), [0.8])
        kept = masks[0].scores(states) > masks[0].threshold
        squares = importance_scorer(layer)(states).square()
        covered.append(((squares * kept).sum() / squares.sum()).item())
    density = kept.float().mean().item()
    assert 0.3 < density < 0.7
    best = squares.flatten().topk(int(kept.sum())).values.sum() / squares.sum()
    assert density + 0.1 < covered[0] < covered[1] < best


def test_start_of_full_rank_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator)
    x -= x.mean(0)
    weights = torch.randn(6, 9, generator=generator) * 0.3
    importance = (x @ weights + 0.1 * torch.randn(500, 9, generator=generator)).exp()
    down, up, bias = reduced_rank_start(x, importance, 6, ridge=1e-7)
    y = (importance / importance.mean(-1, keepdim=True)).sqrt()
    expected = x @ torch.linalg.lstsq(x, y - y.mean(0)).solution + y.mean(0)
    torch.testing.assert_close(x @ down.t() @ up.t() + bias, expected, atol=1e-4, rtol=1e-4)
    errors = []
    for rank in (1, 3, 6):
        down, up, bias = reduced_rank_start(x, importance, rank)
        assert down.shape == (rank, 6)
        errors.append((x @ down.t() @ up.t() + bias - y).square().mean().item())
    assert errors == sorted(errors, reverse=True)


def test_bad_names_budgets_and_masks(tiny_model, fitted):
    with pytest.raises(ConfigError, match=r"baseline is 'teel'; expected some of teal, cats, deja"):
        check_baselines(["cats", "teel"])
    for method, budget, least in (
        (Cats(), 0.3, "0.333"),
        (Teal(), 0.0, "0.000"),
        (Teal(), 1.5, "0.000"),
        (SMALL_DEJA_VU, 0.05, "0.082"),
    ):
        message = f"budget is {budget}; expected a cost share above {least}, which {method.name}"
        with pytest.raises(ConfigError, match=message):
            fitted(method, [0.9, budget])
    (masks,), _ = fitted(Teal(), [0.5])
    del masks[1]
    with (
        pytest.raises(ConfigError, match=r"layers \[0, 2\]; expected \[0, 1, 2\]"),
        masked_ffns(tiny_model, masks),
    ):
        pass
