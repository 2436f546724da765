"""Windows that pass a decoder layer by layer: what the model itself computes, and its gradients."""

import pytest
import torch
from helpers import backwards, make_tiny_model
from model_types import tiny_model_of_type
from torch import nn

from sparse_runtime.clusters import sweep as sweeps
from sparse_runtime.clusters.buffers import Buffers
from sparse_runtime.clusters.sweep import Sweep


def windows(count=3, length=10):
    return torch.randint(0, 250, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["layers", "whole"])
def model(request):
    model = make_tiny_model()
    return model if request.param == "layers" else backwards(model)


def test_states_are_the_decoders_own(model):
    with Buffers(0) as buffers:
        sweep = Sweep(model, windows(), buffers)
        assert len(sweep.parts) == (3 if "forward" not in model.model.__dict__ else 1)
        passed = []
        sweep.forward(ran=lambda *at: passed.append(at), advance=lambda units: None)
        assert passed == [(part, w) for part in range(len(sweep.parts)) for w in range(3)]
        for number, row in enumerate(windows()):
            with torch.no_grad():
                expected = model.model(row[None]).last_hidden_state[0]
            assert torch.equal(sweep.final(number), expected)


@pytest.mark.parametrize(
    "kind", ["gpt2", "gptj", "opt", "gemma2", "mixtral", "falcon", "phi", "qwen3", "olmo2"]
)
def test_decoders_of_many_types_are_sequences(kind):
    model = tiny_model_of_type(kind).eval()
    ids = windows(2)
    with Buffers() as buffers:
        sweep = Sweep(model, ids, buffers)
        assert not sweep.whole
        sweep.forward()
        with torch.no_grad():
            expected = model.get_decoder()(ids[1:], use_cache=False)[0][0]
        assert torch.equal(sweep.final(1), expected)


def test_gradients_are_those_of_the_whole_model(model):
    ids = windows()
    model.requires_grad_(False)
    found = []

    def watch(module, arguments, output):
        output.register_hook(lambda gradient: found.append(gradient.clone()))

    linears = [layer.mlp.gate_proj for layer in model.model.layers]
    with Buffers(0) as buffers:
        sweep = Sweep(model, ids, buffers)
        sweep.forward(keep=True)
        handles = [linear.register_forward_hook(watch) for linear in linears]
        sweep.backward(lambda window, states: states.square().sum() * (window + 1))
        by_sweep, found[:] = list(found), []
    embeddings = model.get_input_embeddings()
    handles.append(embeddings.register_forward_hook(lambda m, a, output: output.requires_grad_()))
    for number, row in enumerate(ids):
        (model.model(row[None])[0].square().sum() * (number + 1)).backward()
    for handle in handles:
        handle.remove()
    # By layers all windows of the last one come first; by windows all layers of the first one.
    if len(sweep.parts) == 3:
        by_sweep = [by_sweep[3 * layer + window] for window in range(3) for layer in range(3)]
    assert len(by_sweep) == len(found) == 9
    for one, other in zip(by_sweep, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class ByName(nn.Module):
    """A decoder layer that takes hidden states by name and gives a tuple."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *, scale, hidden_states, **options):
        return self.layer(hidden_states, **options) * scale, None


def test_layers_that_take_states_by_name_and_give_tuples():
    """And something that differs from window to window."""
    model = make_tiny_model()
    decoder = model.model
    decoder.layers = nn.ModuleList(map(ByName, decoder.layers))

    def forward(input_ids, use_cache=False):
        states = decoder.embed_tokens(input_ids)
        places = torch.arange(states.shape[1])[None]
        positions = decoder.rotary_emb(states, places)
        for layer in decoder.layers:
            states = layer(
                scale=input_ids.float().mean() / 100,
                hidden_states=states,
                position_embeddings=positions,
                attention_mask=None,
            )[0]
        return (decoder.norm(states),)

    decoder.forward = forward
    with Buffers() as buffers:
        sweep = Sweep(model, windows(), buffers)
        assert not sweep.whole
        sweep.forward()
        for number, row in enumerate(windows()):
            with torch.no_grad():
                assert torch.equal(sweep.final(number), forward(row[None])[0][0])


def test_a_decoder_that_adds_something_between_its_layers_runs_whole():
    model = make_tiny_model()
    decoder, own = model.model, model.model.layers[1].forward
    before = decoder.layers[0]

    def forward(states, **options):
        return own(states + before.seen, **options)

    def note(module, arguments, output):
        module.seen = output

    before.register_forward_hook(note)
    decoder.layers[1].forward = forward
    with Buffers() as buffers:
        sweep = Sweep(model, windows(1), buffers)
        sweep.forward()
        with torch.no_grad():
            expected = decoder(windows(1)).last_hidden_state[0]
        assert torch.equal(sweep.final(0), expected)


def test_what_is_tried_is_tried_once(monkeypatch):
    model = make_tiny_model()
    tried = []
    own = sweeps._tried
    monkeypatch.setattr(sweeps, "_tried", lambda *a: (tried.append(1), own(*a))[1])
    for _ in range(2):
        Sweep(model, windows(), Buffers())
    assert tried == [1]
