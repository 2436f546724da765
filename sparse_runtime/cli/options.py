"""Options and arguments that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sparse_runtime.errors import ConfigError
from sparse_runtime.models import parse_dtype

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, local folder, or 'demo' (SmolLM2-135M).")
]
ClustersOption = Annotated[
    str, typer.Option("--clusters", help="Cluster artifact: folder or Hub id.", metavar="DIR")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the figures to this file.", metavar="FILE")
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
        help="Text: a .txt or .jsonl file, wikitext2, c4, a Hub data set, pydoc, or self. May be "
        "given again; each may end in ,weight=W ,key=A+B ,split=S.",
        metavar="SOURCE",
    ),
]
TestOption = Annotated[
    str | None, typer.Option(help="Held-out text; the data's test split if not given.")
]
BudgetOption = Annotated[
    float | None, typer.Option(help="Cut the sets for this cost share instead of their own.")
]
VerifyOption = Annotated[
    bool | None,
    typer.Option(help="With or without looks at low-bit copies, whatever the artifact has."),
]


def resolve_dtype(text: str, device: str | None) -> torch.dtype:
    """The dtype of ``--dtype``; ``auto`` is what the device computes in."""
    if text != "auto":
        return parse_dtype(text)
    native = not (device or "cpu").startswith("cpu") or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def parse_numbers(option: str, text: str, kind: type) -> list[Any]:
    """Numbers separated by commas. Raises ConfigError where they are none."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} is {text!r}; expected numbers separated by commas, such as "
            + ("256,1024" if kind is int else "0.6,0.7")
        ) from None
