"""The opponents' masks by hand, their cost shares against a count, and that nothing stays behind."""

import pytest
import torch
from torch import nn

from sparse_runtime.api import sparse_modules, sparsify, unsparsify
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.layer_clusters import LayerClusters
from sparse_runtime.clusters.importance import importance_scorer
from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.baselines.deja_vu import DejaVu, DejaVuMasks, reduced_rank_start
from sparse_runtime.eval.baselines.masked_ffn import masked_ffns, threshold_for
from sparse_runtime.eval.baselines.neuron_sets import (
    Griffin,
    GriffinMasks,
    Oracle,
    OracleMasks,
    Random,
    Static,
)
from sparse_runtime.eval.baselines.registry import captured_states, fit_baseline, named_baselines
from sparse_runtime.eval.baselines.thresholds import (
    Cats,
    CatsMasks,
    Teal,
    TealMasks,
    Wina,
    WinaMasks,
)
from sparse_runtime.eval.paper.clusters import AwcPaper, PaperClusterMasks
from sparse_runtime.eval.quality.artifact_quality import EVALUATION
from sparse_runtime.ffn.counts import count_cost
from sparse_runtime.kernels.bitmaps import pack_bits
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.fingerprint import model_fingerprint
from sparse_runtime.predictors import new_router

WINDOWS = torch.randint(0, 250, (12, 32), generator=torch.Generator().manual_seed(0))
SMALL_DEJA_VU = DejaVu(rank=4, steps=60, batch_tokens=128)
SMALL_PAPER = AwcPaper(num_clusters=6, rank=4)
METHODS = [
    Oracle(),
    Teal(),
    Wina(),
    Cats(),
    SMALL_DEJA_VU,
    SMALL_PAPER,
    Griffin(),
    Static(),
    Random(),
]
BY_NAME = {"ids": lambda method: method.name}


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
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = gate, up, down
    return FFNLayer(0, "mlp", nn.Module(), "mlp", mlp, gate, up, down, "relu")


@pytest.fixture
def fitted(tiny_model):
    def fit(method, budgets):
        with captured_states(tiny_model, WINDOWS) as states:
            rows = fit_baseline(tiny_model, method, states, budgets)
            return [row[method.name] for row in rows], states.layer(0)

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


def test_wina_by_hand(layer):
    norms = (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]), torch.tensor([1.0, 9.0]))
    output, cost, computed = WinaMasks(0.5, norms)(layer, torch.tensor([[3.0, 2.0], [-1.0, 1.0]]))
    # One input of two: gate takes x1 (2·2 > 3·1), up x0 (3·3 > 2·1): gate = relu([0, 4]),
    # up = [3, 3], h = [0, 12]. Then gate x1 and up x0 again: gate = [0, 2], up = [−1, −1], h = [0, −2].
    assert output.tolist() == [[24.0, 48.0], [-4.0, -8.0]]
    assert cost.tolist() == [0.5, 0.5]
    assert computed is None


def test_oracle_by_hand(layer):
    masks = OracleMasks(0.5, importance_scorer(layer).neuron_weights)
    output, cost, computed = masks(layer, torch.tensor([[3.0, 0.5], [0.5, 2.0]]))
    # h = [3·3.5, 1·2.5] and [0.5·2.5, 4·(−1.5)]; ‖down_i‖ = [√10, √20].
    assert output.tolist() == [[10.5, 31.5], [-12.0, -24.0]]
    assert computed.tolist() == cost.tolist() == [0.5, 0.5]


def test_static_and_random_by_hand(layer):
    states = torch.tensor([[3.0, 0.5], [4.0, 0.1], [0.5, 2.0]])
    (fit,) = Static().fit(layer, states, [0.5])
    # Importance is h·[√10, √20], normalized by token: the first neuron holds 0.65, 0.90 and 0.13.
    assert fit["static"].kept.tolist() == [True, False]
    output, cost, computed = fit["static"](layer, states[2:])
    assert output.tolist() == [[1.25, 3.75]]
    assert computed.tolist() == cost.tolist() == [0.5]
    kept = [fit["random"].kept for fit in Random().fit(layer, states, [0.5, 1.0])]
    assert [int(mask.sum()) for mask in kept] == [1, 2]
    chosen = {
        tuple(Random(seed).fit(layer, states, [0.5])[0]["random"].kept.tolist())
        for seed in range(8)
    }
    assert len(chosen) == 2


def test_griffin_by_hand(layer):
    prompt = torch.tensor([[3.0, 0.5], [0.5, 2.0], [0.5, 2.0]])
    masks = GriffinMasks(0.5).after(layer, prompt)
    # h = [10.5, 2.5], [1.25, −6], twice: relative to their norms [0.97, 0.23] and [0.2, −0.98].
    assert masks.kept.tolist() == [False, True]
    assert GriffinMasks(0.5).after(layer, prompt[:2]).kept.tolist() == [False, True]
    assert GriffinMasks(0.5).after(layer, prompt[:1]).kept.tolist() == [True, False]
    output, cost, _ = masks(layer, torch.tensor([[3.0, 0.5]]))
    assert output.tolist() == [[5.0, 10.0]]
    assert cost.tolist() == [0.5]


def test_paper_clusters_by_hand(layer):
    sets = torch.tensor([[True, False], [False, True]])
    router = new_router(2, 2, None)
    router.up.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    scorer, x = importance_scorer(layer), torch.tensor([[3.0, 0.5], [0.5, 2.0]])
    # Importance [33.2, 11.2] and [4.0, 26.8]: above 20, the first and the second neuron are active.
    oracle = PaperClusterMasks(sets, None, scorer, 20.0)(layer, x)
    assert oracle.output.tolist() == [[10.5, 31.5], [-12.0, -24.0]]
    # The router sends the first token to the second cluster, and the second to the first.
    predicted = PaperClusterMasks(sets, router, scorer, 20.0)(layer, x)
    assert predicted.output.tolist() == [[5.0, 10.0], [1.25, 3.75]]
    # A set is a byte of bits, the router 4 weights and 2 biases; the FFN has 12 weights of 2 bytes.
    assert oracle.cost_shares.tolist() == pytest.approx([0.5 + 1 / 24] * 2)
    assert predicted.cost_shares.tolist() == pytest.approx([0.5 + 13 / 24] * 2)


def test_a_prompt_decides_for_its_own_sequence(tiny_model):
    layers = find_ffn_layers(tiny_model)
    seen, kept = [], []
    for layer in layers[:1]:
        handle = layer.mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        other = layer.down.register_forward_pre_hook(lambda m, a: kept.append(a[0] != 0))
    masks = {layer.index: GriffinMasks(0.25) for layer in layers}
    with masked_ffns(tiny_model, masks, prompt_tokens=8) as meter, torch.inference_mode():
        tiny_model(WINDOWS[:2])
    handle.remove()
    other.remove()
    for row in range(2):
        with torch.inference_mode():
            expected = masks[0].after(layers[0], seen[0][row, :8]).kept
        assert torch.equal(kept[row].any(0), expected)
    assert not torch.equal(kept[0].any(0), kept[1].any(0))
    assert meter.calls == 2 * 24 * 3
    assert meter.cost_share == pytest.approx(0.25)
    with pytest.raises(ConfigError, match="prompt_tokens is 0"), masked_ffns(tiny_model, masks):
        pass


def oracle_route(masks):
    """Ids of the set that holds most of a token's active neurons."""
    sets = masks.sets.float().t()
    return lambda x: ((masks.scorer(x) > masks.threshold).float() @ sets).argmax(-1)


@pytest.mark.parametrize("oracle", [False, True])
def test_cost_and_output_are_those_of_the_runtime(tiny_model, fitted, oracle):
    """The paper's clusters as a baseline and as an artifact in the sparse model."""
    with captured_states(tiny_model, WINDOWS) as states:
        (rows,) = fit_baseline(tiny_model, SMALL_PAPER, states, [0.6])
    masks = rows["awc-paper, oracle ids" if oracle else "awc-paper"]
    with masked_ffns(tiny_model, masks) as meter, torch.inference_mode():
        masked = tiny_model(WINDOWS).logits
    routers = {index: rows["awc-paper"][index].router for index in masks}
    clusters = ClusterSet(
        {
            index: LayerClusters(
                active_sets=pack_bits(of_layer.sets),
                static_set=pack_bits(of_layer.sets[0]),
                router_down=routers[index].down.detach(),
                router_up=routers[index].up.detach(),
                router_bias=routers[index].bias.detach(),
            )
            for index, of_layer in masks.items()
        },
        model_fingerprint(tiny_model),
        budget=0.6,
    )
    sparsify(tiny_model, clusters, config=EVALUATION)
    modules = sparse_modules(tiny_model)
    if oracle:
        for module in modules:
            module.route = oracle_route(masks[module.layer_index])
    with torch.inference_mode():
        sparse = tiny_model(WINDOWS).logits
    share = count_cost(modules, element_size=2).cost_share
    unsparsify(tiny_model)
    torch.testing.assert_close(masked, sparse, atol=1e-4, rtol=1e-4)
    router_share = 2 * (4 * (32 + 6) + 6) / (6 * 32 * 44)
    assert meter.cost_share + (router_share if oracle else 0) == pytest.approx(share, rel=1e-5)


def test_thresholds():
    values = torch.tensor([[5.0, 1.0], [4.0, 2.0]])
    assert threshold_for(values, 0.5) == 2.0
    assert threshold_for(values, 0.25) == 4.0
    assert threshold_for(values, 0.0) == 5.0
    assert threshold_for(values, 1.0) == float("-inf")


@pytest.mark.parametrize("method", [m for m in METHODS if not m.needs_prompt], **BY_NAME)
def test_expected_cost_is_the_budget(tiny_model, fitted, method):
    budgets = [0.55, 0.8, 1.0]
    masks, states = fitted(method, budgets)
    layer = find_ffn_layers(tiny_model)[0]
    with torch.inference_mode():
        shares = [of_layers[0](layer, states).cost_shares.mean().item() for of_layers in masks]
        dense = layer.mlp(states)
        near, far = ((m[0](layer, states).output - dense).norm() for m in (masks[1], masks[0]))
    # Clusters' sets are rounded down to whole neurons, of which there are 44.
    assert shares == pytest.approx(budgets, abs=1 / 44 if method is SMALL_PAPER else 0.01)
    assert 0 < near < far < dense.norm()


@pytest.mark.parametrize("method", [Teal(), Cats(), SMALL_DEJA_VU], **BY_NAME)
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


@pytest.mark.parametrize("method", METHODS, **BY_NAME)
def test_the_model_is_restored(tiny_model, fitted, method):
    with torch.inference_mode():
        before = tiny_model(WINDOWS).logits
        state = {name: value.clone() for name, value in tiny_model.state_dict().items()}
        (masks,), _ = fitted(method, [0.6])
        with masked_ffns(tiny_model, masks, prompt_tokens=8):
            masked = tiny_model(WINDOWS).logits
        torch.testing.assert_close(masked[:, :8], before[:, :8], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(masked[:, 8:], before[:, 8:], atol=1e-2)
        with (
            pytest.raises(RuntimeError, match="inside"),
            masked_ffns(tiny_model, masks, prompt_tokens=8),
        ):
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
    with pytest.raises(
        ConfigError, match=r"baseline is 'teel'; expected all, or some of oracle, te"
    ):
        named_baselines(["cats", "teel"])
    methods, _ = named_baselines(["all"])
    assert {type(method) for method in methods} == {type(m) for m in METHODS}
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
