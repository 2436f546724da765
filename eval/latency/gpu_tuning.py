"""``tune``: block sizes of the Triton kernels for one card and shape, one setting at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.latency.ffn_checks import tokens_for, verify_outputs
from sparse_runtime.eval.latency.gpu import captured, on_device
from sparse_runtime.ffn.sparse_ffn import SparseFFN
from sparse_runtime.kernels.triton.config import TritonConfig, remember
from sparse_runtime.kernels.triton.ffn import forced_config
from sparse_runtime.progress import ProgressReporter, SilentProgress

#: Values tried of each setting that matters to calls of one token, and to calls of several.
ONE_TOKEN: dict[str, Sequence[int]] = {
    "gate_rows": (1, 2, 4, 8, 16),
    "gate_hidden": (256, 512, 1024, 2048),
    "gate_warps": (2, 4, 8),
    "down_rows": (4, 8, 16, 32, 64),
    "down_hidden": (64, 128, 256, 512),
    "down_splits": (8, 16, 32, 64),
    "down_warps": (2, 4, 8),
    "down_stages": (1, 2, 3, 4),
    "route_rows": (1, 2, 4),
    "route_warps": (4, 8, 16),
    "route_clusters": (64, 128, 256),
}
LOOKS: dict[str, Sequence[int]] = {
    "look_rows": (8, 16, 32, 64),
    "look_warps": (1, 2, 4, 8),
}
SEVERAL: dict[str, Sequence[int]] = {
    "many_rows": (16, 32, 64),
    "many_hidden": (64, 128, 256),
    "many_outputs": (64, 128, 256),
    "many_splits": (2, 4, 8, 16),
    "many_warps": (4, 8),
}
_SEVERAL_TOKENS = 8
_TOKEN_COUNTS = (1, 2, 4, 8, 16, 32, 64)
# Better by less than this is noise.
_GAIN = 0.99


def tune(
    modules: Sequence[SparseFFN],
    *,
    repeats: int = 10,
    progress: ProgressReporter | None = None,
) -> dict[str, Any]:
    """Measure settings on a sparse model's FFNs and keep the best in the user's cache folder.

    One setting after the other takes its best value beside the others' present ones; then the largest
    number of tokens is found up to which a sparse call takes no longer than a dense one.

    Args:
        modules: FFNs of one shape, backend ``triton``, ``prefill="sparse"``.
        repeats: runs of each candidate.
        progress: reports one unit per setting.

    Returns:
        ``config`` (settings), ``before_us`` and ``after_us`` of one token.

    Raises:
        ConfigError: the FFNs do not run by the Triton kernels.
        SparseRuntimeError: outputs with the settings found are not those of the reference.
        OutputFolderError: the settings cannot be kept.
    """
    if any(module.backend != "triton" for module in modules):
        raise ConfigError(
            f"the FFNs run by backend {modules[0].backend!r}; expected 'triton', on a GPU"
        )
    progress = progress or SilentProgress()
    stages: list[tuple[Mapping[str, Sequence[int]], int]] = [(ONE_TOKEN, 1)]
    if modules[0].tables.maybe_sets is not None:
        stages.append((LOOKS, 1))
    stages.append((SEVERAL, _SEVERAL_TOKENS))
    best = TritonConfig()
    before = _seconds(modules, [best], 1, repeats)[0]
    with progress.task("tune", sum(len(values) for values, _ in stages) + 1) as advance:
        for candidates, tokens in stages:
            for name, values in candidates.items():
                tried = [best] + [
                    replace(best, **{name: value})
                    for value in values
                    if value != getattr(best, name)
                ]
                seconds = _seconds(modules, tried, tokens, repeats)
                number = min(range(len(tried)), key=seconds.__getitem__)
                if seconds[number] < _GAIN * seconds[0]:
                    best = tried[number]
                advance(1)
        best = replace(best, max_tokens=_switch_over(modules, best, repeats))
        advance(1)
    with forced_config(best):
        verify_outputs(modules[:2])
    after = _seconds(modules, [best], 1, repeats)[0]
    weight = modules[0].router.up
    card = "cpu" if weight.device.type == "cpu" else torch.cuda.get_device_name(weight.device)
    cost = modules[0].cost
    remember(card, cost.hidden_size, cost.intermediate_size, weight.dtype, best)
    return {"config": vars(best), "before_us": 1e6 * before, "after_us": 1e6 * after}


def _seconds(
    modules: Sequence[SparseFFN], configs: Sequence[TritonConfig], tokens: int, repeats: int
) -> list[float]:
    """Seconds per FFN of each configuration; infinite where it does not fit the card."""
    x = tokens_for(modules[0], tokens)

    def run() -> None:
        for module in modules:
            module(x)

    calls = {}
    with torch.inference_mode():
        for number, config in enumerate(configs):
            with forced_config(config):
                try:
                    call = captured(run, x.device)
                    if x.device.type != "cuda":
                        call = _under(config, run)
                    calls[str(number)] = call
                except Exception as error:
                    # Too much shared memory, or too many registers.
                    if "out of resource" not in str(error):
                        raise
        taken = on_device(calls, x.device, repeats)
    return [taken.get(str(number), float("inf")) / len(modules) for number in range(len(configs))]


def _under(config: TritonConfig, run: Any) -> Any:
    def call() -> None:
        with forced_config(config):
            run()

    return call


def _switch_over(modules: Sequence[SparseFFN], config: TritonConfig, repeats: int) -> int:
    """The largest number of tokens in a call up to which sparse is no slower than dense."""
    largest = 1
    for tokens in _TOKEN_COUNTS:
        x = tokens_for(modules[0], tokens)

        def dense(x: torch.Tensor = x) -> None:
            for module in modules:
                module.dense(x)

        sparse = _seconds(modules, [config], tokens, repeats)[0]
        with torch.inference_mode():
            seconds = on_device({"dense": captured(dense, x.device)}, x.device, repeats)["dense"]
        if sparse * len(modules) > seconds:
            break
        largest = tokens
    return largest
