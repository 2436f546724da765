"""Downstream tasks by lm-eval (EleutherAI's evaluation harness), dense beside sparse.

The harness sees an ordinary transformers model. Every token runs sparsely, those of the question too,
which is harder than at run time, where a prompt runs densely.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

from sparse_runtime.api import reset_cost, sparse_modules, sparsify, unsparsify
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.clusters.text.files import open_text
from sparse_runtime.clusters.text.records import file_records
from sparse_runtime.config import SparseConfig
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.eval.quality.artifact_quality import EVALUATION
from sparse_runtime.eval.quality.standard_errors import beside
from sparse_runtime.ffn.counts import bytes_per_token, count_cost
from sparse_runtime.progress import ProgressReporter, SilentProgress


def _lambada(file: Path, folder: Path) -> dict[str, Any]:
    """The harness's lambada_openai on lines with a ``text`` whose last word is asked for."""
    return {
        "dataset_kwargs": {"data_files": {"test": _lines_file(_checked(file, ("text",)), folder)}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    }


def _piqa(file: Path, folder: Path) -> dict[str, Any]:
    """The harness's piqa on lines with ``goal``, ``sol1``, ``sol2`` and labels beside them.

    Labels are those of the file ``NAME-labels.lst`` next to ``NAME.jsonl``, as PIQA is published, or
    the lines' own ``label``.
    """
    labels_file = file.with_name(f"{file.stem}-labels.lst")
    lines = _checked(file, ("goal", "sol1", "sol2"))
    if labels_file.is_file():
        labels = _labels(labels_file)
        if len(labels) != len(lines):
            raise DataError(f"{labels_file} has {len(labels)} labels; expected {len(lines)}")
        where = str(labels_file)
    else:
        labels = [str(line.get("label")) for line in lines]
        where = f"task file {str(file)!r}"
    for number, (line, label) in enumerate(zip(lines, labels, strict=True), 1):
        if label not in ("0", "1"):
            raise DataError(f"{where}, record {number}: the label is {label}; expected 0 or 1")
        line["label"] = int(label)
    return {
        "dataset_kwargs": {"data_files": {"validation": _lines_file(lines, folder)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
    }


#: Tasks that can be read from a local file: (file, folder to write in) -> settings for the harness.
LOCAL_TASKS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "lambada": _lambada,
    "piqa": _piqa,
}


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    clusters: ClusterSet,
    tasks: Sequence[str],
    *,
    planes: Mapping[str, Any] | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    progress: ProgressReporter | None = None,
) -> dict[str, Any]:
    """Run tasks on a dense model, and on the same model with clusters.

    Args:
        model: a dense causal language model; dense again when this returns, except that what ``planes``
            packs stays packed and sparse.
        tokenizer: its tokenizer.
        clusters: the artifact to judge.
        tasks: names of the harness's tasks, which it reads from the Hub, or ``lambada=FILE`` and
            ``piqa=FILE``.
        planes: options of ``sparsify`` about weights in planes (``weights``, ``linear_weights``,
            ``tau``, ``ramp``) for the sparse model.
        limit: documents of each task; all if None.
        batch_size: documents per call. Above 1 padding is counted in the cost share.
        progress: reports one unit per task and model.

    Returns:
        ``rows`` of ``task``, ``metric``, ``higher_is_better``, ``documents``, and ``dense``,
        ``dense_error``, ``sparse``, ``sparse_error``, ``difference`` (sparse − dense) and
        ``difference_error`` (standard errors over documents, that of the difference paired; None
        where the metric is neither a mean nor a perplexity of documents); ``cost_share`` of all
        tokens; ``bytes_per_token`` of the whole model's weights; ``limit``.

    Raises:
        ConfigError: lm-eval is not installed, or there is no such task.
        DataError: a local file cannot be read.
        SparseRuntimeError: as ``sparsify``.
    """
    clusters.check_model(model)
    progress = progress or SilentProgress()
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        specs = [_spec(task, Path(folder)) for task in tasks]
        harness = _Harness(specs)
        with progress.task("tasks", 2 * len(specs)) as advance:
            dense = []
            for spec in specs:
                dense.append(harness.run(model, tokenizer, spec, limit, batch_size))
                advance(1)
            config = SparseConfig(prefill="sparse", **planes) if planes else EVALUATION
            sparsify(model, clusters, config=config)
            try:
                reset_cost(model)
                for spec, before in zip(specs, dense, strict=True):
                    after = harness.run(model, tokenizer, spec, limit, batch_size)
                    rows += _rows(before, after)
                    advance(1)
                cost = count_cost(sparse_modules(model), element_size=2)
                read = bytes_per_token(model)
            finally:
                if config.weights is None and config.linear_weights is None:
                    unsparsify(model)
    return {
        "rows": rows,
        "cost_share": cost.cost_share,
        "bytes_per_token": read,
        "limit": limit,
    }


def check_task(task: str) -> tuple[str, Path | None]:
    """A task's name, and its file if it has one; nothing is read.

    Raises:
        ConfigError: tasks of this name cannot be read from a file.
        DataError: there is no such file.
    """
    name, separator, file = task.partition("=")
    if not separator:
        return name, None
    if name not in LOCAL_TASKS:
        raise ConfigError(
            f"task {name!r} cannot be read from a file; expected one of {', '.join(LOCAL_TASKS)}, or "
            "the name alone of a task that lm-eval knows"
        )
    if not file:
        raise ConfigError(f"task {task!r} names no file; expected {name}=FILE")
    path = Path(file).expanduser()
    if not path.exists():
        raise DataError(f"task file {file!r}: there is no such file")
    return name, path


def _spec(task: str, folder: Path) -> str | dict[str, Any]:
    name, file = check_task(task)
    if file is None:
        return name
    settings = LOCAL_TASKS[name](file, folder)
    # Its loader keeps a copy of what it reads: in the same folder, which is deleted.
    settings["dataset_kwargs"]["cache_dir"] = str(folder)
    return {"task": f"{name}_local", "dataset_path": "json", **settings}


class _Harness:
    """lm-eval with the tasks of one run; what it prints on the way is swallowed."""

    def __init__(self, specs: Sequence[str | dict[str, Any]]) -> None:
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError(
                f"tasks need lm-eval, which cannot be imported ({error}); "
                "pip install 'sparse-runtime[tasks]'"
            ) from error
        self._evaluate, self._model_type = lm_eval.evaluate, HFLM
        # Its own tasks are some ten thousand files, read only if one is asked for.
        self._manager = TaskManager(include_defaults=any(isinstance(spec, str) for spec in specs))
        for spec in specs:
            if isinstance(spec, str) and not self._manager.match_tasks([spec]):
                local = " or ".join(f"{name}=FILE" for name in LOCAL_TASKS)
                raise ConfigError(
                    f"task is {spec!r}; expected {local}, or the name of a task that lm-eval knows "
                    "(lm-eval ls tasks)"
                )

    def run(
        self,
        model: Any,
        tokenizer: Any,
        spec: str | dict[str, Any],
        limit: int | None,
        batch_size: int,
    ) -> dict[str, Any]:
        """Results of one task."""
        from lm_eval.tasks import get_task_dict

        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        quiet = io.StringIO()
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                results: dict[str, Any] = self._evaluate(
                    lm=self._model_type(
                        pretrained=model, tokenizer=tokenizer, batch_size=batch_size
                    ),
                    task_dict=get_task_dict([spec], self._manager),
                    limit=limit,
                    bootstrap_iters=0,
                    log_samples=True,  # for paired errors
                )
        finally:
            logging.disable(level)
        return results


def _rows(dense: dict[str, Any], sparse: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for task, figures in dense["results"].items():
        better = dense["higher_is_better"].get(task, {})
        documents = dense["n-samples"].get(task, {}).get("effective")
        for key, value in figures.items():
            metric, _, variant = key.partition(",")
            if not variant or metric.endswith("_stderr"):
                continue
            sides = [
                _Side(value, _by_document(results, task, metric, variant))
                for results, value in ((dense, value), (sparse, sparse["results"][task][key]))
            ]
            rows.append(
                {
                    "task": task.removesuffix("_local"),
                    "metric": metric,
                    "higher_is_better": better.get(metric),
                    "documents": documents,
                    **_beside(*sides),
                }
            )
    return rows


@dataclass(frozen=True)
class _Side:
    """A metric of one model.

    Attributes:
        value: over all documents.
        by_document: what it is made of, in the documents' order; empty where these are no numbers.
    """

    value: float
    by_document: list[float]

    def linear(self) -> list[float] | None:
        """A figure of each document whose mean moves as the value does, to first order.

        Documents' own figures where the value is their mean; for a perplexity, exp(−mean), they are
        multiplied by its derivative (the delta method). None of any other kind of value.
        """
        if not self.by_document:
            return None
        mean = math.fsum(self.by_document) / len(self.by_document)
        if math.isclose(mean, self.value, rel_tol=1e-6, abs_tol=1e-9):
            return self.by_document
        if mean <= 0 and math.isclose(math.exp(-mean), self.value, rel_tol=1e-6):
            return [-self.value * figure for figure in self.by_document]
        return None


def _beside(dense: _Side, sparse: _Side) -> dict[str, Any]:
    """Values, standard errors over documents, and the paired error of the difference."""
    before, after = dense.linear(), sparse.linear()
    errors = dict.fromkeys(("dense_error", "sparse_error", "difference_error"))
    if before is not None and after is not None:
        errors = {name: beside(before, after)[name] for name in errors}
    values = {"dense": dense.value, "sparse": sparse.value}
    return {**values, "difference": sparse.value - dense.value, **errors}


def _by_document(results: dict[str, Any], task: str, metric: str, variant: str) -> list[float]:
    """A metric of each document; empty where the harness keeps none, or tuples for a sum over all."""
    samples = [s for s in results["samples"].get(task, []) if s.get("filter", variant) == variant]
    values = [sample.get(metric) for sample in sorted(samples, key=lambda s: s["doc_id"])]
    if not all(isinstance(value, int | float) for value in values):
        return []
    return [float(value) for value in values]


def _labels(file: Path) -> list[str]:
    with open_text(file, str(file)) as text:
        return "".join(text.blocks()).split()


def _checked(file: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The records of a file, if all of them have texts under these keys."""
    lines = []
    for record, where in file_records(file, str(file)):
        missing = [key for key in keys if not isinstance(record.get(key), str)]
        if missing:
            raise DataError(
                f"task file {where}: there is no text under {', '.join(missing)}; expected the keys "
                f"{', '.join(keys)}"
            )
        lines.append(record)
    if not lines:
        raise DataError(f"task file {str(file)!r} is empty; expected lines of JSON")
    return lines


def _lines_file(lines: list[dict[str, Any]], folder: Path) -> str:
    """A file that the harness can read, whatever the user's looks like."""
    with NamedTemporaryFile(
        "w", suffix=".jsonl", dir=folder, delete=False, encoding="utf-8"
    ) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return file.name
