"""The figures of one run, as ``report`` and the tables of the documentation read them.

A run is a folder with the JSON files that the commands write under ``--json``, named as in ``FILES``.
Any may be missing; what is shown follows from what is there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.format import CONFIG_FILE
from sparse_runtime.errors import DataError
from sparse_runtime.eval.report import figures

_CURVES = "eval MODEL --clusters DIR --budgets … --baselines"
#: Files of ``evaluate_curves``; their rows on the same text stand together.
CURVE_FILES = ("quality", "planes", "predictors", "domains", "decode_only")
#: File -> the command that writes it, and what it must hold.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "eval": ("eval MODEL --clusters DIR", figures.EVAL),
    "quality": (f"{_CURVES} …", figures.CURVES),
    "planes": (
        "eval MODEL --clusters DIR --weights 6 --rounding gptq --budgets … --baselines look-all,…",
        figures.CURVES,
    ),
    "predictors": (f"{_CURVES} deja-vu,awc-paper", figures.CURVES),
    "domains": (f"{_CURVES} … --data … --data …", figures.CURVES),
    "decode_only": (f"{_CURVES} … --prompt-tokens 256", figures.CURVES),
    "ablation": ("ablate MODEL", figures.ABLATION),
    "paper": ("paper MODEL --compare", figures.PAPER),
    "tasks": ("tasks MODEL --clusters DIR", figures.TASKS),
    "long": ("long MODEL --clusters DIR", figures.LONG),
    "bench": ("bench MODEL --clusters DIR", figures.BENCH),
}
CLUSTERS_FOLDER = "clusters"

#: ``method`` of a row of ``evaluate_curves`` -> what readers call it.
METHOD_LABELS = {
    "clusters": "clusters",
    "look-all": "looking at all",
    "oracle": "oracle, per token",
    "teal": "TEAL",
    "wina": "WINA",
    "cats": "CATS",
    "deja-vu": "Deja Vu",
    "griffin": "GRIFFIN",
    "awc-paper": "AWC paper, router",
    "awc-paper, oracle ids": "AWC paper, oracle ids",
    "static": "static set",
    "random": "random set",
}
#: The same of llama.cpp's formats.
GGUF_LABELS = {"q8_0": "GGUF Q8_0", "q5_0": "GGUF Q5_0", "q4_0": "GGUF Q4_0"}
#: ``rounding`` of a row of a dense format -> what a line of such is called.
FORMAT_LABELS = {
    "plain": "dense planes",
    "mse": "dense planes, E[x²]",
    "gptq": "dense planes, GPTQ",
    None: "GGUF",
}


@dataclass(frozen=True)
class RunFolder:
    """Figures of a run.

    Attributes:
        figures: name out of ``FILES`` -> JSON.
        clusters: the artifact in the folder's ``clusters/``, if there is one.
    """

    figures: dict[str, dict[str, Any]]
    clusters: ClusterSet | None

    @classmethod
    def read(cls, folder: Path) -> RunFolder:
        """Read a folder.

        Raises:
            DataError: there is no figure at all, or a file is not what its name says.
        """
        found = {}
        for name, (command, shape) in FILES.items():
            file = folder / f"{name}.json"
            if file.is_file():
                found[name] = figures.read_figures(file, shape, command)
        if not found:
            names = ", ".join(f"{name}.json" for name in FILES)
            raise DataError(
                f"{str(folder)!r} holds no figures; expected one or more of {names}, as "
                "sparse-runtime writes them with --json"
            )
        path = folder / CLUSTERS_FOLDER
        clusters = ClusterSet.from_pretrained(path) if (path / CONFIG_FILE).is_file() else None
        return cls(found, clusters)

    def curves(self) -> dict[str, dict[str, Any]]:
        """Results on one text each, by name of text and protocol.

        Raises:
            DataError: two files are about the same text and do not have the same dense model on it.
        """
        merged: dict[str, dict[str, Any]] = {}
        for file in CURVE_FILES:
            of_file = self.figures.get(file, {"results": []})
            prompt = of_file.get("prompt_tokens")
            protocol = f", after a dense prompt of {prompt} tokens" if prompt else ""
            for result in of_file["results"]:
                name = f"{text_name(result['data'])}{protocol}"
                first = merged.setdefault(name, {**result, "rows": []})
                if result["scored"] != first["scored"] or not math.isclose(
                    result["dense"]["perplexity"], first["dense"]["perplexity"], rel_tol=1e-3
                ):
                    raise DataError(
                        f"{file}.json has {name} with a dense perplexity of "
                        f"{result['dense']['perplexity']:.3f} on {sum(result['scored'])} tokens; "
                        f"expected {first['dense']['perplexity']:.3f} on {sum(first['scored'])}, as in "
                        "another file of the run. Judge all methods on the same tokens"
                    )
                seen = {(row["budget"], method_label(row)) for row in first["rows"]}
                first["rows"] += [
                    row for row in result["rows"] if (row["budget"], method_label(row)) not in seen
                ]
        return merged

    def left_out(self) -> list[str]:
        """Sentences about the methods that could not run at a budget."""
        return [
            f"{_method_name(row)} is left out{_at(row['budget'])}: {row['reason']}."
            for file in CURVE_FILES
            for row in self.figures.get(file, {"left_out": []})["left_out"]
        ]

    def notes(self) -> list[str]:
        """Sentences on what rows can say, each once."""
        files = (self.figures.get(file, {}) for file in CURVE_FILES)
        return list(
            dict.fromkeys(f"{note}." for figures in files for note in figures.get("notes", []))
        )


def _at(budget: float | None) -> str:
    return "" if budget is None else f" at {budget:g}"


# Methods that skip neurons over planes.
_SPARSE = ("clusters", "look-all")


def method_label(row: dict[str, Any]) -> str:
    """What readers call the method of a row of ``evaluate_curves``."""
    if row["method"] in _SPARSE and row["weights"] is not None:
        label = f"{_method_name(row)}, {row['weights']} bits{_rounding(row)}"
        return label if row["verify"] is not False else f"{label}, refined whole"
    if row["weights"] is not None:
        return f"dense, {row['weights']} bits{_rounding(row)}"
    label = _method_name(row)
    if row["verify"] is None:
        return label
    return f"{label} with looks" if row["verify"] else f"{label} without looks"


def series_label(row: dict[str, Any]) -> str:
    """What readers call the line that a row is a point of: dense formats of a kind make one."""
    dense = row["method"] in GGUF_LABELS or (
        row["method"] not in _SPARSE and row["weights"] is not None
    )
    return FORMAT_LABELS.get(row["rounding"], row["method"]) if dense else method_label(row)


def near_half(row: dict[str, Any]) -> float:
    """Distance of a row's budget, or of what it reads where it has none, from one half."""
    budget = row["cost_share"] if row["budget"] is None else row["budget"]
    return abs(float(budget) - 0.5)


def by_bits(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of ``evaluate_curves``, those that read most first."""
    return sorted(rows, key=lambda row: (-row["bits_per_weight"], row["kl"]))


def _rounding(row: dict[str, Any]) -> str:
    return "" if row["rounding"] in (None, "plain") else f", {str(row['rounding']).upper()}"


def _method_name(row: dict[str, Any]) -> str:
    return METHOD_LABELS.get(row["method"]) or GGUF_LABELS.get(row["method"], row["method"])


def text_name(source: str) -> str:
    """A source of text, or a model, without its folder and options."""
    return Path(source.partition(",")[0]).name
