"""docs/benchmarks/gpu.md: the figures of ``bench --device cuda``, or what bytes and launches imply.

python -m sparse_runtime.eval.report.gpu_markdown OUTPUT.md [FIGURES.json [PLANES.json]]

``PLANES.json`` are the figures of ``eval/latency/gpu_planes.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_runtime.cost import FFNCost, PlaneCost, router_parameter_count
from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.latency.gpu import DECODE_BATCHES
from sparse_runtime.eval.latency.gpu_planes import BATCHES as PLANE_BATCHES
from sparse_runtime.eval.latency.gpu_planes import BITS
from sparse_runtime.eval.latency.shapes import SHAPES
from sparse_runtime.eval.report.figures import BENCH_GPU, BENCH_GPU_PLANES, read_figures
from sparse_runtime.eval.report.markdown import command_block, escaped, markdown_table
from sparse_runtime.kernels.planes import PlaneFormat

#: Read bandwidth that implied times are for: about what an H200 reaches of its 4.8 TB/s.
BANDWIDTH = 4.3e12
#: What ``make bench-gpu`` measures.
DENSITIES = (0.3, 0.5, 0.7, 1.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
# The artifact that times are implied for; the benchmark's random one has the same.
_CLUSTERS, _RANK = 256, 128
# Launches of a decode step: routing, gate and up, down; torch's dense FFN has four and its compiled one
# three or four.
LAUNCHES = {"one token": 3, "one token with looks": 4, "several tokens": 4, "planes": 3}
_INTRODUCTION = """# GPU latency

Written by `make bench-gpu`, which first runs the kernels' tests on the card. The opponent is the dense
model compiled with CUDA graphs; eager figures stand beside it because that is what most code runs.
"""


def report(figures: dict[str, Any] | None, planes: dict[str, Any] | None = None) -> str:
    """Markdown of the benchmarks' figures; of what they should be if there are none."""
    parts = [_INTRODUCTION]
    if figures is None:
        parts.append(
            "**Not measured as a whole.** The kernels' tests have run on a card, and so have single "
            "FFNs: docs/LOG.md has those figures. This fills the tables in:\n\n    make bench-gpu\n"
        )
    else:
        parts.append(_machine(figures, f" FFNs alone run on {figures['inputs']}."))
    parts += [_implied(), _ffn(figures), _decode(figures), _planes(planes)]
    return "\n".join(parts)


def _machine(figures: dict[str, Any], more: str = "") -> str:
    host = figures["host"]
    versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    machine = (
        f"{host['date']}, {host['gpu']}, CUDA {host['cuda']}; {versions}; commit "
        f"{host['commit'] or 'unknown'}; a copy reaches {figures['copy_gbps']:.0f} GB/s.{more}"
    )
    return f"{escaped(machine)}\n\n{command_block(host)}"


def _implied() -> str:
    """Bytes and launches by density, of one FFN of Mistral's shape and one token."""
    shape: dict[str, Any] = SHAPES["mistral-7b"]
    hidden_size, neurons = shape["hidden_size"], shape["intermediate_size"]
    extra = router_parameter_count(hidden_size, _CLUSTERS, _RANK)
    cost = FFNCost(hidden_size, neurons, extra)
    rows = [["dense", f"{cost.dense_bytes / 1e6:.0f}", "3–4", _micro(cost.dense_bytes), "1.00×"]]
    for density in DENSITIES:
        size = cost.sparse_bytes(density * neurons)
        rows.append(_counted(f"density {density:g}", "one token", size, cost.dense_bytes))
    looked = FFNCost(hidden_size, neurons, extra, verified=True)
    size = looked.sparse_bytes(0.38 * neurons, 0.65 * neurons)
    name = "0.38 computed, 0.65 looked at"
    rows.append(_counted(name, "one token with looks", size, cost.dense_bytes))
    for bits in BITS:
        form = PlaneFormat.of_bits(bits)
        plane = PlaneCost(hidden_size, neurons, extra, base=form.base, residual=form.residual)
        size = plane.sparse_bytes(0.4 * neurons, 0.8 * neurons, 0.2 * neurons)
        name = f"{bits} bits, all rows"
        rows.append(_counted(name, "planes", plane.whole_bytes, cost.dense_bytes))
        name = f"{bits} bits, 0.8 looked at, 0.4 counted, 0.2 refined"
        rows.append(_counted(name, "planes", size, cost.dense_bytes))
    header = ["one FFN of Mistral-7B, one token", "MB read", "launches"]
    header += [f"µs at {BANDWIDTH / 1e12:g} TB/s", "at most faster by"]
    return (
        f"## Counted\n\n{markdown_table(header, rows)}\nA call of several tokens takes "
        f"{LAUNCHES['several tokens']} launches and reads each row that any token needs once, never "
        "more than the dense FFN. What launches cost inside a CUDA graph is not in these times.\n"
    )


def _counted(name: str, call: str, size: float, dense: float) -> list[str]:
    faster = f"{dense / size:.2f}×"
    return [name, f"{size / 1e6:.0f}", str(LAUNCHES[call]), _micro(size), faster]


def _ffn(figures: dict[str, Any] | None) -> str:
    header = ["cost share", "batch", "dense eager µs", "dense graph", "sparse eager"]
    header += ["sparse graph", "faster by", "GB/s", "of a copy"]
    if figures is None:
        rows = _not_measured(BATCHES, 7)
    else:
        rows = [
            [
                f"{row['cost_share']:.3f}",
                str(row["batch"]),
                *(
                    f"{row[name]:.1f}"
                    for name in ("dense_eager", "dense_graph", "sparse_eager", "sparse_graph")
                ),
                f"{row['speedup']:.2f}×",
                f"{row['gbps']:.0f}" if "gbps" in row else "",
                f"{row['bandwidth_share']:.2f}" if "gbps" in row else "",
            ]
            for row in figures["ffn"]
        ]
    route = "not measured"
    if figures is not None:
        route = " and ".join(f"{row['us']:.1f} µs" for row in figures["route"])
    return f"## One FFN\n\n{markdown_table(header, rows)}\nRouter and look-up alone: {route}.\n"


def _decode(figures: dict[str, Any] | None) -> str:
    header = ["cost share", "batch", "dense eager ms", "dense compiled", "sparse eager"]
    header += ["sparse compiled", "faster by"]
    if figures is None:
        rows = _not_measured(DECODE_BATCHES, 5)
    elif "decode" not in figures:
        return ""
    else:
        names = ("dense_eager", "dense_compiled", "sparse_eager", "sparse_compiled")
        rows = [
            [
                f"{row['cost_share']:.3f}",
                str(row["batch"]),
                *(f"{row[name]:.2f}" for name in names),
                f"{row['speedup']:.2f}×",
            ]
            for row in figures["decode"]
        ]
    return f"## Decode, whole model\n\n{markdown_table(header, rows)}"


def _planes(figures: dict[str, Any] | None) -> str:
    """One FFN and whole decode steps of weights in planes."""
    graphs = ("float_graph", "rows_eager", "rows_graph", "sparse_eager", "sparse_graph")
    steps = ("dense_compiled", "rows_eager", "rows_compiled", "sparse_eager", "sparse_compiled")
    ffn_header = ["bits", "batch", "looked at", "counted", "refined", "floats graph µs"]
    ffn_header += ["all rows eager", "all rows graph", "sparse eager", "sparse graph"]
    ffn_header += ["all rows GB/s", "sparse GB/s"]
    step_header = ["bits", "floats compiled ms", "all rows eager", "all rows compiled"]
    step_header += ["sparse eager", "sparse compiled"]
    unknown = "not measured"
    if figures is None:
        machine = "Not measured.\n"
        ffn = [[str(b), str(n), *[unknown] * 10] for b in BITS for n in PLANE_BATCHES]
        decode = [[str(bits), *[unknown] * 5] for bits in BITS]
    else:
        machine = _machine(figures)
        ffn = [
            [
                str(row["bits"]),
                str(row["batch"]),
                *(f"{row[name]:.2f}" for name in ("looked_at", "counted", "refined")),
                *(f"{row[name]:.1f}" for name in graphs),
                *(f"{row[n]:.0f}" if n in row else "" for n in ("rows_gbps", "sparse_gbps")),
            ]
            for row in figures["ffn"]
        ]
        decode = [
            [str(row["bits"]), *(f"{row[name]:.2f}" for name in steps)] for row in figures["decode"]
        ]
    return (
        "## Weights in planes\n\nAttention and head are in planes too; tokens beyond 16 in a call have "
        f"the rows unpacked, if all are read.\n\n{machine}\n{markdown_table(ffn_header, ffn)}\n"
        f"One sequence, whole model:\n\n{markdown_table(step_header, decode)}"
    )


def _not_measured(batches: Sequence[int], columns: int) -> list[list[str]]:
    return [
        [f"{share:g}", str(batch), *["not measured"] * columns]
        for share in DENSITIES
        for batch in batches
    ]


def _micro(size: float) -> str:
    return f"{1e6 * size / BANDWIDTH:.0f}"


def main() -> None:
    """Write the document named first, from the figures named after it if any."""
    output, *files = map(Path, sys.argv[1:])
    try:
        figures = read_figures(files[0], BENCH_GPU, "bench --device cuda") if files else None
        planes = None
        if len(files) > 1:
            planes = read_figures(files[1], BENCH_GPU_PLANES, "latency.gpu_planes")
    except SparseRuntimeError as error:
        raise SystemExit(f"error: {error}") from None
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(report(figures, planes), encoding="utf-8")


if __name__ == "__main__":
    main()
