"""docs/benchmarks/gpu.md: the figures of ``bench --device cuda``, or what bytes and launches imply.

python -m sparse_runtime.eval.report.gpu_markdown OUTPUT.md [FIGURES.json]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_runtime.cost import FFNCost, router_parameter_count
from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.latency.gpu import DECODE_BATCHES
from sparse_runtime.eval.latency.shapes import SHAPES
from sparse_runtime.eval.report.figures import BENCH_GPU, read_figures
from sparse_runtime.eval.report.markdown import command_block, escaped, markdown_table

#: Read bandwidth that implied times are for: about what an H200 reaches of its 4.8 TB/s.
BANDWIDTH = 4.3e12
#: What ``make bench-gpu`` measures.
DENSITIES = (0.3, 0.5, 0.7, 1.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
# The artifact that times are implied for; the benchmark's random one has the same.
_CLUSTERS, _RANK = 256, 128
# Launches of a decode step: routing, gate and up, down; torch's dense FFN has four and its compiled one
# three or four.
LAUNCHES = {"one token": 3, "one token with looks": 4, "several tokens": 4}
_INTRODUCTION = """# GPU latency

Written by `make bench-gpu`, which first runs the kernels' tests on the card. The opponent is the dense
model compiled with CUDA graphs; eager figures stand beside it because that is what most code runs.
"""


def report(figures: dict[str, Any] | None) -> str:
    """Markdown of a benchmark's figures; of what they should be if there are none."""
    parts = [_INTRODUCTION]
    if figures is None:
        parts.append(
            "**Not measured: no GPU was at hand.** The kernels are tested under Triton's interpreter; "
            "nothing below was seen on a card. This fills the tables in, in one call of minutes:\n\n"
            "    make bench-gpu\n"
        )
    else:
        host = figures["host"]
        versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
        machine = (
            f"{host['date']}, {host['gpu']}, CUDA {host['cuda']}; {versions}; commit "
            f"{host['commit'] or 'unknown'}; a copy reaches {figures['copy_gbps']:.0f} GB/s. FFNs "
            f"alone run on {figures['inputs']}."
        )
        parts.append(f"{escaped(machine)}\n\n{command_block(host)}")
    parts += [_implied(), _ffn(figures), _decode(figures)]
    return "\n".join(parts)


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
    except SparseRuntimeError as error:
        raise SystemExit(f"error: {error}") from None
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(report(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
