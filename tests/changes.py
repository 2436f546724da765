"""What others do to a model: the rows of docs/compatibility.md as functions of a tiny model."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from helpers import IDS
from torch import nn
from transformers.models.mistral.modeling_mistral import MistralMLP

PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def mlp(model, index=1):
    return model.get_submodule(f"model.layers.{index}.mlp")


def lora(model, targets, *, scale=8, merge=False):
    peft = pytest.importorskip("peft")

    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=scale, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    return adapted.merge_and_unload() if merge else adapted


def add_adapter(model):
    peft = pytest.importorskip("peft")

    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights=False)
    model.add_adapter(config)
    return model


def adapter_disabled(model):
    add_adapter(model)
    model.disable_adapters()
    return model


def hooked(model, name, *, pre=False):
    module = mlp(model).get_submodule(name) if name else mlp(model)
    if pre:
        module.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    else:
        module.register_forward_hook(lambda module, args, output: output * 1.5)
    return model


def hook_removed(model):
    handle = mlp(model).gate_proj.register_forward_hook(lambda *a: a[2] * 2)
    logits(model)
    handle.remove()
    return model


def replaced_forward(model, name):
    module = mlp(model).get_submodule(name) if name else mlp(model)
    before = module.forward
    module.forward = lambda x: before(x) * 0.5
    return model


def parametrized(model):
    nn.utils.parametrizations.weight_norm(mlp(model).up_proj)
    with torch.no_grad():
        mlp(model).up_proj.parametrizations.weight.original0.mul_(1.5)
    return model


def old_weight_norm(model):
    nn.utils.weight_norm(mlp(model).gate_proj)
    with torch.no_grad():
        mlp(model).gate_proj.weight_g.mul_(1.5)
    return model


def pruned(model, *, remove=False):
    from torch.nn.utils import prune

    prune.l1_unstructured(mlp(model).up_proj, "weight", 0.5)
    if remove:
        logits(model)
        prune.remove(mlp(model).up_proj, "weight")
    return model


class HalvedWeight(torch.Tensor):
    """A weight that means something else than its storage says, as quantized ones do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight = args[:2]
            return nn.functional.linear(x, weight.as_subclass(torch.Tensor) / 2)
        return super().__torch_function__(func, types, args, kwargs or {})


def weight_subclass(model):
    linear = mlp(model).up_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(HalvedWeight))
    return model


def quantized(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(
        model, quantization.Int8WeightOnlyConfig(), lambda module, name: name.endswith("_proj")
    )
    return model


def other_state(model):
    return {key: value * 1.25 for key, value in copy.deepcopy(model.state_dict()).items()}


def loaded(model, *, assign):
    model.load_state_dict(other_state(model), assign=assign)
    return model


def edited(model, name, how):
    weight = mlp(model).get_submodule(name).weight
    with torch.no_grad():
        if how == "in place":
            weight.mul_(1.5)
        elif how == "data":
            weight.data = weight.data * 1.5
        elif how == "inference":
            with torch.inference_mode():
                weight.mul_(1.5)
        else:
            mlp(model).get_submodule(name).weight = nn.Parameter(weight.clone() * 1.5)
    return model


def other_linear(model):
    torch.manual_seed(2)
    mlp(model).gate_proj = nn.Linear(32, 44, bias=False)
    return model


def other_activation(model):
    mlp(model).act_fn = nn.ReLU()
    return model


def dispatched(model):
    """accelerate's hooks on single layers, nothing offloaded."""
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    names += [f"model.layers.{i}" for i in range(3)]
    return dispatch_model(model, dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)


def dispatched_after(model, name):
    """accelerate's hooks over a forward that somebody replaced."""
    return dispatched(replaced_forward(model, name))


def dispatch_removed(model):
    dispatched(model)
    remove_hook_from_submodules(model)
    return model


class HalvedFFN(MistralMLP):
    """An FFN that means something else than its projections say."""

    def forward(self, x):
        return super().forward(x) * 0.5


def other_class(model):
    mlp(model).__class__ = HalvedFFN
    return model


def class_forward_replaced(model):
    """What kernel libraries do: every FFN of the class gets another forward, for one call here."""
    own = MistralMLP.forward

    def call(input_ids):
        MistralMLP.forward = lambda self, x: own(self, x) * 0.5
        try:
            return model(input_ids=input_ids)
        finally:
            MistralMLP.forward = own

    return call


def other_neurons(model):
    torch.manual_seed(2)
    for name, sizes in zip(PROJECTIONS, ((32, 48), (32, 48), (48, 32)), strict=True):
        setattr(mlp(model), name, nn.Linear(*sizes, bias=False))
    return model


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def functional(model):
    weights = {name: value * 1.25 for name, value in model.named_parameters()}

    def call(input_ids):
        return torch.func.functional_call(model, weights, kwargs={"input_ids": input_ids})

    return call


def compiled(model):
    return torch.compile(model, backend="eager")


def global_hook(model):
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 1.01 if isinstance(module, nn.Linear) else None
    )

    def call(input_ids):
        try:
            return model(input_ids=input_ids)
        finally:
            handle.remove()

    return call
