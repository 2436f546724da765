"""The figures of one run, as ``report`` and the tables of the documentation read them.

A run is a folder with the JSON files that the commands write under ``--json``, named as in ``FILES``.
Any may be missing; what is shown follows from what is there.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.format import CONFIG_FILE
from sparse_runtime.errors import DataError

_CURVES = "eval MODEL --clusters DIR --budgets … --baselines"
#: Files of ``evaluate_curves``; their rows on the same text stand together.
CURVE_FILES = ("quality", "predictors", "domains", "decode_only")
#: File -> the command that writes it, and a key that tells its figures from another command's.
FILES = {
    "eval": ("eval MODEL --clusters DIR", "layers"),
    "quality": (f"{_CURVES} …", "results"),
    "predictors": (f"{_CURVES} deja-vu,awc-paper", "results"),
    "domains": (f"{_CURVES} … --data … --data …", "results"),
    "decode_only": (f"{_CURVES} … --prompt-tokens 256", "results"),
    "ablation": ("ablate MODEL", "rows"),
    "paper": ("paper MODEL --compare", "coverage"),
    "tasks": ("tasks MODEL --clusters DIR", "rows"),
    "bench": ("bench MODEL --clusters DIR", "runs"),
}
CLUSTERS_FOLDER = "clusters"

#: ``method`` of a row of ``evaluate_curves`` -> what readers call it.
METHOD_LABELS = {
    "clusters": "clusters",
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
        figures = {}
        for name, (command, key) in FILES.items():
            file = folder / f"{name}.json"
            if file.is_file():
                figures[name] = _figures(file, command, key)
        if not figures:
            names = ", ".join(f"{name}.json" for name in FILES)
            raise DataError(
                f"{str(folder)!r} holds no figures; expected one or more of {names}, as "
                "sparse-runtime writes them with --json"
            )
        path = folder / CLUSTERS_FOLDER
        clusters = ClusterSet.from_pretrained(path) if (path / CONFIG_FILE).is_file() else None
        return cls(figures, clusters)

    def curves(self) -> dict[str, dict[str, Any]]:
        """Results on one text each, by name of text and protocol.

        Raises:
            DataError: two files are about the same text and do not have the same dense model on it.
        """
        merged: dict[str, dict[str, Any]] = {}
        for file in CURVE_FILES:
            figures = self.figures.get(file, {"results": []})
            prompt = figures.get("prompt_tokens")
            protocol = f", after a dense prompt of {prompt} tokens" if prompt else ""
            for result in figures["results"]:
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
            f"{_method_name(row)} is left out at {row['budget']:g}: {row['reason']}."
            for file in CURVE_FILES
            for row in self.figures.get(file, {"left_out": []})["left_out"]
        ]


def method_label(row: dict[str, Any]) -> str:
    """What readers call the method of a row of ``evaluate_curves``."""
    label = _method_name(row)
    if row["verify"] is None:
        return label
    return f"{label} with looks" if row["verify"] else f"{label} without looks"


def _method_name(row: dict[str, Any]) -> str:
    return METHOD_LABELS.get(row["method"], row["method"])


def text_name(source: str) -> str:
    """A source of text, or a model, without its folder and options."""
    return Path(source.partition(",")[0]).name


def _figures(file: Path, command: str, key: str) -> dict[str, Any]:
    try:
        figures = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{str(file)!r} cannot be read as JSON: {error}") from None
    if not isinstance(figures, dict) or key not in figures:
        raise DataError(
            f"{str(file)!r} has no {key!r}; expected what 'sparse-runtime {command}' writes with "
            "--json"
        )
    return figures
