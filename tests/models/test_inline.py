"""FFNs written out in a larger module's forward, and those with weights [in, out]."""

import copy
import io

import pytest
import torch
from helpers import IDS, assert_same_state, logits, needs_library, random_cluster_set
from model_types import tiny_model_of_type
from torch import nn
from torch.nn import functional

from sparse_runtime import cost_report, dense, fast_linear, reset_cost, sparsify, unsparsify
from sparse_runtime.errors import UnsupportedArchitectureError
from sparse_runtime.eval.quality.forwards import dense_prompts
from sparse_runtime.ffn.counts import bytes_per_token
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.inline_calls import calling, ffn_module

pytestmark = [
    needs_library,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
#: In the decoder layer, in a module of its own beside a residual; [in, out], not inline.
KINDS = ["opt", "biogpt", "bloom", "gpt2"]


@pytest.fixture(params=KINDS)
def model(request):
    return tiny_model_of_type(request.param)


def sparse(model, density=0.4):
    return sparsify(model, random_cluster_set(model, density), prefill="sparse")


def part(model, number, index=1):
    """A linear layer of an FFN, or a module in between."""
    layer = find_ffn_layers(model)[index]
    between = layer.form.inline or ("act",)
    names = (layer.projections[0], between[0], layer.projections[1])
    return layer.mlp, names[number]


def scaled(*unused):
    return unused[-1] * 1.5


class TestWhatOthersDo:
    """A changed sparse model means what the changed dense model means, as far as it runs dense."""

    def compare(self, model, change, *, sparse_layers):
        twin = change(copy.deepcopy(model))
        expected = logits(twin)
        assert (expected - logits(model)).abs().max() > 1e-3
        changed = change(sparse(model, 1.0))
        reset_cost(model)
        torch.testing.assert_close(logits(changed), expected, rtol=1e-3, atol=1e-3)
        report = cost_report(model)
        assert report.sparse_tokens == sparse_layers * IDS.numel()
        with dense(model):
            assert torch.equal(logits(changed), expected)
        return report

    @pytest.mark.parametrize("number", [0, 1, 2])
    @pytest.mark.parametrize("pre", [False, True])
    def test_hooks(self, model, number, pre):
        def change(model):
            mlp, name = part(model, number)
            module = mlp.get_submodule(name)
            if pre:
                module.register_forward_pre_hook(lambda module, args: args[0] * 1.5)
            else:
                module.register_forward_hook(scaled)
            return model

        assert self.compare(model, change, sparse_layers=1).dense_reasons["patched"] > 0

    @pytest.mark.parametrize("number", [0, 2])
    def test_an_adapter(self, model, number):
        class Adapted(nn.Module):
            def __init__(self, base):
                super().__init__()
                torch.manual_seed(3)
                self.base_layer, self.extra = base, nn.Linear(32, 44 if number == 0 else 32)
                if number:
                    self.extra = nn.Linear(self.base_in(), 32)
                elif getattr(base, "out_features", 44) != 44:
                    self.extra = nn.Linear(32, base.out_features)

            def base_in(self):
                return getattr(self.base_layer, "in_features", 44)

            def forward(self, x):
                return self.base_layer(x) + self.extra(x)

        def change(model):
            mlp, name = part(model, number)
            setattr(mlp, name, Adapted(mlp.get_submodule(name)))
            return model

        self.compare(model, change, sparse_layers=1)

    def test_lora(self):
        peft = pytest.importorskip("peft")

        def change(model):
            torch.manual_seed(1)
            config = peft.LoraConfig(r=2, target_modules=["fc1", "fc2"], init_lora_weights=False)
            return peft.get_peft_model(model, config).eval()

        model = tiny_model_of_type("opt")
        with pytest.raises(UnsupportedArchitectureError, match=r"lora.*merge"):
            sparse(change(copy.deepcopy(model)))
        self.compare(model, change, sparse_layers=0)

    def test_the_class_gets_another_forward(self, model, monkeypatch):
        sparse(model, 1.0)
        own = type(find_ffn_layers(model)[0].mlp).__mro__[1:]
        own = next(kind for kind in own if kind.__module__.startswith("transformers."))
        before, forward = logits(model), own.forward

        def halved(*args, **options):
            result = forward(*args, **options)
            return result * 0.5 if torch.is_tensor(result) else (result[0] * 0.5, *result[1:])

        monkeypatch.setattr(own, "forward", halved)
        found = logits(model)
        assert (found - before).abs().max() > 1e-3
        assert torch.equal(found, logits(unsparsify(model)))

    def test_other_weights_and_biases(self, model):
        sparse(model, 1.0)
        with torch.no_grad():
            for layer in find_ffn_layers(model):
                for linear in layer.own_linears().values():
                    linear.weight *= 1.25
        found = logits(model)
        assert cost_report(model).sparse_tokens > 0
        with dense(model):
            torch.testing.assert_close(found, logits(model), rtol=1e-3, atol=1e-3)

    def test_no_class_stays(self, model):
        types, before = [type(m) for m in model.modules()], copy.deepcopy(model)
        states = [set(module.__dict__) for module in model.modules()]
        unsparsify(sparse(model))
        assert [type(m) for m in model.modules()] == types
        assert [set(module.__dict__) for module in model.modules()] == states
        assert_same_state(model, before)
        assert all(value.is_contiguous() for value in model.state_dict().values())


class TestDropout:
    @pytest.mark.parametrize("kind", ["opt", "biogpt", "gpt2", "xlnet"])
    def test_in_training_mode(self, kind):
        model = tiny_model_of_type(kind).train()
        twin = copy.deepcopy(model)
        assert len(find_ffn_layers(model)) == 2
        sparse(model)
        torch.manual_seed(5)
        found = logits(model)
        torch.manual_seed(5)
        assert torch.equal(found, logits(twin))
        assert set(cost_report(model).dense_reasons) == {"dropout"}
        model.eval()
        assert (logits(model) - logits(twin.eval())).abs().max() > 1e-3

    @pytest.mark.parametrize("kind", ["gpt2", "xlnet"])
    def test_of_one_module(self, kind):
        """As it is switched on to sample predictions."""
        model = tiny_model_of_type(kind)
        twin = copy.deepcopy(model)
        sparse(model)
        for each in (model, twin):
            find_ffn_layers(each)[1].mlp.dropout.train()
        torch.manual_seed(5)
        found = logits(model)
        assert cost_report(model).dense_reasons == {"dropout": IDS.numel()}
        with dense(model):
            torch.manual_seed(5)
            assert (logits(model) - found).abs().max() > 1e-3  # the other layer is sparse
        sparse(unsparsify(model), 1.0)
        torch.manual_seed(5)
        found = logits(model)
        torch.manual_seed(5)
        torch.testing.assert_close(found, logits(twin), rtol=1e-3, atol=1e-3)


class TestCalls:
    def test_gradients(self, model):
        ids = IDS

        def gradients(model):
            model.zero_grad()
            model(input_ids=ids).logits.square().mean().backward()
            return {
                name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
            }

        expected = gradients(copy.deepcopy(model))
        found = gradients(sparse(model))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert set(cost_report(model).dense_reasons) == {"gradients"}

    def test_compiled(self, model):
        torch._dynamo.reset()  # transformers' wrappers count as recompiled for every kind of model
        sparse(model)
        expected = logits(model)
        with torch.no_grad():
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(input_ids=IDS).logits, expected)
            with dense(model):
                other = compiled(input_ids=IDS).logits
            torch.testing.assert_close(other, logits(unsparsify(model)))
            assert (other - expected).abs().max() > 1e-3

    def test_autocast(self, model):
        twin = copy.deepcopy(model)
        sparse(model, 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(logits(model), logits(twin))
        assert set(cost_report(model).dense_reasons) == {"autocast"}

    def test_copies(self, model):
        expected = logits(sparse(model))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(logits(other), expected)
            for linear in find_ffn_layers(other)[0].own_linears().values():
                linear.weight.data *= 1.5
                linear.bias.data += 1
            assert torch.equal(logits(model), expected)
            changed = logits(other)
            assert (changed - expected).abs().max() > 1e-3
            with dense(other):
                assert (changed - logits(other)).abs().max() > 1e-3
            unsparsify(other)
        assert torch.equal(logits(model), expected)

    def test_saved_while_sparse(self, model, tmp_path):
        expected = logits(model)
        sparse(model).save_pretrained(tmp_path)
        assert torch.equal(logits(type(model).from_pretrained(tmp_path)), expected)

    def test_found_again(self, model):
        before = [(layer.name, layer.form, layer.activation) for layer in find_ffn_layers(model)]
        sparse(model)
        found = [(layer.name, layer.form, layer.activation) for layer in find_ffn_layers(model)]
        assert found == before

    def test_fast_linear(self):
        model = tiny_model_of_type("opt")
        expected = logits(model)
        sparsify(model, random_cluster_set(model, 1.0), prefill="sparse", fast_linear=True)
        layer = model.model.decoder.layers[0]
        assert type(layer.self_attn.q_proj).__name__ == "FastLinear"
        assert type(layer.fc1) is type(layer.fc2) is nn.Linear
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
        fast_linear(unsparsify(model))
        assert type(layer.fc1).__name__ == "FastLinear"

    def test_bytes(self, model):
        whole = bytes_per_token(model)
        sparse(model, 0.25)
        logits(model)
        ffns = sum(
            linear.weight.numel() * 4
            for layer in find_ffn_layers(model)
            for linear in layer.own_linears().values()
        )
        assert whole - ffns < bytes_per_token(model) < whole - 0.3 * ffns


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_planes_are_refused(model, bits):
    with pytest.raises(UnsupportedArchitectureError, match=r"written out|weights \[in, out\]"):
        pack_model(model, bits)
    with pytest.raises(UnsupportedArchitectureError, match=r"written out|weights \[in, out\]"):
        sparsify(model, random_cluster_set(model, 0.5), weights=bits)


def test_linear_layers_beside_are_packed():
    model = tiny_model_of_type("opt")
    pack_model(model, None, linears=8)
    layer = model.model.decoder.layers[0]
    assert type(layer.self_attn.q_proj).__name__ == "PlaneLinear"
    assert type(layer.fc1) is nn.Linear


def test_modules_in_place_of_ffns(model):
    layers, kinds = find_ffn_layers(model), [type(m) for m in model.modules()]
    expected = logits(model)
    ffns, seen = [ffn_module(layer) for layer in layers], []
    handle = ffns[1].register_forward_hook(lambda m, args, output: seen.append((args[0], output)))
    with calling(layers, ffns):
        assert torch.equal(logits(model), expected)
        assert [layer.name for layer in find_ffn_layers(model)] == [layer.name for layer in layers]
    handle.remove()
    ((x, y),) = seen
    gate, _, down_t = layers[1].rows()
    h = functional.linear(x.reshape(-1, 32), gate, layers[1].biases[0])
    act = {"relu": functional.relu, "gelu": functional.gelu}.get(
        layers[1].activation, lambda h: functional.gelu(h, approximate="tanh")
    )
    with torch.no_grad():
        torch.testing.assert_close(
            y.reshape(-1, 32), act(h) @ down_t + layers[1].down_bias, rtol=1e-4, atol=1e-4
        )
    with calling(layers, [nn.Identity()] * 2):
        assert (logits(model) - expected).abs().max() > 1e-3
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(logits(model), expected)


def test_prompts_of_several_windows(model):
    """Whether an FFN gets its tokens as sequences or, as OPT's, in a row."""
    ids = torch.tensor([[5, 9, 2, 7, 1, 3], [8, 4, 4, 6, 2, 1]])
    sparse(model)
    with dense_prompts(model, 2):
        expected = torch.cat([logits(model, row[None]) for row in ids])
        found = logits(model, ids)
        with dense(model):
            prompt = logits(model, ids)[:, :2]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, :2], prompt, rtol=1e-4, atol=1e-4)
    assert (found - logits(model, ids)).abs().max() > 1e-3


class Layer(nn.Module):
    """A decoder layer of the tests' own, as OPT's."""

    def __init__(self):
        super().__init__()
        self.norm, self.self_attn = nn.LayerNorm(32), nn.Sequential(nn.Linear(32, 32))
        self.fc1, self.fc2, self.act = nn.Linear(32, 44), nn.Linear(44, 32), nn.ReLU()
        self.ffn_norm = nn.LayerNorm(44)

    def forward(self, hidden_states, **unused):
        x = hidden_states + self.self_attn(self.norm(hidden_states))
        return (x + self.ffn(x),)

    def ffn(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Scaled(Layer):
    def ffn(self, x):
        return self.fc2(self.act(self.fc1(x) * 0.5))


class WrongOrder(Layer):
    def ffn(self, x):
        return self.fc1(self.act(self.fc2(self.fc1(x)))) @ self.fc1.weight


class Twice(Layer):
    def ffn(self, x):
        return self.fc2(self.act(self.fc1(x))) + self.fc2(self.act(self.fc1(2 * x)))


class Again(Layer):
    def ffn(self, x):
        self.fc1(2 * x)
        return self.fc2(self.act(self.fc1(x)))


class Normed(Layer):
    def ffn(self, x):
        return self.fc2(self.ffn_norm(self.act(self.fc1(x))))


class UsedElsewhere(Layer):
    def ffn(self, x):
        h = self.fc1(x)
        return self.fc2(self.act(h)) + h.mean(-1, keepdim=True)


class UnknownActivation(Layer):
    def __init__(self):
        super().__init__()
        self.act = nn.Tanh()


class Untold(Layer):
    """An activation that is no module: it would be given the hidden states themselves."""

    def ffn(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Scaled, "computed apart, .* differ"),
        (WrongOrder, "it calls fc1, fc2, fc1"),
        (Twice, "it calls fc1, act, fc2, fc1, act, fc2"),
        (Again, "it calls fc1, fc1, act, fc2"),
        (Normed, r"ffn_norm \(LayerNorm\) stands in between, which has weights"),
        (UsedElsewhere, "computed apart, .* differ"),
        (UnknownActivation, "activation is none that the kernels know"),
        (Untold, "computed apart, .* differ"),
    ],
)
def test_what_is_no_ffn(kind, reason):
    model = tiny_model_of_type("opt")
    layers = model.model.decoder.layers
    layers[1] = Layer().eval()
    assert find_ffn_layers(model)[1].form.inline == ("act",)
    layers[1] = kind().eval()
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        find_ffn_layers(model)
