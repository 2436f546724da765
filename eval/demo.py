"""The whole path on the bundled small model: build for planes, answer side by side, judge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparse_runtime.api import cost_report, reset_cost, sparsify, unsparsify
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.format import CONFIG_FILE
from sparse_runtime.clusters import BuildConfig, build_clusters
from sparse_runtime.clusters.plane_layers import ROUNDING_TOKENS
from sparse_runtime.clusters.text import calibration_windows, parse_source, token_stream
from sparse_runtime.config import SparseConfig
from sparse_runtime.eval.baselines.dense_formats import DensePlanes
from sparse_runtime.eval.latency.host import host_record
from sparse_runtime.eval.latency.timing import TokenClock
from sparse_runtime.eval.quality.rows import Curve, Protocol, amounts, reading_of_bits
from sparse_runtime.ffn.counts import bytes_per_token
from sparse_runtime.ffn.fast_linear import fast_linear
from sparse_runtime.ffn.patch import owners
from sparse_runtime.models import load_model
from sparse_runtime.progress import ProgressReporter

#: Text that ships with Python, and conversations that the model has with itself.
DATA = ("pydoc,weight=5", "self,weight=3")
PROMPTS = ("Why is the sky blue?", "What is a list comprehension in Python?")
# Sized for ten minutes on two cores; `build` without options spends more on quality.
BUILD = BuildConfig(weights=6, budget=0.25, max_tokens=16_384, router="32", distill=14)
#: What users would take instead: all neurons in as many bits as ours reads.
_OPPONENT = DensePlanes(4, "gptq")
_EVALUATION_TOKENS = 4096
_NEW_TOKENS = 48


def run_demo(
    folder: Path, console: Console, progress: ProgressReporter, dtype: torch.dtype
) -> dict[str, Any]:
    """Build (or reuse) an artifact and compare three models: float, dense 4-bit, and ours.

    Args:
        folder: where the artifact (``clusters``) and the model packed for it (``model``) are kept.
        console: prints the answers.
        progress: draws bars.
        dtype: of the model.

    Returns:
        ``curves`` as of ``evaluate_curves``, on topics left out of the calibration; ``answers``, for
        each prompt and model; ``build`` and ``host``.

    Raises:
        OutputFolderError: ``model`` holds something else, or nothing can be written.
    """
    floats, tokenizer = load_model("demo", dtype=dtype)
    clusters = _built(floats, tokenizer, folder, progress)
    ours, _ = load_model(str(folder / "model"), dtype=dtype)
    source = parse_source(DATA[0])
    text = calibration_windows([source], tokenizer, max_tokens=ROUNDING_TOKENS, window=BUILD.window)
    tokens = token_stream(source, tokenizer, max_tokens=_EVALUATION_TOKENS, split="test")
    protocol = Protocol(progress=progress)
    curve = Curve(
        f"{source.name}, held-out topics", tokens, protocol.score(floats, tokens, "float")
    )
    with _OPPONENT.stored(floats, text.windows, progress=progress) as opponent:
        score = protocol.score(opponent, tokens, "dense, 4 bits", reference=curve.dense)
        bits = reading_of_bits(_OPPONENT.bits_per_weight(floats))
        curve.add(score, _OPPONENT.name, bits, weights=4, rounding=_OPPONENT.rounding)
        sparsify(ours, clusters, config=SparseConfig(prefill="sparse"))
        score = protocol.score(ours, tokens, "sparse", reference=curve.dense)
        curve.add(score, "clusters", amounts(ours), budget=clusters.budget, verify=True, weights=6)
        unsparsify(ours)
        sparsify(ours, clusters, fast_linear=True)
        variants = {"float": floats, "dense, 4 bits": fast_linear(opponent), "sparse": ours}
        answers = [
            {"prompt": prompt, "models": _answers(console, tokenizer, prompt, variants)}
            for prompt in PROMPTS
        ]
    return {
        "curves": {
            "window": protocol.window,
            "prompt_tokens": protocol.prompt_tokens,
            "results": [curve.record()],
            "left_out": [],
        },
        "answers": answers,
        "dtype": str(dtype).removeprefix("torch."),
        "build": clusters.build,
        "host": host_record(),
    }


def _built(model: Any, tokenizer: Any, folder: Path, progress: ProgressReporter) -> ClusterSet:
    """The artifact in ``folder/clusters``; it and the packed model are built if they are not there."""
    artifact, packed = folder / "clusters", folder / "model"
    if (artifact / CONFIG_FILE).exists() and packed.is_dir():
        clusters = ClusterSet.from_pretrained(artifact)
        if clusters.build.get("config") == BUILD.resolved().record():
            return clusters
    return build_clusters(
        model,
        tokenizer,
        DATA,
        BUILD,
        output=artifact,
        packed_output=packed,
        model_name="demo",
        progress=progress,
    )


def _answers(
    console: Console, tokenizer: Any, prompt: str, models: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What each model says, and how fast; printed side by side."""
    table = Table(title=escape(prompt), show_lines=True)
    answers = {}
    for name, model in models.items():
        # Unmeasured: the first call of a length sets up threads and caches.
        _answer(model, tokenizer, prompt, 4)
        answers[name] = answer = _answer(model, tokenizer, prompt, _NEW_TOKENS)
        rate = answer["tokens_per_second"]
        speed = "no rate" if rate is None else f"{rate:.1f} tokens/s"
        table.add_column(
            f"{name}: {speed}, {answer['bytes_per_token'] / 1e6:.0f} MB a token", ratio=1
        )
    table.add_row(*(escape(answer["text"].strip()) for answer in answers.values()))
    console.print(table)
    if not answers["sparse"]["sparse_tokens"]:
        console.print(f"nothing ran sparse: {', '.join(answers['sparse']['dense_reasons'])}")
    return answers


def _answer(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> dict[str, Any]:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    clock, length = TokenClock(), inputs["input_ids"].shape[1]
    sparse = any(owners(model))
    if sparse:
        reset_cost(model)
    with torch.inference_mode():
        tokens = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock
        )
    steps, report = clock.steps, cost_report(model) if sparse else None
    return {
        "text": tokenizer.decode(tokens[0, length:], skip_special_tokens=True),
        "tokens_per_second": len(steps) / sum(steps) if steps else None,
        "bytes_per_token": bytes_per_token(model),
        "sparse_tokens": report.sparse_tokens if report else 0,
        "dense_reasons": report.dense_reasons if report else {},
    }
