"""Markdown from the JSON files of ``sparse-runtime bench``; what ``make bench`` calls.

python -m sparse_runtime.eval.report.bench_markdown OUTPUT.md FIGURES.json…
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.report.figures import BENCH_DOCUMENT, read_figures
from sparse_runtime.eval.report.markdown import command_block, escaped, markdown_table

_VARIANTS = {
    "dense": "dense, as transformers runs it",
    "dense_fast": "dense + fast linears",
    "sparse": "sparse",
    "sparse_fast": "sparse + fast linears",
}
_INTRODUCTION = """# CPU latency

Written by `make bench`; medians of variants that took turns in one run. *Prepacked* is the best dense
FFN torch has: weights reordered by oneDNN, as `torch.compile` with freezing does. *Fast linears* run
the other linear layers (in the dense model the FFN's too) by the sparse FFN's kernels, without skipping
anything: what sparsity gains is sparse ÷ dense, and sparse + fast ÷ dense + fast. *Share* is
achieved ÷ measured read bandwidth. The ceiling counts bytes: a decode step cannot gain more. FFNs alone
run on the model's own hidden states, those of random weights on noise spread over the clusters.
"""


def report(results: Sequence[dict[str, Any]]) -> str:
    """Markdown of several results of ``bench``."""
    parts = [_INTRODUCTION]
    for result in results:
        parts += [f"## {escaped(_title(result))}\n", _host(result["host"])]
        for run in result["runs"]:
            parts += [_mlp(run), _decode(run, result["prompt_tokens"])]
        parts.append(_prediction(result["runs"][0]["prediction"]))
        parts.append(_tokens(result["runs"][0]["mlp"]["tokens"]))
        if result["batches"]:
            parts.append(_batches(result["batches"]))
        memory = result["memory"]
        parts.append(
            f"Resident memory: dense {memory['dense_mib']:.0f} MiB, sparse "
            f"{memory['sparse_mib']:.0f} MiB; weights {memory['weights_mib']:.0f} MiB, artifact "
            f"{memory['artifact_mib']:.0f} MiB; (weights + growth) ÷ weights = "
            f"{memory['ratio']:.3f}.\n"
        )
    return "\n".join(parts)


def _title(result: dict[str, Any]) -> str:
    budget = "" if result["budget"] is None else f", budget {result['budget']:g}"
    # Random clusters come with looks and without in one result.
    looks = {None: "", True: ", with looks", False: ", without looks"}
    return f"{result['model']}{budget}{looks[result['verify'] if result['clusters'] else None]}"


def _host(host: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    machine = f"{host['date']}, {host['cpu']}, {host['threads']} threads; {versions}; commit "
    machine += f"{host['commit'] or 'unknown'}."
    return f"{escaped(machine)}\n\n{command_block(host)}"


def _mlp(run: dict[str, Any]) -> str:
    mlp = run["mlp"]
    rows = [
        ("F.linear", mlp["dense_ms"], None),
        ("prepacked", mlp["prepacked_ms"], None),
        ("all rows, our kernel", mlp["all_rows_ms"], mlp["all_rows_gbps"]),
        ("sparse", mlp["sparse_ms"], mlp["gbps"]),
    ]
    table = markdown_table(
        ("one FFN, one token", "ms", "sparse is faster by", "GB/s", "share"),
        (
            (
                name,
                f"{ms:.3f}",
                f"{ms / mlp['sparse_ms']:.2f}×",
                f"{gbps:.1f}" if gbps else "",
                f"{gbps / mlp['read_gbps']:.2f}" if gbps else "",
            )
            for name, ms, gbps in rows
            if ms is not None
        ),
    )
    looked_at = f", {mlp['looked_at']:.2f} looked at" if mlp["looked_at"] else ""
    return (
        f"### Density {mlp['density']:.2f}{looked_at}, cost share {run['cost_share']:.3f}, read "
        f"bandwidth {mlp['read_gbps']:.1f} GB/s\n\n{table}"
    )


def _decode(run: dict[str, Any], prompt_tokens: int) -> str:
    decode, prefill = run["decode"], run["prefill"]
    table = markdown_table(
        ("decode", "ms per token", "p90", "tokens/s", "GB/s"),
        (
            (
                name,
                f"{decode[key + '_ms']:.1f}",
                f"{decode[key + '_p90_ms']:.1f}",
                f"{decode[key + '_tok_s']:.1f}",
                f"{decode['gbps'][key]:.1f}",
            )
            for key, name in _VARIANTS.items()
        ),
    )
    return (
        f"{table}\nDecode gains {decode['speedup']:.2f}× (sparse ÷ dense), "
        f"{decode['speedup_fast']:.2f}× with fast linears on both sides, ceiling "
        f"{decode['ceiling']:.2f}×; all together {decode['speedup_total']:.2f}×. Prefill of "
        f"{prompt_tokens} tokens: {prefill['dense_ms']:.0f} → {prefill['sparse_ms']:.0f} ms "
        f"({prefill['speedup']:.2f}×; nothing is skipped there, the kernel is another one).\n"
    )


def _prediction(prediction: dict[str, Any]) -> str:
    table = markdown_table(
        ("prediction, one token", "µs", "of the dense FFN", "KiB read"),
        (
            (
                escaped(row["name"]),
                f"{1e3 * row['ms']:.0f}",
                f"{row['share']:.1%}",
                f"{row['bytes'] / 1024:.0f}",
            )
            for row in prediction["rows"]
        ),
    )
    return (
        f"{table}\nThe dense FFN by our kernels takes {prediction['ffn_ms']:.3f} ms in that run.\n"
    )


def _tokens(rows: Sequence[dict[str, Any]]) -> str:
    return markdown_table(
        (
            "tokens in a call",
            "F.linear ms",
            "prepacked",
            "all rows",
            "sparse",
            "by the rule",
            "path",
        ),
        (
            (
                str(row["tokens"]),
                *(
                    f"{row[name]:.2f}" if name in row else ""
                    for name in ("dense_ms", "prepacked_ms", "all_rows_ms", "sparse_ms")
                ),
                f"{row['chosen_ms']:.2f}" if "chosen_ms" in row else "",
                escaped(row.get("path", "sparse")),
            )
            for row in rows
        ),
    )


def _batches(rows: Sequence[dict[str, Any]]) -> str:
    return markdown_table(
        ("batch", "dense ms per step", "sparse", "faster by"),
        (
            (
                str(row["batch"]),
                f"{row['dense_ms']:.1f}",
                f"{row['sparse_ms']:.1f}",
                f"{row['speedup']:.2f}×",
            )
            for row in rows
        ),
    )


def main() -> None:
    """Write the report named first from the JSON files named after it."""
    output, *files = map(Path, sys.argv[1:])
    try:
        results = [read_figures(file, BENCH_DOCUMENT, "bench") for file in files]
    except SparseRuntimeError as error:
        raise SystemExit(f"error: {error}") from None
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(report(results), encoding="utf-8")


if __name__ == "__main__":
    main()
