"""The page of model types, by a few of them."""

from sparse_runtime.eval.report.models_markdown import judged, model_classes, models_markdown


def test_a_page():
    classes = model_classes()
    assert {"mistral", "qwen3", "gemma3", "phi3", "opt", "mixtral", "llava"} <= set(classes)
    types = [
        judged(kind, classes[kind])
        for kind in ("qwen3", "phi3", "phi", "opt", "gpt_oss", "deepseek_v3")
    ]
    assert types[0].form == "gated: `gate_proj`, `up_proj`, `down_proj`; silu"
    assert types[1].form == "fused: `gate_up_proj`, `down_proj`; silu"
    assert types[2].form == "plain: `fc1`, `fc2`; gelu_tanh, biases"
    assert types[3].form == "plain: `fc1`, `fc2`; relu, biases, inline"
    assert "experts of another kind" in types[4].reason
    gated, experts = "gated: `gate_proj`, `up_proj`, `down_proj`; silu", "experts: `gate_up_proj`"
    assert types[5].form == f"{gated}; {experts}, `down_proj`; silu"
    broken = judged("none", "NoModel")
    assert broken.form is None
    assert broken.reason.startswith("its default config makes no model")
    text = models_markdown([*types, broken], "5.0")
    assert "5 of 7 types can run sparse" in text
    assert "| phi3 | fused: `gate_up_proj`, `down_proj`; silu |" in text
    assert "| gpt_oss | model.layers.0.mlp.experts (GptOssExperts) holds experts" in text
