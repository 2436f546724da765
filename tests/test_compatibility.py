"""docs/compatibility.md as a test: what others do to a model, before and after ``sparsify``.

A row changes a model. Afterwards the sparse model must mean what the dense model with the same
change means: at density 1.0 its logits are the dense model's. Or the change is refused, with a reason.
Rows that leave the model sparse must also give, with looks at real sparsity, what ``sparsify`` on the
changed model gives: nothing derived from the weights may be old.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from helpers import make_tiny_model, random_cluster_set
from torch import nn

from sparse_runtime import cost_report, fast_linear, reset_cost, sparsify, unsparsify
from sparse_runtime.errors import BackendUnavailableError, SparseRuntimeError
from sparse_runtime.eval.latency.shapes import random_clusters
from sparse_runtime.kernels import load_cpu_library

pytestmark = [
    pytest.mark.skipif(not load_cpu_library(), reason="libsparse_ffn_cpu.so is not built"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
IDS = torch.tensor([[5, 9, 2, 7, 1, 3]])
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
        model, quantization.Int8WeightOnlyConfig(), lambda module, name: "mlp" in name
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


@dataclass(frozen=True)
class Row:
    """A change, and what becomes of the model.

    ``before`` and ``after`` sparsify: ``sparse``, ``dense`` (the changed layers run as they stand) or
    the error's text.
    """

    name: str
    change: Callable[[Any], Any]
    before: str
    after: str
    tolerance: float = 2e-5


ROWS = [
    Row("LoRA on the FFN", lambda m: lora(m, PROJECTIONS), "lora.*merge", "dense"),
    Row("LoRA on attention", lambda m: lora(m, ["q_proj", "v_proj"]), "sparse", "sparse"),
    Row("LoRA merged", lambda m: lora(m, PROJECTIONS, merge=True), "sparse", "sparse"),
    Row("LoRA on attention merged", lambda m: lora(m, ["q_proj"], merge=True), "sparse", "sparse"),
    Row("add_adapter", add_adapter, "lora.*merge", "dense"),
    Row("adapter disabled", adapter_disabled, "lora.*merge", "dense"),
    Row("hook on an FFN", lambda m: hooked(m, ""), "sparse", "sparse"),
    Row("pre-hook on an FFN", lambda m: hooked(m, "", pre=True), "sparse", "sparse"),
    Row("hook on a projection", lambda m: hooked(m, "up_proj"), "dense", "dense"),
    Row("pre-hook on a projection", lambda m: hooked(m, "down_proj", pre=True), "dense", "dense"),
    Row("hook on the activation", lambda m: hooked(m, "act_fn"), "dense", "dense"),
    Row("hook removed", hook_removed, "sparse", "sparse"),
    Row("hook on all modules", global_hook, "dense", "dense"),
    Row("an FFN's forward replaced", lambda m: replaced_forward(m, ""), "dense", "sparse"),
    Row(
        "a projection's forward replaced",
        lambda m: replaced_forward(m, "gate_proj"),
        *["dense"] * 2,
    ),
    Row("weight_norm, parametrized", parametrized, "Parametrized.*parametrizations", "dense"),
    Row("weight_norm, old", old_weight_norm, "no parameter named weight", "dense"),
    Row("pruning", pruned, "no parameter named weight", "dense"),
    Row("pruning made permanent", lambda m: pruned(m, remove=True), "sparse", "sparse"),
    Row("torchao", quantized, "Int8Tensor.*unquantized", "dense"),
    Row("a weight of another class", weight_subclass, "HalvedWeight.*unquantized", "dense"),
    Row("load_state_dict", lambda m: loaded(m, assign=False), "sparse", "sparse"),
    Row("load_state_dict, assign", lambda m: loaded(m, assign=True), "sparse", "sparse"),
    *(
        Row(f"{name} edited ({how})", lambda m, n=name, h=how: edited(m, n, h), "sparse", after)
        for name in PROJECTIONS
        for how, after in (
            ("in place", "sparse"),
            ("data", "sparse"),
            ("inference", "sparse"),
            ("replaced", "dense"),
        )
    ),
    Row("a projection replaced", other_linear, "sparse", "sparse"),
    Row("the activation replaced", other_activation, "act_fn is ReLU", "dense"),
    Row("half", lambda m: m.half(), "sparse", "sparse", 2e-2),
    Row("bfloat16", lambda m: m.to(torch.bfloat16), "sparse", "sparse", 1e-1),
    Row("bfloat16 and back", lambda m: m.to(torch.bfloat16).float(), "sparse", "sparse", 1e-3),
    Row("double", lambda m: m.double(), "float64", "dense"),
    Row("offload", lambda m: cpu_offload(m, torch.device("cpu")), "offloads", "dense"),
    Row("dispatch_model", dispatched, "sparse", "sparse"),
    Row("deepcopy", copy.deepcopy, "sparse", "sparse"),
    Row("torch.save and load", pickled, "sparse", "sparse"),
    Row("functional_call", functional, "dense", "dense"),
    Row("torch.compile", compiled, "sparse", "sparse"),
    Row("fast_linear", fast_linear, "sparse", "sparse"),
]


def tables(model, *, full):
    if full:
        # One set holds all but one neuron that outputs nothing: no layer collapses to dense.
        return random_cluster_set(model, 1.0)
    return random_clusters(model, density=0.5, looked=0.5, num_clusters=6, rank=4)


@pytest.fixture(scope="module")
def dense_model():
    return make_tiny_model()


def changed_dense(row, model):
    changed = row.change(copy.deepcopy(model))
    return changed, call(changed)


def call(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_before_sparsify(row, dense_model):
    if row.name == "hook on all modules":
        pytest.skip("the hook is not of the model")
    _, expected = changed_dense(row, dense_model)
    model = copy.deepcopy(dense_model)
    clusters = tables(model, full=True)
    changed = row.change(model)
    target = model if not isinstance(changed, nn.Module) else changed
    options = {"prefill": "sparse", "check_fingerprint": False}
    if row.before not in ("sparse", "dense"):
        with pytest.raises(SparseRuntimeError, match=row.before):
            sparsify(target, clusters, **options)
        torch.testing.assert_close(call(changed), expected, atol=row.tolerance, rtol=0)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sparsify(target, clusters, **options)
        reset_cost(target)
        torch.testing.assert_close(call(changed), expected, atol=row.tolerance, rtol=0)
    check_path(row.before, target, caught)
    unsparsify(target)
    torch.testing.assert_close(call(changed), expected, atol=row.tolerance, rtol=0)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_after_sparsify(row, dense_model):
    _, expected = changed_dense(row, dense_model)
    model = copy.deepcopy(dense_model)
    sparsify(model, tables(model, full=True), prefill="sparse")
    call(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        changed = row.change(model)
        target = changed if isinstance(changed, nn.Module) else model
        reset_cost(target)
        torch.testing.assert_close(call(changed), expected, atol=row.tolerance, rtol=0)
    check_path(row.after, target, caught)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.before == row.after == "sparse"], ids=lambda row: row.name
)
def test_nothing_derived_is_old(row, dense_model):
    """With looks and real sparsity: sparsify then change gives what change then sparsify gives."""
    clusters = tables(dense_model, full=False)
    options = {"prefill": "sparse", "check_fingerprint": False}
    first, second = copy.deepcopy(dense_model), copy.deepcopy(dense_model)
    changed = row.change(first)
    sparsify(changed, clusters, **options)
    expected = call(changed)
    sparsify(second, clusters, **options)
    before = call(second)
    found = call(row.change(second))
    torch.testing.assert_close(found, expected, atol=max(1e-6, row.tolerance * 0.1), rtol=0)
    assert not torch.equal(before, call(dense_model))


def check_path(wanted, model, caught):
    report = cost_report(model)
    said = [str(w.message) for w in caught if "dense" in str(w.message)]
    if wanted == "sparse":
        assert report.dense_tokens == 0
        assert report.sparse_tokens == 3 * IDS.numel()
        return
    assert len(said) == 1, said  # once, with a reason, and not once per layer
    assert "mlp" in said[0]


def test_strict_raises_instead(dense_model):
    model = copy.deepcopy(dense_model)
    sparsify(model, tables(model, full=True), prefill="sparse", strict=True)
    hooked(model, "up_proj")
    with pytest.raises(BackendUnavailableError, match=r"layers\.1\.mlp.*up_proj has hooks"):
        call(model)


def test_the_page_says_what_was_run():
    page = Path(__file__).parents[1].joinpath("docs/compatibility.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.count("|") == 4]
    written = {cells[0]: tuple(cells[1:]) for cells in lines[2:]}

    def words(outcome):
        return {"sparse": "sparse", "dense": "as it stands"}.get(outcome, "refused")

    run = {row.name: (words(row.before), words(row.after)) for row in ROWS}
    assert {
        name: tuple(c.partition(":")[0] for c in cells) for name, cells in written.items()
    } == run
