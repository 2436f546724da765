"""docs/compatibility.md as a test: what others do to a model, before and after ``sparsify``.

A row changes a model. Afterwards the sparse model must mean what the dense model with the same
change means: at density 1.0 its logits are the dense model's. Or the change is refused, with a reason.
Rows that leave the model sparse must also give, with looks at real sparsity, what ``sparsify`` on the
changed model gives: nothing derived from the weights may be old.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from changes import (
    PROJECTIONS,
    adapter_disabled,
    add_adapter,
    class_forward_replaced,
    compiled,
    dispatch_removed,
    dispatched,
    dispatched_after,
    edited,
    functional,
    global_hook,
    hook_removed,
    hooked,
    loaded,
    lora,
    old_weight_norm,
    other_activation,
    other_class,
    other_linear,
    other_neurons,
    parametrized,
    pickled,
    pruned,
    quantized,
    replaced_forward,
    weight_subclass,
)
from helpers import IDS, make_tiny_model, needs_library, random_cluster_set
from torch import nn

from sparse_runtime import cost_report, fast_linear, reset_cost, sparsify, unsparsify
from sparse_runtime.errors import BackendUnavailableError, SparseRuntimeError
from sparse_runtime.eval.latency.shapes import random_clusters

pytestmark = [
    needs_library,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@dataclass(frozen=True)
class Row:
    """A change, and what becomes of the model.

    ``before`` and ``after`` sparsify: ``sparse``, ``dense`` (the changed layers run as they stand),
    ``theirs`` (the FFN is no longer ours), or the error's text.
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
    Row("an FFN's class replaced", other_class, "HalvedFFN does not compute", "theirs"),
    Row("its class's forward replaced", class_forward_replaced, "dense", "dense"),
    Row("another number of neurons", other_neurons, "intermediate_size.*48.*44", "dense"),
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
    Row("the activation replaced", other_activation, "sparse", "dense"),
    Row("half", lambda m: m.half(), "sparse", "sparse", 2e-2),
    Row("bfloat16", lambda m: m.to(torch.bfloat16), "sparse", "sparse", 1e-1),
    Row("bfloat16 and back", lambda m: m.to(torch.bfloat16).float(), "sparse", "sparse", 1e-3),
    Row("double", lambda m: m.double(), "float64", "dense"),
    Row("offload", lambda m: cpu_offload(m, torch.device("cpu")), "offloads", "dense"),
    Row("dispatch_model", dispatched, "sparse", "sparse"),
    Row("dispatch_model and its hooks removed", dispatch_removed, "sparse", "sparse"),
    Row(
        "a projection's forward replaced, dispatch_model",
        lambda m: dispatched_after(m, "gate_proj"),
        *["dense"] * 2,
    ),
    Row(
        "an FFN's forward replaced, dispatch_model",
        lambda m: dispatched_after(m, ""),
        "dense",
        "sparse",
    ),
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
    if wanted == "theirs":
        assert report.sparse_tokens == 2 * IDS.numel()
        return
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
        said = {"sparse": "sparse", "dense": "as it stands", "theirs": "your class runs"}
        return said.get(outcome, "refused")

    run = {row.name: (words(row.before), words(row.after)) for row in ROWS}
    assert {
        name: tuple(c.partition(":")[0] for c in cells) for name, cells in written.items()
    } == run
