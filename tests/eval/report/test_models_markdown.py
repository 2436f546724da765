"""The page of model types, by a few of them."""

from sparse_runtime.eval.report.models_markdown import judged, model_classes, models_markdown


def test_a_page():
    classes = model_classes()
    assert {"mistral", "qwen3", "gemma3", "phi3", "opt", "mixtral", "llava"} <= set(classes)
    types = [judged(kind, classes[kind]) for kind in ("qwen3", "phi3", "phi", "opt", "mixtral")]
    assert types[0].form == "gated: `gate_proj`, `up_proj`, `down_proj`; silu"
    assert types[1].form == "fused: `gate_up_proj`, `down_proj`; silu"
    assert types[2].form == "plain: `fc1`, `fc2`; gelu_tanh, biases"
    assert types[3].form == "plain: `fc1`, `fc2`; relu, biases, inline"
    assert "is a mixture of experts" in types[4].reason
    broken = judged("none", "NoModel")
    assert broken.form is None
    assert broken.reason.startswith("its default config makes no model")
    text = models_markdown([*types, broken], "5.0")
    assert "4 of 6 types can run sparse" in text
    assert "| phi3 | fused: `gate_up_proj`, `down_proj`; silu |" in text
    assert "| mixtral | model.layers.0.mlp.experts (MixtralExperts) is a mixture" in text
