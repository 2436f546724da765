"""Logits of last hidden states are the model's own, whatever it does to them."""

import pytest
import torch
import torch.nn.functional as F
from model_types import tiny_model_of_type

from sparse_runtime.clusters.tuning.student import divergence
from sparse_runtime.errors import UnsupportedArchitectureError
from sparse_runtime.eval.quality.perplexity import score_text
from sparse_runtime.models.ffn_layers import decoder_of
from sparse_runtime.models.output_head import output_head

IDS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))
#: Where logits are more than a matrix times states, by a scale or a bound.
OTHERS = ["cohere", "cohere2", "gemma2", "granite", "minicpm3", "nanochat", "vaultgemma"]
PLAIN = ["llama", "opt", "gpt2", "bart", "mixtral", "llava", "qwen2_5_vl", "xlnet"]


@pytest.fixture(params=[*OTHERS, *PLAIN])
def model(request):
    model = tiny_model_of_type(request.param)
    if request.param == "granite":
        model.config.logits_scaling = 8.0
    return model


@torch.no_grad()
def test_logits_are_the_models_own(model):
    expected = model(input_ids=IDS, use_cache=False).logits
    states = decoder_of(model)(input_ids=IDS, use_cache=False).last_hidden_state
    head = output_head(model)
    assert (head is model.get_output_embeddings()) == (model.config.model_type in PLAIN)
    torch.testing.assert_close(head(states), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head(states[1, 3:7]), expected[1, 3:7], rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(decoder_of(model))


@torch.no_grad()
def test_perplexity_and_divergence_are_of_these_logits(model):
    logits = model(input_ids=IDS, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    score = score_text(model, IDS.flatten(), window=IDS.shape[1])
    assert score.perplexity == pytest.approx(loss.exp().item(), rel=1e-4)
    states = decoder_of(model)(input_ids=IDS, use_cache=False).last_hidden_state
    assert divergence(model, {}, IDS, states) == pytest.approx(0, abs=1e-6)


def test_a_model_without_such_a_head_is_refused():
    model = tiny_model_of_type("llama")
    original = type(model).forward

    class Odd(type(model)):
        def forward(self, *args, **kwargs):
            return original(self, *args, **kwargs, output_hidden_states=True).hidden_states[-5]

    model.__class__ = Odd
    with pytest.raises(UnsupportedArchitectureError, match="logits of Odd cannot be made"):
        output_head(model)
