"""Options and arguments that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from sparse_runtime.cli.figures import check_output_file
from sparse_runtime.cli.ranges import (
    ABOVE_ZERO,
    DENSITY,
    FROM_ZERO_TO_ONE,
    NOT_NEGATIVE,
    ONE_OR_MORE,
    PERCENTAGE,
    PLANE_BITS,
    POSITIVE,
    SEED,
    SHARE,
    TWO_OR_MORE,
)
from sparse_runtime.errors import ConfigError
from sparse_runtime.models import parse_dtype
from sparse_runtime.models.ffn_layer import is_packed

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, local folder, or 'demo' (SmolLM2-135M).")
]
ClustersOption = Annotated[
    str, typer.Option("--clusters", help="Cluster artifact: folder or Hub id.", metavar="DIR")
]
RevisionOption = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of the Hub repository that the clusters come from."),
]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Write the figures to this file.",
        metavar="FILE",
        callback=check_output_file,
    ),
]
DtypeOption = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
AutoDtypeOption = Annotated[
    str,
    typer.Option(
        help="bfloat16, float16, float32, or auto: bfloat16 where the device computes in it, else "
        "float32, which is three times faster on such a CPU."
    ),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … [default: cpu]")]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Text: a file (.txt, .jsonl, .json, .csv, .parquet, also compressed), a folder of such, "
        "wikitext2, c4, a Hub data set, pydoc, stdlib, self, or general (of all kinds). May be given "
        "again; each may end in ,weight=W ,key=A+B (fields; A.B inside one) ,split=S (Hub only).",
        metavar="SOURCE",
    ),
]
TestOption = Annotated[
    str | None,
    typer.Option(
        help="Held-out text; if not given, the data's test split, or text that is split off."
    ),
]


def budget_option(text: str) -> Any:
    """An option that takes a cost share, or bits; ``text`` is its help."""
    return typer.Option(help=text, metavar="SHARE", parser=str, callback=SHARE.read)


BudgetOption = Annotated[
    float | None,
    budget_option(
        "Cut the sets for this cost share (0.25), or bits per FFN weight and token (4.0bits), "
        "instead of their own."
    ),
]
VerifyOption = Annotated[
    bool | None,
    typer.Option(help="With or without looks, whatever the artifact has."),
]
WeightsOption = Annotated[
    int | None,
    typer.Option(
        help="Pack the FFNs' weights in planes of so many bits: 3, 4, 5, 6, 7 or 8.",
        callback=PLANE_BITS.callback,
    ),
]
LinearWeightsOption = Annotated[
    int | None,
    typer.Option(
        help="Pack the weights of attention and head likewise.", callback=PLANE_BITS.callback
    ),
]
CompensateOption = Annotated[
    bool | None,
    typer.Option(
        "--compensate/--no-compensate",
        help="With --data: let later inputs make up for the rounding of earlier ones (GPTQ), or choose "
        "scales by the inputs' mean squares alone, in less time and memory [default: compensate]",
    ),
]
TauOption = Annotated[
    float | None,
    typer.Option(
        help="With packed weights: refine neurons whose look is so many times what counting takes "
        "[default: as the sets were cut, or 2]",
        callback=ONE_OR_MORE.callback,
    ),
]
RampOption = Annotated[
    float | None,
    typer.Option(
        help="With packed weights: width of the ramp over which a neuron's share grows [default: 0]",
        callback=NOT_NEGATIVE.callback,
    ),
]
NewBudgetOption = Annotated[
    float,
    budget_option(
        "Mean cost share (0.25), or bits per FFN weight and token (4.0bits), router included."
    ),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        callback=NOT_NEGATIVE.callback,
        help="Divides the logits; 0 takes the likeliest token. This and the other options of sampling "
        "are as the model's generation config says where they are not given.",
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(callback=DENSITY.callback, help="Draw from the likeliest of this probability."),
]
TopKOption = Annotated[
    int | None,
    typer.Option(callback=NOT_NEGATIVE.callback, help="Draw from so many tokens; 0 from all."),
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        callback=FROM_ZERO_TO_ONE.callback,
        help="Draw from tokens of at least this share of the likeliest one's probability.",
    ),
]
RepetitionPenaltyOption = Annotated[
    float | None,
    typer.Option(callback=ABOVE_ZERO.callback, help="Of tokens that came before; 1 is none."),
]
DoSampleOption = Annotated[
    bool | None, typer.Option("--do-sample/--no-do-sample", help="Draw tokens, or not.")
]
SystemOption = Annotated[
    str | None, typer.Option(help="System prompt, where the model's chat template has one.")
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(help="End the text in front of this string. May be given again."),
]
FastLinearOption = Annotated[
    bool,
    typer.Option(
        "--fast-linear", help="Run attention's linear layers and the head by the kernels too."
    ),
]
SeedOption = Annotated[
    int, typer.Option(help="Of everything that is drawn.", callback=SEED.callback)
]
PercentileOption = Annotated[
    float, typer.Option(help="Threshold of binary patterns.", callback=PERCENTAGE.callback)
]
WindowOption = Annotated[
    int, typer.Option(callback=TWO_OR_MORE.callback, help="Tokens per window.")
]
CalibrationTokensOption = Annotated[
    int, typer.Option(callback=POSITIVE.callback, help="Calibration tokens.")
]
TestTokensOption = Annotated[
    int, typer.Option(callback=POSITIVE.callback, help="Tokens of the held-out text.")
]


def plane_options(
    weights: int | None,
    linear_weights: int | None,
    tau: float | None,
    ramp: float | None,
) -> dict[str, Any]:
    """Options of ``sparsify`` for weights in planes: those that are given."""
    options = {"weights": weights, "linear_weights": linear_weights, "tau": tau, "ramp": ramp}
    return {name: value for name, value in options.items() if value is not None}


def check_stages(model: nn.Module, planes: dict[str, Any]) -> None:
    """Refuse ``--tau`` and ``--ramp`` on a model whose FFNs are float and stay so.

    Args:
        model: as it was loaded.
        planes: as :func:`plane_options` gives them.

    Raises:
        ConfigError: one of them is given.
    """
    if "weights" in planes or any(is_packed(module) for module in model.modules()):
        return
    for name in ("tau", "ramp"):
        if name in planes:
            raise ConfigError(f"--{name} has no effect on float weights; give --weights as well")


def resolve_dtype(text: str, device: str | None) -> torch.dtype:
    """The dtype of ``--dtype``; ``auto`` is what the device computes in."""
    if text != "auto":
        return parse_dtype(text)
    native = not (device or "cpu").startswith("cpu") or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32
