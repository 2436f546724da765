"""What a build will take, from a short measurement: one decoder layer, a few windows, two fits.

Every stage is so many passes over so many windows through all decoder layers, or so many fits of a
layer, whose time is a line in the number of tokens. What these take is measured on the layer in the
middle of the decoder; the rest is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.recut import recut
from sparse_runtime.clusters.buffers import Buffers
from sparse_runtime.clusters.build_checks import settings_for
from sparse_runtime.clusters.config import BuildConfig, BuildSettings
from sparse_runtime.clusters.fisher import without_gradients
from sparse_runtime.clusters.layer_build import fit_layer, uncut_layer
from sparse_runtime.clusters.layer_data import scored
from sparse_runtime.clusters.plane_layers import ROUNDING_TOKENS
from sparse_runtime.clusters.router_choice import PROBE_TOKENS, router_candidates
from sparse_runtime.clusters.seeding import layer_generator
from sparse_runtime.clusters.sweep import Sweep
from sparse_runtime.clusters.text import DataSource, expand_recipes, num_sampled_tokens
from sparse_runtime.clusters.tuning.distill import Distillation
from sparse_runtime.clusters.tuning.in_loop import LOOP_TOKENS
from sparse_runtime.clusters.tuning.masks import kept_looks
from sparse_runtime.clusters.tuning.student import students_of
from sparse_runtime.cost import element_size
from sparse_runtime.kernels.planes import LOOK_FORMAT, PlaneFormat
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.models.fingerprint import structure
from sparse_runtime.models.onloading import is_offloaded
from sparse_runtime.models.output_head import output_head

# Windows that passes are timed on, and tokens of the two fits.
_TIMED_WINDOWS = 2
_FIT_TOKENS = (1024, 3072)
# Sequences whose sampling is timed, and steps for each token that comes of them: many end early, and
# later steps have more to attend to.
_SAMPLED_AT_ONCE, _STEPS_PER_TOKEN = 32, 1.3
# Cuts that are measured on held-out text: the budget's own, and others.
_CUTS = 8
# Rows of the product that operations are timed by; and what one of K inputs takes beside them where
# rounding is compensated, of two cores.
_SQUARE, _INPUT_SECONDS = 1024, 1e-4
# Layers that routers are tried on.
_PROBES = 3


@dataclass(frozen=True)
class StageEstimate:
    """What a stage will take.

    Attributes:
        name: as in a build's times.
        seconds: of it.
        memory: bytes beside the model's weights in memory.
        disk: bytes that it leaves in the working folder.
    """

    name: str
    seconds: float
    memory: int
    disk: int


@dataclass(frozen=True)
class BuildEstimate:
    """What a build will take.

    Attributes:
        stages: in their order.
        model: bytes of the process with the model's weights in memory, one layer of offloaded ones.
        artifact: bytes of it.
        tokens: of calibration.
    """

    stages: tuple[StageEstimate, ...]
    model: int
    artifact: int
    tokens: int

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory(self) -> int:
        """Bytes at the peak."""
        return self.model + max(stage.memory for stage in self.stages)

    @property
    def disk(self) -> int:
        """Bytes at the end, before the working folder goes."""
        return self.artifact + sum(stage.disk for stage in self.stages)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {
            "seconds": self.seconds,
            "memory": self.memory,
            "disk": self.disk,
        }


@dataclass(frozen=True)
class _Times:
    """Seconds of one window through one decoder layer, or of the head; and of a fit by tokens.

    ``load`` is what a layer takes to be in memory, ``student`` what it takes to be sparse, and
    ``product`` an operation of a float32 matrix product.
    """

    forward: float
    backward: float
    sparse: float
    sparse_backward: float
    head: float
    head_backward: float
    fit_base: float
    fit_token: float
    load: float
    student: float
    product: float

    def fit(self, tokens: int) -> float:
        """Of fitting a layer on so many tokens."""
        return max(0.0, self.fit_base) + tokens * self.fit_token


def estimate_build(
    model: Any,
    config: BuildConfig | None = None,
    data: Sequence[str | DataSource] = ("general",),
    *,
    processes: int = 1,
) -> BuildEstimate:
    """Measure for some seconds, and say what a build will take.

    Of its text only the part that is sampled from the model counts, not what is read or fetched.

    Args:
        model: a dense causal language model, as for ``build_clusters``.
        config: settings; all the text there is (``max_tokens`` None) is counted as 65,536 tokens.
        data: text sources, as for ``build_clusters``.
        processes: that build together, each as fast as this one.

    Raises:
        ConfigError: settings that cannot work together.
        UnsupportedArchitectureError, NothingMatchedError: see ``find_ffn_layers``.
    """
    settings = settings_for(model, config)
    layers = find_ffn_layers(model)
    candidates = router_candidates(layers, settings)
    times = _measured(model, layers, settings)
    windows = max(2, (settings.max_tokens or 65_536) // settings.window)
    held_out = max(1, round(windows * settings.held_out_share))
    depth = len({layer.depth for layer in layers})
    sources = expand_recipes(data, sampled=not is_offloaded(model)).sources
    sampled = num_sampled_tokens(sources, windows * settings.window, settings.window)
    text = StageEstimate("text", _sampling_seconds(model, sampled), 0, 0)
    stages = _stages(settings, times, layers, candidates, windows, held_out, depth)
    return BuildEstimate(
        (text, *(_split(stage, processes, settings.window) for stage in stages)),
        _resident(model, layers),
        _artifact_bytes(layers, settings),
        windows * settings.window,
    )


def _split(stage: StageEstimate, processes: int, window: int) -> StageEstimate:
    """A stage that processes share; of a distillation's steps each takes a window at least."""
    if stage.name == "distill":
        processes = min(processes, max(1, Distillation.step_tokens // window))
    return replace(stage, seconds=stage.seconds / processes)


def _stages(
    settings: BuildSettings,
    times: _Times,
    layers: list[FFNLayer],
    candidates: list[int | None],
    windows: int,
    held_out: int,
    depth: int,
) -> list[StageEstimate]:
    layer, window = layers[0], settings.window
    tokens, bound = windows * window, settings.memory_mib * 2**20
    width, value = layer.hidden_size, element_size(layer.dtype)
    most = max(one.intermediate_size for one in layers)
    between = min(bound, tokens * width * value)
    captured = tokens * width * (2 * len(layers) + value)
    stages: list[StageEstimate] = []

    def add(name: str, seconds: float, memory: int = 0, disk: int = 0, sweeps: int = 1) -> None:
        """A stage of so many sweeps, whose layers are loaded beside."""
        seconds += sweeps * depth * times.load
        stages.append(StageEstimate(name, seconds, memory, disk))

    add("capture", windows * depth * times.forward, between + bound, captured)
    if settings.fisher_tokens is not None:
        count = max(1, min(tokens, settings.fisher_tokens) // window)
        each = depth * (times.forward + times.backward) + times.head_backward
        kept = min(bound, count * window * width * value * depth)
        add("fisher", count * each, kept + 2 * between, 4 * most * len(layers), sweeps=2)
    planes = 0
    if settings.weights is not None:
        form = PlaneFormat.of_bits(settings.weights)
        planes = sum(
            one.intermediate_size * sum(form.record_sizes(width).values()) for one in layers
        )
        count = min(max(1, ROUNDING_TOKENS // window), windows - held_out)
        each = 2 * count * times.forward + _packing_seconds(width, most, count * window, times)
        add("pack", depth * each, planes + between + 12 * most**2, sweeps=2)
    # Hidden states and importance of a layer, each in a file above the bound; and coverage.
    parts = [2 * tokens * width, 2 * tokens * most]
    own_layer = planes + sum(min(bound, part) for part in parts)
    own_layer += 2 * tokens * settings.num_clusters
    spilled = sum(part for part in parts if part > bound)
    if len(candidates) > 1:
        seconds = _PROBES * len(candidates) * times.fit(min(tokens, PROBE_TOKENS))
        add("router choice", seconds, own_layer)
    fitted = 7 * settings.num_clusters * most
    disk = fitted * len(layers) + spilled
    add("layers", len(layers) * times.fit(tokens), own_layer, disk)
    if settings.allocation == "global":
        loop = min(max(1, LOOP_TOKENS // window), windows - held_out)
        each = depth * (times.sparse + times.sparse_backward) + times.head_backward
        # Centroids and biases of all layers; a layer's weights as they are looked at, and its values.
        sparse = (fitted + 16 * settings.num_clusters * width) * len(layers) + 3 * between
        sparse += planes + 10 * most * width + 32 * most * window
        students = depth * times.student
        if settings.loop_weights:
            kept = min(bound, loop * window * width * value * depth)
            add("loop_weights", loop * each + 2 * students, sparse + kept, sweeps=2)
        cut = depth * times.sparse + 2 * times.head
        if settings.tune_tokens:
            count = min(max(1, settings.tune_tokens // window), windows - held_out)
            seconds = count * depth * 2 * times.sparse + min(loop, held_out) * cut
            add("tune", seconds + 2 * students, sparse, sweeps=2)
        if settings.distill:
            step = 2 * (depth * times.sparse_backward + times.head_backward)
            checks = (1 + settings.distill // 10) * min(loop, held_out) * cut
            add("distill", settings.distill * step + checks + students, sparse, sweeps=0)
        looked_at = settings.verify and settings.weights is None
        looks = len(layers) * most * LOOK_FORMAT.look_size(width, 2) if looked_at else 0
        add("measure", _CUTS * (held_out * cut + students), sparse, looks, sweeps=_CUTS)
    add("scores", len(layers) * times.fit_token * held_out * window)
    return stages


def _packing_seconds(hidden_size: int, neurons: int, tokens: int, times: _Times) -> float:
    """Of rounding an FFN with compensation: second moments, their factors, and the rounding."""
    moments = 2 * tokens * (hidden_size**2 + neurons**2)
    factors = 4 / 3 * (hidden_size**3 + neurons**3)
    compensation = neurons * hidden_size * (2 * hidden_size + neurons)
    own = _INPUT_SECONDS * (hidden_size + neurons)
    return own + times.product * (moments + factors + compensation)


def _measured(model: Any, layers: list[FFNLayer], settings: BuildSettings) -> _Times:
    ids = torch.randint(
        0,
        model.get_input_embeddings().weight.shape[0],
        (_TIMED_WINDOWS, settings.window),
        generator=torch.Generator().manual_seed(settings.seed),
    )
    with Buffers() as buffers, without_gradients(model):
        sweep = Sweep(model, ids, buffers)
        owned = sweep.owners(layers)
        number = len(sweep.parts) // 2
        position = (owned[number] or [0])[0]
        layer, share = layers[position], len({one.depth for one in layers}) / len(sweep.parts)

        def entered() -> None:
            with sweep.entered(number):
                pass

        load = _seconds(entered)
        with sweep.entered(number):
            plain = _passes(sweep, number, share)
            fits, cut = _fits(model, layer, settings)

            def student() -> None:
                with students_of([layer], cut.layers):
                    pass

            with TemporaryDirectory() as folder, kept_looks(Path(folder)):
                of_student = _seconds(student)
                with students_of([layer], cut.layers):
                    sparse = _passes(sweep, number, share)
    head = output_head(model)
    # Some decoders end in a projection to another width.
    width = getattr(model.get_output_embeddings(), "in_features", layer.hidden_size)
    states = torch.zeros(settings.window, width, dtype=model.dtype, device=model.device)

    def logits() -> Tensor:
        return head(states).float().log_softmax(-1)

    def with_gradients() -> None:
        leaf = states.detach().requires_grad_()
        found = head(leaf).float()
        labels = torch.zeros(len(found), dtype=torch.int64, device=found.device)
        F.cross_entropy(found, labels, reduction="sum").backward()

    with torch.no_grad():
        of_head = _seconds(logits)
    slope = (fits[1] - fits[0]) / (_FIT_TOKENS[1] - _FIT_TOKENS[0])
    slope = max(slope, 0.1 * fits[1] / _FIT_TOKENS[1])
    base = fits[0] - slope * _FIT_TOKENS[0]
    of_both = of_head, _seconds(with_gradients)
    square = torch.ones(_SQUARE, _SQUARE, device=model.device)
    product = _seconds(lambda: square @ square) / (2 * _SQUARE**3)
    return _Times(*plain, *sparse, *of_both, base, slope, load, of_student, product)


def _sampling_seconds(model: Any, tokens: int) -> float:
    """Of sampling so many tokens, by some steps of a batch."""
    if tokens == 0:
        return 0.0
    ids = torch.zeros(_SAMPLED_AT_ONCE, 8, dtype=torch.int64, device=model.device)

    def steps(count: int) -> float:
        options: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count}
        options |= {"pad_token_id": 0, "do_sample": False}
        options |= dict.fromkeys(("temperature", "top_k", "top_p"))
        mask = torch.ones_like(ids)
        return _seconds(lambda: model.generate(ids, attention_mask=mask, **options))

    step = max(0.0, steps(9) - steps(1)) / 8
    return tokens / _SAMPLED_AT_ONCE * step * _STEPS_PER_TOKEN


def _passes(sweep: Sweep, number: int, share: float) -> tuple[float, float]:
    """Seconds of a window's forward, and of one with a backward pass, of a decoder layer."""

    def forward() -> None:
        with torch.no_grad():
            sweep.run(number, 1)

    def backward() -> None:
        if sweep.whole:
            forward()
            return
        x = sweep.states[1].clone().requires_grad_()
        found = sweep.run(number, 1, x)
        found.backward(torch.ones_like(found))

    one, both = _seconds(forward), _seconds(backward)
    # All layers at once where the decoder is the only part, whose backward takes twice its forward.
    return (one / share, 3 * one / share) if sweep.whole else (one, both)


def _fits(model: Any, layer: FFNLayer, settings: BuildSettings) -> tuple[list[float], ClusterSet]:
    """Seconds of fits on the two numbers of tokens; and an artifact of the layer."""
    generator = torch.Generator().manual_seed(0)
    seconds: list[float] = []
    rank = router_candidates([layer], settings)[-1]
    fisher = torch.ones(layer.intermediate_size) if settings.fisher_tokens else None
    for tokens in _FIT_TOKENS:
        states = (
            torch.randn(tokens + 256, layer.hidden_size, generator=generator)
            .bfloat16()
            .to(layer.device)
        )
        started = time.perf_counter()
        scores = states.new_empty(len(states), layer.intermediate_size)
        data = scored(states, layer, settings, num_fit=tokens, scores=scores, fisher=fisher)
        fitted = fit_layer(data, layer, settings, rank, fisher, layer_generator(0, layer.index))
        seconds.append(time.perf_counter() - started)
    uncut = {layer.index: uncut_layer(layer, settings, fitted)}
    clusters = ClusterSet(uncut, structure(model, find_ffn_layers(model)), settings.budget)
    if settings.allocation != "global":
        return seconds, clusters
    return seconds, recut(model, clusters, budget=settings.budget, verify=settings.verify)


def _seconds(work: Callable[[], Any]) -> float:
    """The median of three runs."""
    found = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return median(found)


def _resident(model: Any, layers: list[FFNLayer]) -> int:
    """Bytes of this process, and of one layer that is still on the disk."""
    now: int = psutil.Process().memory_info().rss
    if not is_offloaded(model):
        return now
    layer = layers[0].decoder_layer or layers[0].parent
    return now + sum(p.numel() * element_size(model.dtype) for p in layer.parameters())


def _artifact_bytes(layers: list[FFNLayer], settings: BuildSettings) -> int:
    clusters = settings.num_clusters
    each = [
        clusters * (layer.intermediate_size * 25 // 4 + 4 * layer.hidden_size) for layer in layers
    ]
    return sum(each)
