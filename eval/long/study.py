"""All of it on one model: dense first, then sparse, over the same windows, needles and prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from sparse_runtime.api import reset_cost, sparsify, unsparsify
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.config import SparseConfig
from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.long.continuations import (
    compare_continuations,
    continue_prompts,
    same_tokens,
    spread_passages,
)
from sparse_runtime.eval.long.needle import Needle, compare_needles, find_needles, make_needles
from sparse_runtime.eval.long.positions import by_position, whole_windows
from sparse_runtime.eval.quality.artifact_quality import EVALUATION
from sparse_runtime.eval.quality.forwards import dense_prompts
from sparse_runtime.eval.quality.perplexity import score_text
from sparse_runtime.eval.quality.rows import amounts
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.kernels import resolve_backend
from sparse_runtime.models.ffn_layers import packed_bits
from sparse_runtime.progress import ProgressReporter, SilentProgress

#: Runs of the sparse model over needles: as at run time, and as harshly as can be.
PROMPT_DENSE, EVERY_TOKEN = "prompt dense", "every token sparse"


@dataclass(frozen=True)
class Needles:
    """Which needles are hidden: see :func:`sparse_runtime.eval.long.needle.make_needles`."""

    lengths: tuple[int, ...] = (1024, 4096)
    depths: tuple[float, ...] = (0.0, 0.5, 1.0)
    repeats: int = 4


@dataclass(frozen=True)
class Continuations:
    """What is written on.

    Args:
        prompts: how many, all in one batch.
        prompt_tokens: of each.
        new_tokens: of each continuation.
        temperature: of the sampled ones; there are greedy ones, too.
    """

    prompts: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 256
    temperature: float = 1.0


@dataclass(frozen=True)
class LongStudy:
    """What is measured.

    Args:
        window: tokens of the windows for figures by position; None leaves them out.
        prompt_tokens: first tokens of each window that run dense and are not scored.
        needles: None leaves them out.
        continuations: None leaves them out.
        seed: of everything that is drawn.
    """

    window: int | None = 8192
    prompt_tokens: int = 0
    needles: Needles | None = Needles()
    continuations: Continuations | None = Continuations()
    seed: int = 0

    @property
    def least_tokens(self) -> int:
        """Tokens of text that all of it needs."""
        asked = [self.window or 0]
        if self.needles is not None:
            asked.append(max(self.needles.lengths))
        if (writing := self.continuations) is not None:
            asked.append(writing.prompts * (writing.prompt_tokens + writing.new_tokens))
        return max(asked)


def evaluate_long(
    model: nn.Module,
    tokenizer: Any,
    clusters: ClusterSet,
    tokens: Tensor,
    study: LongStudy,
    *,
    options: Mapping[str, Any] | None = None,
    progress: ProgressReporter | None = None,
) -> dict[str, Any]:
    """Compare a model with its sparse self where contexts are long.

    Args:
        model: a causal language model, dense; dense again when this returns, and packed if there are
            ``weights`` among the options.
        tokenizer: of the model.
        clusters: the artifact.
        tokens: held-out text [n] int64.
        study: what is measured.
        options: of ``sparsify``: ``budget`` and ``verify``, and about planes ``weights``, ``tau`` and
            ``ramp``. The dense model is the one as it came.
        progress: reports one unit per window, needle and batch of each run.

    Returns:
        What the study asks for of ``positions`` (``window``, ``prompt_tokens``, ``rows`` as of
        :func:`by_position`, and ``amounts``), ``needle`` (``rows`` as of :func:`compare_needles`, with
        ``run``: ``prompt dense``, as at run time, or ``every token sparse``), and ``continuations``
        (``prompts``, ``prompt_tokens``, ``new_tokens``, ``temperature``, ``same_tokens`` of the greedy
        ones, and ``rows`` as of :func:`compare_continuations` with ``sampling``: ``greedy`` or
        ``sampled``, and ``amounts``).

    Raises:
        DataError, ConfigError: the text is too short, or a length does not fit the model.
        SparseRuntimeError: as ``sparsify``.
    """
    clusters.check_model(model)
    parts = _parts(model, tokenizer, tokens, study, progress or SilentProgress())
    for part in parts.values():
        part.run_dense(model)
    options = dict(options or {})
    weights = options.pop("weights", None)
    if weights is not None:
        pack_model(model, weights)
    config = SparseConfig(prefill="sparse") if packed_bits(model) else EVALUATION
    # The fingerprint has been checked, and packed weights have another.
    config = replace(config, check_fingerprint=False, **options)
    results = {}
    for name, part in parts.items():
        sparsify(model, clusters, config=part.config(config, model))
        try:
            results[name] = part.run_sparse(model)
        finally:
            unsparsify(model)
    return results


class _Part(Protocol):
    """Something that runs on the dense model, and then on the sparse one, which is compared."""

    def run_dense(self, model: nn.Module) -> None: ...

    def config(self, every_token: SparseConfig, model: Any) -> SparseConfig: ...

    def run_sparse(self, model: nn.Module) -> dict[str, Any]: ...


def _parts(
    model: Any, tokenizer: Any, tokens: Tensor, study: LongStudy, progress: ProgressReporter
) -> dict[str, _Part]:
    """Name -> what is asked for, checked."""
    parts: dict[str, _Part] = {}
    check_context(study, context_of(model))
    if study.window is not None:
        text = whole_windows(tokens, study.window)
        parts["positions"] = _Positions(text, study.window, study.prompt_tokens, progress)
    if study.needles is not None:
        parts["needle"] = _Needles(
            make_needles(
                tokenizer,
                tokens,
                lengths=study.needles.lengths,
                depths=study.needles.depths,
                repeats=study.needles.repeats,
                seed=study.seed,
            ),
            progress,
        )
    if (asked := study.continuations) is not None:
        passages = spread_passages(tokens, asked.prompts, asked.prompt_tokens + asked.new_tokens)
        parts["continuations"] = _Continuations(asked, passages, study.seed, progress)
    return parts


def context_of(model: Any) -> int | None:
    """Most tokens that a model can take; None if it does not say."""
    context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return context


def check_context(study: LongStudy, context: int | None) -> None:
    """Refuse what is longer than the model's context (None if it does not say). Raises ConfigError."""
    lengths = {"window": study.window}
    if study.needles is not None:
        lengths["needle length"] = max(study.needles.lengths)
    if (writing := study.continuations) is not None:
        lengths["prompt and continuation"] = writing.prompt_tokens + writing.new_tokens
    for name, length in lengths.items():
        if context is not None and length is not None and length > context:
            raise ConfigError(
                f"{name} is {length}; expected at most the model's context, {context}"
            )


class _Positions:
    """Windows of a text, every token sparse after a prompt."""

    def __init__(
        self, text: Tensor, window: int, prompt_tokens: int, progress: ProgressReporter
    ) -> None:
        self.prompt_tokens, self.window = prompt_tokens, window
        self._score = partial(
            score_text,
            tokens=text,
            window=window,
            prompt_tokens=prompt_tokens,
            batch_windows=1,
            progress=progress,
        )

    def run_dense(self, model: nn.Module) -> None:
        self.dense = self._score(model, keep=True, description="dense windows")

    def config(self, every_token: SparseConfig, model: Any) -> SparseConfig:
        return every_token

    def run_sparse(self, model: nn.Module) -> dict[str, Any]:
        reset_cost(model)
        with dense_prompts(model, self.prompt_tokens):
            score = self._score(model, reference=self.dense, description="sparse windows")
        return {
            "window": self.window,
            "prompt_tokens": self.prompt_tokens,
            "rows": by_position(score, self.dense, self.window),
            **amounts(model),
        }


class _Needles:
    """Needles, after a dense prompt as at run time, and with a sparse one."""

    def __init__(self, needles: list[Needle], progress: ProgressReporter) -> None:
        self.needles, self.progress = needles, progress

    def run_dense(self, model: nn.Module) -> None:
        with self.progress.task("dense needles", len(self.needles)) as advance:
            self.dense = find_needles(model, self.needles, advance)

    def config(self, every_token: SparseConfig, model: Any) -> SparseConfig:
        return every_token

    def run_sparse(self, model: nn.Module) -> dict[str, Any]:
        rows = []
        runs = {PROMPT_DENSE: partial(dense_prompts, model), EVERY_TOKEN: None}
        with self.progress.task("sparse needles", len(runs) * len(self.needles)) as advance:
            for run, prompts in runs.items():
                sparse = find_needles(model, self.needles, advance, prompts)
                compared = compare_needles(self.needles, self.dense, sparse)
                rows += [{"run": run, **row} for row in compared]
        return {"rows": rows}


class _Continuations:
    """Texts that are written on, prompts dense, as at run time."""

    def __init__(
        self, asked: Continuations, passages: Tensor, seed: int, progress: ProgressReporter
    ) -> None:
        self.asked, self.seed, self.progress = asked, seed, progress
        self.prompts, self.text = passages.tensor_split([asked.prompt_tokens], dim=1)

    def run_dense(self, model: nn.Module) -> None:
        self.dense = self._written(model, "dense continuations")

    def config(self, every_token: SparseConfig, model: Any) -> SparseConfig:
        backend = resolve_backend(
            "auto", model.device, model.dtype, strict=False, warn=lambda _: None
        )
        return replace(
            every_token,
            backend="reference" if backend == "dense" else backend,
            prefill="dense",
            max_sparse_tokens=len(self.prompts),
        )

    def run_sparse(self, model: nn.Module) -> dict[str, Any]:
        reset_cost(model)
        sparse = self._written(model, "sparse continuations")
        rows = [
            {"sampling": name, **row}
            for name in sparse
            for row in compare_continuations(self.dense[name], sparse[name], self.text)
        ]
        return {
            **asdict(self.asked),
            "same_tokens": same_tokens(self.dense["greedy"], sparse["greedy"]),
            "rows": rows,
            **amounts(model),
        }

    def _written(self, model: nn.Module, description: str) -> dict[str, Tensor]:
        samplings = {"greedy": 0.0, "sampled": self.asked.temperature}
        written = {}
        with self.progress.task(description, len(samplings)) as advance:
            for name, temperature in samplings.items():
                written[name] = continue_prompts(
                    model,
                    self.prompts,
                    self.asked.new_tokens,
                    temperature=temperature,
                    seed=self.seed,
                )
                advance(1)
        return written
