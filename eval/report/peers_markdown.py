"""Markdown from the figures of ``make bench-peers``.

python -m sparse_runtime.eval.report.peers_markdown OUTPUT.md FIGURES.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.report.figures import PEERS_DOCUMENT, read_figures
from sparse_runtime.eval.report.markdown import command_block, escaped, markdown_table

_INTRODUCTION = """# Beside llama.cpp

Written by `make bench-peers`: our variants and llama.cpp's took turns in one run, on the same threads,
with random weights of one shape and with the demo model. Medians, and the range over rounds. *GB per
token* are the weights that one token reads. llama.cpp's prebuilt Linux wheels use AVX2 and nothing
beyond it; its output projection is Q8_0 in the random files. What is compiled is decode steps only, and
the time that takes is not in the figures. Each table says when it was measured: `make bench-peers
PARTS='"demo, 6 bits"'` measures that part again. In planes of 4 and 5 bits four fifths of the random
neurons are looked at, two fifths counted and one fifth refined. Quality is another matter, and not on
this page: Q8_0 is all but lossless, Q4_0 is not, and what skipping costs stands in
[quality.md](quality.md).
"""


_TITLES = {
    "mistral-7b": "Mistral-7B's shape",
    "mistral-7b, 5 bits": "Mistral-7B's shape in planes of 5 bits (3 + 2), attention and head too",
    "mistral-7b, 4 bits": "Mistral-7B's shape in planes of 4 bits, attention and head too",
    "demo": "The demo model",
    "demo, 6 bits": "The demo model in planes of 6 bits (4 + 2), attention and head too",
}


def report(record: dict[str, Any]) -> str:
    """Markdown of the records of ``bench_peers``, by part."""
    parts = [_INTRODUCTION, command_block({"command": "make bench-peers"})]
    for name, title in _TITLES.items():
        own = record if name == "mistral-7b" else record.get(name)
        if own is not None:
            parts += [f"## {title}\n", _about(own), _table(own)]
    return "\n".join(parts)


def _about(record: dict[str, Any]) -> str:
    host, peer = record["host"], record["llama_cpp"]
    versions = ", ".join(f"{name} {value}" for name, value in host["versions"].items() if value)
    return (
        f"{host['date']}, {escaped(host['cpu'])}, {host['isa']}, {host['threads']} threads; "
        f"{versions}, commit {host['commit']}; xllamacpp {peer['version']} "
        f"({escaped(peer['system'])}).\n"
    )


def _table(record: dict[str, Any]) -> str:
    rows = [
        (
            entry["name"],
            f"{entry['decode_tok_s']:.2f}",
            _range(entry["decode_range"]),
            f"{entry['prefill_tok_s']:.1f}",
            _range(entry["prefill_range"]),
            f"{entry['bytes_per_token'] / 1e9:.3f}",
            f"{entry['gbps']:.1f}",
        )
        for entry in (*record["ours"], *record["peers"])
    ]
    ours, peer = (
        max(record[side], key=lambda entry: float(entry["decode_tok_s"]))
        for side in ("ours", "peers")
    )
    ratio, best = ours["decode_tok_s"] / peer["decode_tok_s"], f"best of ours ({ours['name']})"
    if ratio > 1:
        verdict = f"The {best} decodes {ratio:.2f} times as fast as {peer['name']}.\n"
    else:
        verdict = f"{peer['name']} decodes {1 / ratio:.2f} times as fast as the {best}.\n"
    header = ("", "decode tokens/s", "range", "prefill tokens/s", "range", "GB per token", "GB/s")
    return (
        f"Prompt of {record['prompt_tokens']} tokens, {record['new_tokens']} new ones, "
        f"{record['rounds']} rounds; cost share of the sparse FFNs {record['cost_share']:.3f}; read "
        f"bandwidth {record['read_gbps']:.1f} GB/s ({_range(record['read_range'])}).\n\n"
        f"{markdown_table(header, rows)}\n"
        f"{verdict}"
    )


def _range(values: list[float]) -> str:
    return f"{values[0]:.4g}–{values[1]:.4g}"


def main() -> None:
    """Write the page."""
    output, figures = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        record = read_figures(figures, PEERS_DOCUMENT, "make bench-peers")
    except SparseRuntimeError as error:
        sys.exit(f"error: {error}")
    output.write_text(report(record), encoding="utf-8")


if __name__ == "__main__":
    main()
