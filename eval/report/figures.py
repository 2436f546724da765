"""JSON figures as the commands write them: read, checked key by key, and safe to show.

A shape says what a file must hold: a dict of keys (``name?`` where one may be missing), a ``Rows`` of
entries, a type, or a tuple of types. Other keys are let through unseen. Numbers are finite, and
strings lose what a terminal or a page would obey (see ``sparse_runtime.printable``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_runtime.errors import DataError
from sparse_runtime.printable import printable

_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_NAMES[type(None)] = "null"
# Beyond every figure, and still a float; NaN is not below it.
_HUGE = 1e300
# Characters of a string: a command or a reason may be long, a page must not.
_LONGEST = 2000


@dataclass(frozen=True)
class Rows:
    """A list.

    Args:
        of: shape of each entry.
        least: it has so many at least.
        length: it has exactly so many, if given.
    """

    of: Any
    least: int = 0
    length: int | None = None


_MAYBE = (float, type(None))
HOST = {
    "date": str,
    "command": str,
    "cpu": str,
    "threads": int,
    "commit": (str, type(None)),
    "versions": {"torch": str},
}
EVAL = {
    "model?": str,
    "host?": HOST,
    "layers": Rows(
        {
            "index": int,
            "density": float,
            "coverage": float,
            "oracle_coverage": float,
            "static_coverage": float,
            "precision": float,
            "router_top1": float,
            "confidence": Rows(float, length=10),
        },
        least=1,
    ),
}
CURVES = {
    # What tells these figures from another command's comes first, and so into the error.
    "results": Rows(
        {
            "data": str,
            "tokens": int,
            "scored": Rows(int, least=1),
            "dense": {"perplexity": float},
            "rows": Rows(
                {
                    "method": str,
                    "budget": _MAYBE,
                    "verify": (bool, type(None)),
                    "weights": (int, type(None)),
                    "rounding": (str, type(None)),
                    **dict.fromkeys(("cost_share", "bits_per_weight"), float),
                    **dict.fromkeys(("looked", "counted", "refined"), _MAYBE),
                    **dict.fromkeys(("kl", "top1", "ratio", "perplexity"), float),
                    **dict.fromkeys(("kl_interval", "interval"), Rows(float, length=2)),
                },
                least=1,
            ),
        },
        least=1,
    ),
    "left_out": Rows({"method": str, "budget": _MAYBE, "reason": str}),
    "notes?": Rows(str),
    "model": str,
    "dtype": str,
    "window": int,
    "prompt_tokens": int,
    "host": HOST,
}
ABLATION = {
    "rows": Rows(
        {
            "method": str,
            "factor": str,
            "value": (float, str),
            "clusters": int,
            "history": Rows(float),
            **dict.fromkeys(("coverage", "oracle_coverage", "static_coverage", "chance"), float),
            **dict.fromkeys(("precision", "empty", "effective", "iterations", "seconds"), float),
        },
        least=1,
    ),
    "model?": str,
    "host": HOST,
}
PAPER = {
    "coverage": Rows(
        {
            "method": str,
            "clusters": int,
            "density": _MAYBE,
            **dict.fromkeys(("coverage", "static", "chance", "precision"), _MAYBE),
            **dict.fromkeys(("fitted_coverage", "seconds"), _MAYBE),
        },
        least=1,
    ),
    "model?": str,
    "host": HOST,
}
#: A dense and a sparse model's figure, and their difference, each with its standard error.
BESIDE = (
    *("dense", "dense_error", "sparse", "sparse_error"),
    *("difference", "difference_error"),
)
TASKS = {
    "cost_share": float,
    "rows": Rows(
        {
            "task": str,
            "metric": str,
            "documents": int,
            **dict.fromkeys(BESIDE, _MAYBE),
        }
    ),
    "model?": str,
    "host": HOST,
}
_BESIDE = dict.fromkeys(BESIDE, _MAYBE) | dict.fromkeys(("dense", "sparse", "difference"), float)
#: Of ``long``; it leaves out parts that were not asked for.
LONG = {
    "positions?": {
        "window": int,
        "prompt_tokens": int,
        "bits_per_weight": float,
        "rows": Rows(
            {
                **dict.fromkeys(("from", "to", "windows"), int),
                **dict.fromkeys(("dense", "sparse", "ratio", "kl", "top1"), float),
                **dict.fromkeys(("ratio_error", "kl_error"), _MAYBE),
            },
            least=1,
        ),
    },
    "needle?": {
        "rows": Rows(
            {
                "run": str,
                "length": int,
                "depth": _MAYBE,
                "prompts": int,
                "found": _BESIDE,
                "log_probability": _BESIDE,
            },
            least=1,
        ),
    },
    "continuations?": {
        **dict.fromkeys(("prompts", "prompt_tokens", "new_tokens"), int),
        **dict.fromkeys(("same_tokens", "bits_per_weight"), float),
        "rows": Rows({"sampling": str, "figure": str, "text": float, **_BESIDE}, least=1),
    },
    "data": str,
    "model?": str,
    "host": HOST,
}
_VARIANTS = ("dense", "dense_fast", "sparse", "sparse_fast")
_PREDICTION = {
    "ffn_ms": float,
    "rows": Rows({"name": str, "ms": float, "share": float, "bytes": int}),
}
_DECODE = dict.fromkeys((f"{name}_ms" for name in _VARIANTS), float)
#: What the page shows of ``bench``.
BENCH = {
    "model?": str,
    "host?": HOST,
    "num_layers": int,
    "runs": Rows({}, least=1),
    "mlp": dict.fromkeys(("dense_ms", "all_rows_ms", "sparse_ms"), float),
    "prediction": _PREDICTION,
    "decode": {
        **_DECODE,
        **dict.fromkeys(("dense_tok_s", "sparse_tok_s", "speedup", "speedup_fast"), float),
    },
}
#: What docs/benchmarks/cpu.md shows of it.
BENCH_DOCUMENT = {
    "model": str,
    "clusters": (str, type(None)),
    "budget": _MAYBE,
    "verify": (bool, type(None)),
    "prompt_tokens": int,
    "host": HOST,
    "batches": Rows({"batch": int, **dict.fromkeys(("dense_ms", "sparse_ms", "speedup"), float)}),
    "memory": dict.fromkeys(
        ("dense_mib", "sparse_mib", "weights_mib", "artifact_mib", "ratio"), float
    ),
    "runs": Rows(
        {
            "cost_share": float,
            "prefill": dict.fromkeys(("dense_ms", "sparse_ms", "speedup"), float),
            "decode": {
                **_DECODE,
                **dict.fromkeys((f"{name}_p90_ms" for name in _VARIANTS), float),
                **dict.fromkeys((f"{name}_tok_s" for name in _VARIANTS), float),
                **dict.fromkeys(("speedup", "speedup_fast", "speedup_total", "ceiling"), float),
                "gbps": dict.fromkeys(_VARIANTS, float),
            },
            "prediction": _PREDICTION,
            "mlp": {
                "prepacked_ms": _MAYBE,
                **dict.fromkeys(("density", "looked_at", "read_gbps", "gbps"), float),
                **dict.fromkeys(("dense_ms", "all_rows_ms", "all_rows_gbps", "sparse_ms"), float),
                "tokens": Rows(
                    {
                        "tokens": int,
                        **dict.fromkeys(("dense_ms", "all_rows_ms", "sparse_ms"), float),
                        "prepacked_ms?": float,
                        "chosen_ms?": float,
                        "path?": str,
                    }
                ),
            },
        },
        least=1,
    ),
}
_MICROSECONDS = ("dense_eager", "dense_graph", "sparse_eager", "sparse_graph", "speedup")
_MILLISECONDS = ("dense_eager", "dense_compiled", "sparse_eager", "sparse_compiled", "speedup")
#: What docs/benchmarks/gpu.md shows of ``bench --device cuda``.
BENCH_GPU = {
    "copy_gbps": float,
    "inputs": str,
    "host": {**HOST, "gpu": str, "cuda": (str, type(None))},
    "route": Rows({"us": float}),
    "ffn": Rows(
        {
            "cost_share": float,
            "batch": int,
            **dict.fromkeys(_MICROSECONDS, float),
            "gbps?": float,
            "bandwidth_share?": float,
        }
    ),
    "decode?": Rows({"cost_share": float, "batch": int, **dict.fromkeys(_MILLISECONDS, float)}),
}


_GRAPHS = ("float_graph", "rows_eager", "rows_graph", "sparse_eager", "sparse_graph")
_STEPS = ("dense_compiled", "rows_eager", "rows_compiled", "sparse_eager", "sparse_compiled")
#: What it shows of ``eval/latency/gpu_planes.py``.
BENCH_GPU_PLANES = {
    "copy_gbps": float,
    "host": {**HOST, "gpu": str, "cuda": (str, type(None))},
    "ffn": Rows(
        {
            **dict.fromkeys(("bits", "batch"), int),
            **dict.fromkeys(("looked_at", "counted", "refined"), float),
            **dict.fromkeys(_GRAPHS, float),
            "rows_gbps?": float,
            "sparse_gbps?": float,
        },
        least=1,
    ),
    "decode": Rows({"bits": int, **dict.fromkeys(_STEPS, float)}, least=1),
}


_SPEEDS = Rows(
    {
        "name": str,
        **dict.fromkeys(("decode_tok_s", "prefill_tok_s", "bytes_per_token", "gbps"), float),
        **dict.fromkeys(("decode_range", "prefill_range"), list),
    },
    least=1,
)
_PEERS: dict[str, Any] = {
    **dict.fromkeys(("ours", "peers"), _SPEEDS),
    **dict.fromkeys(("read_gbps", "cost_share"), float),
    **dict.fromkeys(("rounds", "prompt_tokens", "new_tokens"), int),
    "read_range": list,
    "llama_cpp": {"version": str, "system": str},
    "host": HOST,
}
#: What docs/benchmarks/peers.md shows: Mistral's shape, and other parts by name.
PEERS_DOCUMENT = {
    **_PEERS,
    "demo": _PEERS,
    **dict.fromkeys(("mistral-7b, 5 bits?", "mistral-7b, 4 bits?", "demo, 6 bits?"), _PEERS),
}


def read_figures(file: Path, shape: Any, command: str) -> dict[str, Any]:
    """Read a file of figures.

    Args:
        file: JSON.
        shape: what it must hold.
        command: that writes it, for the error.

    Raises:
        DataError: it cannot be read, or a key is missing or of another kind; the message names file,
            key and command.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{str(file)!r} cannot be read as JSON: {error}") from None
    try:
        checked: dict[str, Any] = _checked(value, shape, "")
    except _MismatchError as error:
        raise DataError(
            f"{str(file)!r} {error}; expected what 'sparse-runtime {command}' writes with --json"
        ) from None
    return checked


class _MismatchError(Exception):
    """What does not fit, in words that follow a file's name."""


def _checked(value: Any, shape: Any, path: str) -> Any:
    if isinstance(shape, dict):
        return _checked_dict(value, shape, path)
    if isinstance(shape, Rows):
        if not isinstance(value, list):
            raise _MismatchError(f"has {path!r} that is {_found(value)}, not a list")
        wrong = len(value) < shape.least or shape.length not in (None, len(value))
        if wrong:
            expected = f"{shape.least} or more" if shape.length is None else shape.length
            raise _MismatchError(f"has {path!r} with {len(value)} entries, not {expected}")
        return [_checked(entry, shape.of, f"{path}[{i}]") for i, entry in enumerate(value)]
    kinds = shape if isinstance(shape, tuple) else (shape,)
    if not any(_is_of_kind(value, kind) for kind in kinds):
        expected = " or ".join(_NAMES[kind] for kind in kinds)
        raise _MismatchError(f"has {path!r} that is {_found(value)}, not {expected}")
    return printable(value, longest=_LONGEST) if isinstance(value, str) else value


def _checked_dict(value: Any, shape: dict[str, Any], path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _MismatchError(f"has {path or 'a whole'!r} that is {_found(value)}, not an object")
    result = {}
    for name, of in shape.items():
        key = name.removesuffix("?")
        where = f"{path}.{key}" if path else key
        if key in value:
            result[key] = _checked(value[key], of, where)
        elif key == name:
            raise _MismatchError(f"has no {where!r}")
    return _harmless(value) | result


def _harmless(value: Any) -> Any:
    """Keys that no shape names, with their strings printable."""
    if isinstance(value, dict):
        return {printable(key, longest=_LONGEST): _harmless(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_harmless(entry) for entry in value]
    return printable(value, longest=_LONGEST) if isinstance(value, str) else value


def _is_of_kind(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) < _HUGE
    if kind is int:
        return isinstance(value, int) and abs(value) < _HUGE
    return isinstance(value, kind)


def _found(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
