"""FFNs over planes beside the memory's speed: one token, all rows and sparse, by format.

``make bench-planes``, which is ``python -m sparse_runtime.eval.latency.plane_ffns
docs/benchmarks/planes.md``.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.latency.host import ReadBandwidth, host_record
from sparse_runtime.eval.latency.shapes import SHAPES
from sparse_runtime.eval.latency.timing import wall_seconds
from sparse_runtime.eval.report.markdown import command_block, escaped, markdown_table
from sparse_runtime.files import write_text
from sparse_runtime.kernels.bitmaps import pack_bits
from sparse_runtime.kernels.cpu.library import load_cpu_library
from sparse_runtime.kernels.operands import (
    ClusterTables,
    Compensation,
    Counters,
    RouterWeights,
    Stages,
)
from sparse_runtime.kernels.plane_op import dense_plane_ffn, routed_plane_ffn
from sparse_runtime.kernels.planes import NeuronPlanes, PlaneFormat

BITS = (3, 4, 5, 6, 8)
ROUNDS = 7
# Of all neurons: candidates, those of them that are counted, and those that are refined.
_LOOKED, _COUNTED, _REFINED = 0.8, 0.4, 0.2
# Weights of the layers that take turns are more than any cache holds.
_LEAST_BYTES = 3e8


def random_planes(form: PlaneFormat, hidden_size: int, neurons: int) -> NeuronPlanes:
    """Planes of random codes with one scale, for latency."""
    sizes = form.look_size(hidden_size), form.count_size(hidden_size), form.refine_size(hidden_size)
    look, count, refine = (torch.randint(256, (neurons, n), dtype=torch.uint8) for n in sizes)
    groups = -(-hidden_size // 64)
    scale = torch.full((1, groups), 0.01, dtype=torch.bfloat16).view(torch.uint8)
    for records, copies in ((look, 2), (count, 1)):
        records[:, records.shape[1] - copies * 2 * groups :] = scale.repeat(1, copies)
    return NeuronPlanes(look, count, refine, form, hidden_size)


def bench_plane_ffns(
    hidden_size: int, neurons: int, bits: Sequence[int] = BITS, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Time FFNs of random planes on the CPU's kernels, one bfloat16 token, formats in turns.

    Returns:
        ``read_gbps``, its median, and for each format in ``formats``: ``bits``; ``dense_gbps`` and
        ``sparse_gbps``, 10⁹ bytes of what is read per second; ``dense_ratio`` and ``sparse_ratio``,
        medians of these over the bandwidth of the same round; ``speedup`` of sparse over dense.

    Raises:
        SparseRuntimeError: the kernels cannot run here.
    """
    if not load_cpu_library():
        raise SparseRuntimeError("the C++ kernels are not there: nothing was measured")
    torch.manual_seed(0)
    x = torch.randn(1, hidden_size, dtype=torch.bfloat16)
    runs = [_Run(PlaneFormat.of_bits(b), hidden_size, neurons) for b in bits]
    bandwidth, read = ReadBandwidth(), list[float]()
    for _ in range(rounds):
        read.append(bandwidth())
        for run in runs:
            run.time(x, read[-1])
    return {"read_gbps": statistics.median(read), "formats": [run.record() for run in runs]}


class _Run:
    """One format."""

    def __init__(self, form: PlaneFormat, hidden_size: int, neurons: int) -> None:
        self._form, self._hidden_size = form, hidden_size
        per_neuron = self._bytes(1, 1, 1)
        layers = int(_LEAST_BYTES / (per_neuron * neurons)) + 1
        self._layers = [random_planes(form, hidden_size, neurons) for _ in range(layers)]
        self._dense_bytes = layers * neurons * per_neuron
        order = torch.rand(neurons).argsort()
        candidates = torch.zeros(1, neurons, dtype=torch.bool)
        candidates[0, order[: round(_LOOKED * neurons)]] = True
        factors = torch.zeros(neurons)  # evidence is |h|: these decide whatever it is
        factors[order[: round(_COUNTED * neurons)]] = 1e10
        factors[order[: round(_REFINED * neurons)]] = 1e30
        self._tables = ClusterTables(pack_bits(candidates))
        self._stages = Stages(factors, 1e20, 0.0)
        self._samples: list[tuple[float, float, float]] = []  # dense and sparse GB/s, bandwidth

    def _bytes(self, looked: float, counted: float, refined: float) -> float:
        form, size = self._form, self._hidden_size
        return (
            looked * form.look_size(size)
            + counted * form.count_size(size)
            + refined * form.refine_size(size)
        )

    def time(self, x: Tensor, bandwidth: float) -> None:
        """A round."""
        counters = Counters(torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
        router = RouterWeights(x.new_zeros(1, x.shape[1]), x.new_zeros(1))

        def dense() -> None:
            for planes in self._layers:
                dense_plane_ffn(x, planes)

        def sparse() -> None:
            for planes in self._layers:
                routed_plane_ffn(
                    x,
                    planes,
                    self._tables,
                    self._stages,
                    router,
                    Compensation(),
                    counters,
                    backend="cpu",
                )

        seconds = wall_seconds(dense), wall_seconds(sparse)
        counted, looked, refined = counters.rows.tolist()
        read = self._dense_bytes, self._bytes(looked, counted, refined)
        gbps = [n / s / 1e9 for n, s in zip(read, seconds, strict=True)]
        self._samples.append((gbps[0], gbps[1], bandwidth))
        self._share = read[1] / read[0]

    def record(self) -> dict[str, Any]:
        """Medians, as JSON."""
        dense, sparse, bandwidth = zip(*self._samples, strict=True)

        def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
            return statistics.median(a / b for a, b in zip(values, others, strict=True))

        return {
            "bits": self._form.bits,
            "dense_gbps": statistics.median(dense),
            "sparse_gbps": statistics.median(sparse),
            "dense_ratio": median_ratio(dense, bandwidth),
            "sparse_ratio": median_ratio(sparse, bandwidth),
            "speedup": median_ratio(sparse, dense) / self._share,
        }


def report(record: dict[str, Any], hidden_size: int, neurons: int) -> str:
    """Markdown of a record of :func:`bench_plane_ffns`."""
    host = host_record()
    rows = [
        [str(r["bits"])]
        + [f"{r[name]:.1f}" for name in ("dense_gbps", "sparse_gbps")]
        + [f"{r[name]:.2f}" for name in ("dense_ratio", "sparse_ratio", "speedup")]
        for r in record["formats"]
    ]
    header = ["bits", "all rows, GB/s", "sparse, GB/s", "all rows ÷ reading", "sparse ÷ reading"]
    return "\n".join(
        (
            "# FFNs in planes\n",
            "Written by `make bench-planes`: one FFN of Mistral's shape, one token, random weights of "
            "more layers than a cache holds. Sparse, 80 % of the neurons are looked at, 40 % counted "
            "and 20 % refined. GB/s count what is read; *reading* is the library's fastest reading "
            "loop in the same round. Medians.\n",
            command_block({"command": "make bench-planes"}),
            f"{host['date']}, {escaped(host['cpu'])}, {host['isa']}, {host['threads']} threads, commit "
            f"{host['commit']}; hidden size {hidden_size}, {neurons} neurons; reading "
            f"{record['read_gbps']:.1f} GB/s.\n",
            markdown_table([*header, "all rows ÷ sparse, time"], rows),
        )
    )


def main(document: str) -> None:
    """Measure Mistral's shape, and write the document."""
    shape: dict[str, Any] = SHAPES["mistral-7b"]
    sizes = shape["hidden_size"], shape["intermediate_size"]
    write_text(Path(document), report(bench_plane_ffns(*sizes), *sizes))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SparseRuntimeError as failure:
        sys.exit(f"error: {failure}")
