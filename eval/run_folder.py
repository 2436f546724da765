"""The figures of one run, as ``report`` and the tables of the documentation read them.

A run is a folder with the JSON files that the commands write under ``--json``, by these names. Any may be
missing; what is shown follows from what is there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_runtime.cluster_set import CONFIG_FILE, ClusterSet
from sparse_runtime.errors import DataError

#: File -> the command that writes it, and a key that tells its figures from another command's.
FILES = {
    "eval": ("eval MODEL --clusters DIR", "layers"),
    "quality": ("eval MODEL --clusters DIR --budgets … --baselines all", "results"),
    "decode_only": ("eval … --budgets … --baselines … --prompt-tokens 256", "results"),
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

    def curves(self) -> list[tuple[str, dict[str, Any]]]:
        """Results of one text each, named by protocol and text."""
        found = []
        for name in ("quality", "decode_only"):
            figures = self.figures.get(name)
            if figures is not None:
                prompt = figures["prompt_tokens"]
                protocol = f", after a dense prompt of {prompt} tokens" if prompt else ""
                for result in figures["results"]:
                    found.append((f"{text_name(result['data'])}{protocol}", result))
        return found


def method_label(row: dict[str, Any]) -> str:
    """What readers call the method of a row of ``evaluate_curves``."""
    label = METHOD_LABELS.get(row["method"], row["method"])
    if row["verify"] is None:
        return label
    return f"{label} with looks" if row["verify"] else f"{label} without looks"


def text_name(source: str) -> str:
    """A source of text without its folder and options."""
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
