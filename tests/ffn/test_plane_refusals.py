"""What cannot be packed into planes, by name, and with the model left as it was."""

import pytest
import torch
from helpers import logits, random_cluster_set
from helpers import make_tiny_model_of as tiny
from peft import LoraConfig, get_peft_model
from torch import nn

from sparse_runtime import sparsify
from sparse_runtime.errors import (
    AlreadySparseError,
    ModelError,
    UnsupportedArchitectureError,
)
from sparse_runtime.ffn.plane_packing import pack_model


def spoiled(model, name, value):
    with torch.no_grad():
        model.get_parameter(name)[1, 2] = value
    return model


class TestRefusals:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize(
        "name", ["model.layers.2.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight"]
    )
    def test_not_a_number(self, name, value):
        self.refused(spoiled(tiny(), name, value), ModelError, name, linears=8)

    def refused(self, model, error, *texts, **options):
        """An error leaves the model as it was."""
        modules, state = list(model.modules()), model.state_dict()
        config = getattr(model, "config", None).to_dict()
        with pytest.raises(error) as raised:
            pack_model(model, 6, **options)
        assert all(text in str(raised.value) for text in texts), raised.value
        assert [id(m) for m in model.modules()] == [id(m) for m in modules]
        assert model.config.to_dict() == config
        after = model.state_dict()
        assert after.keys() == state.keys()
        assert all(after[key].data_ptr() == state[key].data_ptr() for key in state)

    @pytest.mark.parametrize("name", ["model.layers.1.mlp", "model.layers.1.mlp.up_proj"])
    def test_hooks(self, name):
        model = tiny()
        model.get_submodule(name).register_forward_hook(lambda *_: None)
        self.refused(model, UnsupportedArchitectureError, "model.layers.1.mlp", "has hooks")

    def test_a_hook_on_the_head(self):
        model = tiny()
        model.lm_head.register_forward_hook(lambda *_: None)
        self.refused(model, UnsupportedArchitectureError, "lm_head has hooks", linears=8)
        pack_model(model, 6)

    def test_parametrizations(self):
        model = tiny()
        nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
        self.refused(model, UnsupportedArchitectureError, "model.layers.1.mlp", "parametriz")

    @pytest.mark.parametrize(
        ("target", "options"),
        [("up_proj", {}), ("q_proj", {"linears": 8}), ("lm_head", {"linears": 8})],
    )
    def test_adapters(self, target, options):
        model = get_peft_model(tiny(), LoraConfig(target_modules=[target], init_lora_weights=False))
        name = "lm_head" if target == "lm_head" else "model.layers.0"
        self.refused(model, UnsupportedArchitectureError, name, "dapter", **options)

    def test_an_adapter_on_attention_alone(self):
        model = get_peft_model(
            tiny(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        )
        before = logits(model)
        pack_model(model, 8)
        assert 0 < (logits(model) - before).abs().max() < 1

    def test_buffers_beside_the_projections(self):
        model = tiny()
        model.model.layers[0].mlp.register_buffer("seen", torch.zeros(1))
        self.refused(model, UnsupportedArchitectureError, "model.layers.0.mlp", "seen")

    def test_sparse_and_packed_models(self):
        model = tiny()
        sparsify(model, random_cluster_set(model, 0.4))
        with pytest.raises(AlreadySparseError, match="unsparsify"):
            pack_model(model)
        model = pack_model(tiny(), 6)
        self.refused(model, UnsupportedArchitectureError, "packed already", "unpack_model")

    @pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "torchao"])
    def test_quantized_models(self, method):
        model = tiny()
        model.config.quantization_config = {"quant_method": method, "load_in_8bit": True}
        with pytest.raises(UnsupportedArchitectureError, match=f"by {method}.*float checkpoint"):
            pack_model(model)

    def test_a_linear_layer_of_another_class(self):
        class Int8Linear(nn.Linear):
            pass

        model = tiny()
        model.model.layers[0].self_attn.q_proj.__class__ = Int8Linear
        self.refused(
            model,
            UnsupportedArchitectureError,
            "layers.0.self_attn.q_proj",
            "Int8Linear",
            linears=8,
        )

    def test_weights_that_are_not_there(self):
        with torch.device("meta"):
            model = tiny()
        for options in ({}, {"bits": None, "linears": 8}):
            with pytest.raises(
                UnsupportedArchitectureError, match=r"offloaded.*quantization_config"
            ):
                pack_model(model, **options)

    @pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
    def test_biases_that_are_no_numbers(self, name):
        model = tiny("llama", mlp_bias=True)
        full = f"model.layers.1.mlp.{name}.bias"
        with torch.no_grad():
            model.get_parameter(full)[3] = float("inf")
        self.refused(model, ModelError, full, "NaN or infinity")
