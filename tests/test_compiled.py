"""Compiled decode steps, and what is said where they cannot be had."""

import pytest
import torch
from helpers import IDS, logits, make_tiny_model

from sparse_runtime import compiled_decode
from sparse_runtime.compiled import compiling
from sparse_runtime.errors import CompilationError


@pytest.fixture(autouse=True)
def new_caches():
    """Torch compiles only so many graphs of one function, and other tests may have had some."""
    torch.compiler.reset()


def tokens(model, **options):
    with torch.inference_mode():
        return model.generate(
            IDS, do_sample=False, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **options
        )


def broken(*arguments, **options):
    torch._dynamo.graph_break()


def test_options_are_for_generate(tiny_model):
    options = compiled_decode(tiny_model, 129)
    assert options["past_key_values"].layers[0].max_cache_len == 256
    assert options["compile_config"].fullgraph
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    options["compile_config"].backend = backend
    expected = tokens(make_tiny_model())
    with compiling(tiny_model):
        assert torch.equal(tokens(tiny_model, **options), expected)
    assert len(graphs) == 1  # of all decode steps; the prompt runs eagerly


def test_what_cannot_be_captured_is_named(tiny_model):
    tiny_model.model.layers[0].self_attn.forward = broken
    before = tiny_model.config._attn_implementation
    options = compiled_decode(tiny_model, 16)
    step = torch.compile(tiny_model.forward, backend="eager", fullgraph=True)
    tiny_model.set_attn_implementation(before)
    with (
        pytest.raises(CompilationError, match=r"one graph: .*graph_break.*test_compiled\.py"),
        compiling(tiny_model),
    ):
        step(IDS, past_key_values=options["past_key_values"])
    assert tiny_model.config._attn_implementation == before


def test_a_model_that_transformers_cannot_capture_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(type(tiny_model), "_can_compile_fullgraph", False)
    with pytest.raises(CompilationError, match=r"MistralForCausalLM cannot be compiled whole"):
        compiled_decode(tiny_model, 16)
    logits(tiny_model)
