"""``generate``: text by a sparse model, and how fast it came."""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer
from transformers import TextStreamer

from sparse_runtime.api import cost_report, dense, reset_cost, sparsify
from sparse_runtime.cli.console import out
from sparse_runtime.cli.figures import write_figures
from sparse_runtime.cli.options import (
    BudgetOption,
    ClustersOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    VerifyOption,
    resolve_dtype,
)
from sparse_runtime.cluster_set import ClusterSet
from sparse_runtime.errors import ConfigError
from sparse_runtime.models import load_model


def generate(
    model: ModelArgument,
    clusters: ClustersOption,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Run dense too.")] = False,
    budget: BudgetOption = None,
    verify: VerifyOption = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Stream a continuation; print tokens/s and the cost share."""
    artifact = ClusterSet.from_pretrained(clusters, centroids=True)
    loaded, tokenizer = load_model(model, dtype=resolve_dtype(dtype, device), device=device)
    sparsify(loaded, artifact, budget=budget, verify=verify)
    runs = {}
    for variant in ("dense", "sparse") if compare else ("sparse",):
        out.print(f"[bold]{variant}[/bold]")
        options: dict[str, Any] = {"temperature": temperature, "seed": seed}
        runs[variant] = generate_text(
            loaded,
            tokenizer,
            prompt,
            variant,
            stream=True,
            max_new_tokens=max_new_tokens,
            **options,
        )
        rate = f"{runs[variant]['tokens_per_second']:.1f} tokens/s"
        out.print(f"[dim]{rate}, cost share {runs[variant]['cost_share']:.3f}[/dim]\n")
    write_figures(json_file, {"model": model, "prompt": prompt, **runs})


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    variant: str,
    *,
    stream: bool,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Generate a text dense or sparse; its figures."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ConfigError("--prompt is empty; expected some text")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    reset_cost(model)
    torch.manual_seed(seed)
    started = time.perf_counter()
    with torch.inference_mode():
        if variant == "dense":
            with dense(model):
                tokens = model.generate(
                    **inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling
                )
        else:
            tokens = model.generate(
                **inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling
            )
    seconds = time.perf_counter() - started
    new_tokens = tokens[0, inputs["input_ids"].shape[1] :]
    report = cost_report(model)
    return {
        "text": tokenizer.decode(new_tokens, skip_special_tokens=True),
        "new_tokens": len(new_tokens),
        "tokens_per_second": len(new_tokens) / seconds,
        "cost_share": report.cost_share,
        "sparse_share_of_tokens": report.sparse_share_of_tokens,
    }
