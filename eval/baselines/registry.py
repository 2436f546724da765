"""Opponents by name: methods that skip, at every budget, and dense formats, of which each is one row.

Methods are judged by masks on the dense model (``sparse_runtime.eval.baselines.masked_ffn``). They are
fitted on its hidden states on calibration text, so that the expected cost share is the budget, and none
is fine-tuned. Formats (``sparse_runtime.eval.baselines.dense_formats``) read all weights in fewer bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from sparse_runtime.clusters.capture import HiddenStates, capture_hidden_states
from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.baselines.deja_vu import DejaVu
from sparse_runtime.eval.baselines.dense_formats import (
    FORMAT_GROUPS,
    FORMATS,
    DenseFormat,
    GgufBlocks,
)
from sparse_runtime.eval.baselines.look_all import LOOK_ALL
from sparse_runtime.eval.baselines.masked_ffn import Baseline, Masks, PromptMasks
from sparse_runtime.eval.baselines.neuron_sets import Griffin, Oracle, Random, Static
from sparse_runtime.eval.baselines.thresholds import Cats, Teal, Wina
from sparse_runtime.eval.paper.clusters import AwcPaper
from sparse_runtime.models.ffn_layers import find_ffn_layers
from sparse_runtime.progress import ProgressReporter, SilentProgress

#: Name on the command line -> the method with its default settings.
BASELINES: dict[str, Callable[[], Baseline]] = {
    "oracle": Oracle,
    "teal": Teal,
    "wina": Wina,
    "cats": Cats,
    "deja-vu": DejaVu,
    "griffin": Griffin,
    "awc-paper": AwcPaper,
    "static": Static,
    "random": Random,
}


# Between plain rounding and compensated one, and next to nothing better than the former.
_NOT_OF_ALL = FORMAT_GROUPS["dense-mse"]


def named_baselines(names: Sequence[str]) -> tuple[list[Baseline], list[DenseFormat]]:
    """Methods with their default settings, and dense formats, of these names; each once.

    ``all`` stands for every method and every format but those of ``dense-mse``, and the keys of
    ``FORMAT_GROUPS`` for these.

    Raises:
        ConfigError: there is none of a name, or it asks for a package that is not installed. ``all``
            asks for none.
    """
    known = (*BASELINES, LOOK_ALL, *FORMATS, *FORMAT_GROUPS)
    methods: dict[str, None] = {}
    formats: dict[str, DenseFormat] = {}
    for name in names:
        if name == "all":
            methods |= dict.fromkeys(BASELINES)
            formats |= {n: form for n, form in FORMATS.items() if form not in _NOT_OF_ALL}
        elif name == LOOK_ALL:
            pass  # the artifact's own, without its clusters
        elif name in BASELINES:
            methods[name] = None
        elif name in known:
            for form in FORMAT_GROUPS.get(name) or (FORMATS[name],):
                if isinstance(form, GgufBlocks):
                    form.check_installed()
                formats[form.name] = form
        else:
            raise ConfigError(f"baseline is {name!r}; expected all, or some of {', '.join(known)}")
    return [BASELINES[name]() for name in methods], list(formats.values())


@contextmanager
def captured_states(
    model: nn.Module, windows: Tensor, *, progress: ProgressReporter | None = None
) -> Iterator[HiddenStates]:
    """Capture the FFN inputs of a dense model in a temporary folder, gone after the context.

    Args:
        model: a dense causal language model.
        windows: calibration text [W, window] int64. 16,384 tokens take 570 MB of disk for 30 layers
            and hidden size 576.
        progress: reports one unit per window.

    Raises:
        OutputFolderError: there is no room for them.
    """
    with TemporaryDirectory(prefix="sparse-runtime-") as folder:
        yield capture_hidden_states(model, windows, Path(folder), progress=progress)


def fit_baseline(
    model: nn.Module,
    baseline: Baseline,
    states: HiddenStates,
    budgets: Sequence[float],
    *,
    progress: ProgressReporter | None = None,
) -> list[dict[str, dict[int, Masks | PromptMasks]]]:
    """Fit a baseline on every layer of a dense model.

    Args:
        model: the model that the states were captured from.
        baseline: the method.
        states: FFN inputs on calibration text.
        budgets: expected cost shares.
        progress: reports one unit per layer.

    Returns:
        For each budget, name of the row -> layer index -> masks.

    Raises:
        ConfigError: the baseline cannot meet a budget.
    """
    layers = find_ffn_layers(model)
    for budget in budgets:
        for layer in layers:
            least = baseline.least_share(layer)
            if not least < budget <= 1:
                raise ConfigError(
                    f"budget is {budget!r}; expected a cost share above {least:.3f}, which "
                    f"{baseline.name} reads whatever it skips, and at most 1"
                )
    fitted: list[dict[str, dict[int, Masks | PromptMasks]]] = [{} for _ in budgets]
    with (progress or SilentProgress()).task(f"fit {baseline.name}", len(layers)) as advance:
        for position, layer in enumerate(layers):
            # Training needs gradients, also where the caller has turned them off.
            with torch.inference_mode(False), torch.no_grad():
                inputs = states.layer(position, dtype=torch.bfloat16)
                fits = baseline.fit(layer, inputs, list(budgets))
            for rows, variants in zip(fitted, fits, strict=True):
                for name, masks in variants.items():
                    rows.setdefault(name, {})[layer.index] = masks
            advance(1)
    return fitted
