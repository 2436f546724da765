"""Latency of weights in planes on a GPU, beside the float FFNs that they were made from.

python -m sparse_runtime.eval.latency.gpu_planes FIGURES.json

Mistral's shape with random weights, 5 and 6 bits, attention and head too. Of the neurons 80 % are
looked at, some 40 % counted and 20 % refined; beside that all of them are read with all bits. FFNs run
over several layers in one go, and variants take turns, as in ``gpu.py``; all decode steps are timed in
one run.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.api import sparse_modules, sparsify, unsparsify
from sparse_runtime.config import SparseConfig
from sparse_runtime.cost import PlaneCost
from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.latency.ffn_checks import DenseFFN, tokens_for, verify_outputs
from sparse_runtime.eval.latency.gpu import captured, copy_bandwidth, on_device, time_decode
from sparse_runtime.eval.latency.host import host_record
from sparse_runtime.eval.latency.shapes import HALF_REFINED, random_model, staged_clusters
from sparse_runtime.ffn.counts import read_counts
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.ffn.sparse_planes import SparsePlaneFFN
from sparse_runtime.files import write_json
from sparse_runtime.kernels.operands import Counters
from sparse_runtime.kernels.plane_op import routed_plane_ffn
from sparse_runtime.kernels.plane_reference import plane_ffn_reference
from sparse_runtime.models.ffn_layers import find_ffn_layers

# As in gpu.py.
_LAYERS = 8
_DECODE = SparseConfig(backend="triton", check_fingerprint=False, tau=HALF_REFINED)
_ALL_SPARSE = replace(_DECODE, prefill="sparse")
#: What is measured, unless told otherwise.
BITS = (5, 6)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def bench_gpu_planes(
    make_model: Callable[[], Any],
    device: torch.device,
    *,
    bits: Sequence[int] = BITS,
    batches: Sequence[int] = BATCHES,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 20,
) -> dict[str, Any]:
    """Time a model in floats and in planes.

    Args:
        make_model: makes the float model, the same each time, on the CPU; each format packs one.
        device: to run on.
        bits: of the weights.
        batches: tokens per call of the FFNs.
        prompt_tokens: length of the random prompt before the decode steps.
        new_tokens: decode steps per run.
        repeats: runs of each variant of the FFNs.

    Returns:
        ``copy_gbps``; ``ffn``: rows of ``bits``, ``batch``, shares of the neurons ``looked_at``,
        ``counted`` and ``refined``, microseconds of one FFN by name and, for one token, GB/s of what it
        reads; ``decode``: rows of ``bits`` and milliseconds of a step with one sequence; ``host``.

    Raises:
        SparseRuntimeError: outputs are not those of the reference, or the kernels cannot run.
    """
    result: dict[str, Any] = {"copy_gbps": copy_bandwidth(device), "ffn": [], "decode": []}
    steps: dict[str, list[float]] = {}
    lengths = (1, prompt_tokens, new_tokens)
    for number in bits:
        model = make_model()
        clusters = staged_clusters(model)
        model = model.to(device)
        steps = steps or time_decode(model, *lengths, "dense")
        floats = [DenseFFN.of(layer) for layer in find_ffn_layers(model)[:_LAYERS]]
        pack_model(model, number, linears=number)
        sparsify(model, clusters, config=_ALL_SPARSE)
        modules = [m for m in sparse_modules(model)[:_LAYERS] if isinstance(m, SparsePlaneFFN)]
        verify_outputs(modules[:2], reference=_reference)
        verify_outputs(modules[:2], _rows_instead, reference=_all_rows, tokens=(1, 5, 20))
        for batch in batches:
            row = _bench_ffn(modules, floats, batch, repeats)
            result["ffn"].append({"bits": number, "batch": batch, **row})
        unsparsify(model)  # to the packed model
        del floats, modules
        seconds = steps | time_decode(model, *lengths, "rows")
        sparsify(model, clusters, config=_DECODE)
        seconds |= time_decode(model, *lengths, "sparse")
        medians = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
        result["decode"].append({"bits": number, **medians})
        del model  # before the next one is made
    return {**result, "host": host_record(device)}


def _reference(module: SparseFFN, x: Tensor, ids: Tensor) -> Tensor:
    assert isinstance(module, SparsePlaneFFN)
    unread = Counters(torch.zeros_like(module.cluster_counts), torch.zeros_like(module.row_counts))
    objects = (module.tables, module.stages, module.router, module.compensation, unread)
    return routed_plane_ffn(x, module.planes, *objects, backend="reference", cluster_ids=ids)


def _all_rows(module: SparseFFN, x: Tensor, ids: Tensor) -> Tensor:
    assert isinstance(module, SparsePlaneFFN)
    return plane_ffn_reference(x, module.planes)


def _rows_instead(module: SparseFFN, x: Tensor) -> Tensor:
    module(x)  # is counted, and so seen to run
    return module.dense(x)


def _bench_ffn(
    modules: Sequence[SparsePlaneFFN], floats: Sequence[DenseFFN], batch: int, repeats: int
) -> dict[str, Any]:
    """Time FFNs on hidden states [batch, H]: floats, all rows of the planes, and sparse."""
    inputs = [tokens_for(module, batch) for module in modules]
    device = inputs[0].device

    def over_layers(ffns: Sequence[Callable[[Tensor], Any]]) -> Callable[[], None]:
        def run() -> None:
            for ffn, x in zip(ffns, inputs, strict=True):
                ffn(x)

        return run

    run_floats = over_layers(floats)
    run_rows = over_layers([module.dense for module in modules])
    run_sparse = over_layers(modules)
    with torch.inference_mode():
        calls = {
            "float_graph": captured(run_floats, device),
            "rows_eager": run_rows,
            "rows_graph": captured(run_rows, device),
            "sparse_eager": run_sparse,
            "sparse_graph": captured(run_sparse, device),
        }
        for module in modules:
            module.reset_counts()
        seconds = on_device(calls, device, repeats)
    row: dict[str, Any] = {name: 1e6 * taken / len(modules) for name, taken in seconds.items()}
    cost = modules[0].cost
    assert isinstance(cost, PlaneCost)
    counts = [read_counts(module) for module in modules]
    tokens = sum(count.sparse_tokens for count in counts)
    looked = sum(count.looked_at for count in counts) / tokens
    counted = sum(count.computed for count in counts) / tokens
    refined = sum(count.refined for count in counts) / tokens
    for name, number in (("looked_at", looked), ("counted", counted), ("refined", refined)):
        row[name] = number / cost.intermediate_size
    if batch == 1:
        row["rows_gbps"] = cost.whole_bytes / row["rows_graph"] / 1e3
        row["sparse_gbps"] = cost.sparse_bytes(counted, looked, refined) / row["sparse_graph"] / 1e3
    return row


def main(figures: str) -> None:
    """Measure Mistral's shape on the GPU and write the figures.

    Raises:
        SparseRuntimeError: there is no GPU, or the outputs are wrong.
    """
    if not torch.cuda.is_available():
        raise SparseRuntimeError(
            "torch finds no GPU; expected one, for nothing else is measured here"
        )
    path = Path(figures)
    result = bench_gpu_planes(lambda: random_model("mistral-7b"), torch.device("cuda"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SparseRuntimeError as failure:
        sys.exit(f"error: {failure}")
