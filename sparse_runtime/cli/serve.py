"""``serve``: sparse models behind an OpenAI-compatible server."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_runtime.api import sparsify
from sparse_runtime.cli.console import note, warn
from sparse_runtime.cli.cutting import Cut, MaxLossDomainOption, MaxLossOption
from sparse_runtime.cli.options import (
    BudgetOption,
    DeviceOption,
    DtypeOption,
    LinearWeightsOption,
    RampOption,
    TauOption,
    VerifyOption,
    WeightsOption,
    check_stages,
    plane_options,
    resolve_dtype,
)
from sparse_runtime.cli.ranges import POSITIVE, Range
from sparse_runtime.errors import ConfigError, SparseRuntimeError
from sparse_runtime.models import load_model

if TYPE_CHECKING:
    from socket import socket

    from sparse_runtime.serve.generation import Generator
    from sparse_runtime.serve.served_model import ServedModel

_LIBRARIES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
_PORT = Range("0 to 65535", lambda value: 0 <= value < 2**16)
_LOCAL = ("127.", "localhost", "::1")


ModelsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL…", help="Hub id, local folder, or 'demo' (SmolLM2-135M); one or more."
    ),
]
ClustersOfEachOption = Annotated[
    list[str],
    typer.Option(
        "--clusters", metavar="DIR", help="Cluster artifact of each model: folder or Hub id."
    ),
]
RevisionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--revision", help="Branch, tag or commit of the Hub repository of each --clusters."
    ),
]
NamesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--name", help="Of each model in requests; if not given MODEL, of a folder its last part."
    ),
]
HostOption = Annotated[str, typer.Option(help="Address to listen at.")]
PortOption = Annotated[
    int, typer.Option(callback=_PORT.callback, help="Port; 0 is any that is free.")
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(envvar="SPARSE_RUNTIME_API_KEY", help="Key that requests have to bear."),
]
MaxPromptOption = Annotated[
    int | None,
    typer.Option(callback=POSITIVE.callback, help="Longest prompt; the model's, if not given."),
]
MaxNewOption = Annotated[
    int,
    typer.Option(
        callback=POSITIVE.callback, help="Longest answer; also of requests that name no length."
    ),
]
ReuseOption = Annotated[
    bool, typer.Option(help="Keep the cache of the last answer, for a chat that goes on from it.")
]


def serve(
    models: ModelsArgument,
    clusters: ClustersOfEachOption,
    revisions: RevisionsOption = None,
    names: NamesOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    api_key: ApiKeyOption = None,
    max_prompt_tokens: MaxPromptOption = None,
    max_new_tokens: MaxNewOption = 1024,
    reuse: ReuseOption = True,
    strict: Annotated[
        bool, typer.Option("--strict", help="Start only if every FFN runs sparse.")
    ] = False,
    fast_linear: Annotated[
        bool,
        typer.Option(
            "--fast-linear", help="Run attention's linear layers and the head by the kernels too."
        ),
    ] = False,
    weights: WeightsOption = None,
    linear_weights: LinearWeightsOption = None,
    tau: TauOption = None,
    ramp: RampOption = None,
    budget: BudgetOption = None,
    max_loss: MaxLossOption = None,
    max_loss_domain: MaxLossDomainOption = None,
    verify: VerifyOption = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = None,
) -> None:
    """Serve sparse models: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.

    One answer is generated at a time, in the order of the requests. Needs the extra 'serve'.
    """
    _check_libraries()
    from sparse_runtime.serve.generation import Generator
    from sparse_runtime.serve.server import claim_port

    sources = _sources(models, clusters, revisions, names)
    if api_key == "":
        raise ConfigError("--api-key is empty; expected a key, or leave it out")
    planes = plane_options(weights, linear_weights, tau, ramp)
    ways: dict[str, Any] = {"strict": strict, "fast_linear": fast_linear}
    ways |= planes
    cut = Cut(budget, verify, max_loss, max_loss_domain)
    limits = {"prompt": max_prompt_tokens, "answer": max_new_tokens}
    options = {"dtype": resolve_dtype(dtype, device), "device": device}
    bound = claim_port(host, port)
    if api_key is None and not host.startswith(_LOCAL):
        warn(f"whoever reaches {host} can use this server; --api-key asks for a key")
    generator = Generator()
    try:
        load = partial(_load, sources, options, planes, cut, ways, limits, reuse=reuse)
        served = generator.call(load)
        for model in served.values():
            _announce(model, strict=strict)
        _run(served, generator, bound, host=host, api_key=api_key)
    finally:
        bound.close()
        generator.close()


def _check_libraries() -> None:
    missing = [name for module, name in _LIBRARIES.items() if find_spec(module) is None]
    if missing:
        raise SparseRuntimeError(
            f"serve needs {', '.join(missing)}; pip install 'sparse-runtime[serve]'"
        )
    from sparse_runtime.serve.parts import check_version

    check_version()


def _sources(
    models: list[str],
    clusters: list[str],
    revisions: list[str] | None,
    names: list[str] | None,
) -> dict[str, tuple[str, str, str | None]]:
    """Name in requests -> model, clusters and their revision."""
    given = {"--clusters": clusters, "--revision": revisions, "--name": names}
    for option, values in given.items():
        if values and len(values) != len(models):
            raise ConfigError(
                f"there are {len(models)} models and {len(values)} {option}; expected one for each, "
                "in the same order"
            )
    names = names or [
        Path(model).resolve().name if Path(model).exists() else model for model in models
    ]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two models are called {twice[0]!r}; give each a --name of its own")
    of_each: list[str | None] = list(revisions) if revisions else [None] * len(models)
    return dict(zip(names, zip(models, clusters, of_each, strict=True), strict=True))


def _load(
    sources: dict[str, tuple[str, str, str | None]],
    options: dict[str, Any],
    planes: dict[str, Any],
    cut: Cut,
    ways: dict[str, Any],
    limits: dict[str, Any],
    *,
    reuse: bool,
) -> dict[str, ServedModel]:
    """Name -> model, sparse and proven to be, to what degree it is."""
    from sparse_runtime.attention import fast_attention
    from sparse_runtime.serve.served_model import Limits, ServedModel

    artifacts = {name: cut.load(place, rev) for name, (_, place, rev) in sources.items()}
    served = {}
    for name, (source, _, _) in sources.items():
        model, tokenizer = load_model(source, **options)
        check_stages(model, planes)
        fast_attention(sparsify(model, cut.of(model, artifacts[name]), **ways))
        limited = Limits.of(model, **limits)
        served[name] = ServedModel(name, model, tokenizer, limited, reuse=reuse)
        served[name].warm_up()
    return served


def _announce(served: ServedModel, *, strict: bool) -> None:
    """Say what runs sparse, as it was counted; refuse with ``strict`` where not all does."""
    activation = served.activation
    assert activation is not None
    if strict and not activation.complete:
        raise SparseRuntimeError(f"{served.name}: {activation}; --strict expects all of them")
    (note if activation.complete else warn)(f"{served.name}: {activation}")


def _run(
    served: dict[str, ServedModel],
    generator: Generator,
    bound: socket,
    *,
    host: str,
    api_key: str | None,
) -> None:
    """Serve until a signal comes."""
    from sparse_runtime.serve.app import build_app
    from sparse_runtime.serve.server import Server

    place = f"[{host}]" if ":" in host else host
    text = f"serving at http://{place}:{bound.getsockname()[1]}/v1, one answer at a time"
    app = build_app(served, generator, api_key=api_key)
    Server(app, started=lambda: note(text), stop=generator.stop).run(sockets=[bound])
