"""Our variants and llama.cpp, in turns in one run: what ``make bench-peers`` calls.

    python -m sparse_runtime.eval.latency.peers PYTHON FOLDER FIGURES.json [PART…]

PYTHON has xllamacpp and gguf (llama.cpp with prebuilt wheels, which are of AVX2 on Linux); FOLDER keeps
the GGUF files. Each round times every one of ours, then each peer in a process of its own, started for
that round: the weights of all do not fit into memory together.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparse_runtime.api import reset_cost, sparsify, unsparsify
from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.artifact.recut import recut
from sparse_runtime.attention import fast_attention, slow_attention
from sparse_runtime.cost import DENSE_BITS
from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.latency.bench import (
    sparse_report,
    time_compiled_decode,
    time_decode,
    time_prefill,
)
from sparse_runtime.eval.latency.host import ReadBandwidth, host_record
from sparse_runtime.eval.latency.shapes import (
    HALF_REFINED,
    SHAPES,
    random_clusters,
    random_model,
    staged_clusters,
)
from sparse_runtime.ffn.counts import bytes_per_token
from sparse_runtime.ffn.fast_linear import fast_linear, slow_linear
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.files import write_json
from sparse_runtime.models import load_model
from sparse_runtime.models.demo_model import demo_file
from sparse_runtime.progress import ProgressReporter, TqdmProgress

PROMPT_TOKENS = 128
NEW_TOKENS = 32
ROUNDS = 3
GGUF_TYPES = ("Q4_0", "Q8_0")
_DENSITY = 0.5
_SHAPE = "mistral-7b"


@dataclass(frozen=True)
class Way:
    """One of our ways to run a model.

    Attributes:
        sparse: with clusters.
        fast_linear: other linear layers by our kernels too; those in planes always are.
        fast_attention: single tokens' attention by matrix products; compiled it always is.
        compiled: decode steps as one compiled graph.
        tau: over planes, see ``SparseConfig``.
    """

    sparse: bool = False
    fast_linear: bool = False
    fast_attention: bool = False
    compiled: bool = False
    tau: float = 2.0


EAGER = {
    "dense": Way(),
    "dense + fast linears": Way(fast_linear=True),
    "sparse": Way(sparse=True),
    "sparse + fast linears": Way(sparse=True, fast_linear=True),
}
WAYS = EAGER | {
    "dense + fast linears, compiled": Way(fast_linear=True, compiled=True),
    "sparse + fast linears, compiled": Way(sparse=True, fast_linear=True, compiled=True),
}
_SCRIPT = Path(__file__).with_name("llama_peer.py")
_HOW = "pip install xllamacpp gguf into an environment of its own, as make bench-peers does"


@dataclass
class Runner:
    """One way to run a model.

    Attributes:
        name: in the tables.
        bytes_per_token: weight bytes that decoding one token reads.
        prefill: tokens per second of the prompt, by round.
        decode: tokens per second of new tokens, by round.
    """

    name: str
    bytes_per_token: float = 0.0
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def add(self, prefill: float, decode: float) -> None:
        """Note a round."""
        self.prefill.append(prefill)
        self.decode.append(decode)

    def record(self) -> dict[str, Any]:
        """Medians, ranges and bandwidth, as JSON."""
        decode = statistics.median(self.decode)
        return {
            "name": self.name,
            "decode_tok_s": decode,
            "decode_range": [min(self.decode), max(self.decode)],
            "prefill_tok_s": statistics.median(self.prefill),
            "prefill_range": [min(self.prefill), max(self.prefill)],
            "bytes_per_token": self.bytes_per_token,
            "gbps": decode * self.bytes_per_token / 1e9,
        }


class Peer(Runner):
    """llama.cpp with one GGUF file."""

    def __init__(self, name: str, python: str, file: Path) -> None:
        super().__init__(name)
        self._command = [python, str(_SCRIPT), "run", str(file), str(torch.get_num_threads())]
        self.about: dict[str, Any] = {}

    def run(self, prompt: Sequence[int], new_tokens: int) -> None:
        """Load the file, warm up, and time a prompt and the tokens after it.

        Raises:
            SparseRuntimeError: llama.cpp does not run, or ran something else.
        """
        request = json.dumps({"prompt": list(prompt), "new_tokens": new_tokens})
        warm_up = json.dumps({"prompt": list(prompt[:8]), "new_tokens": 2})
        answers = _lines(self._command, f"{warm_up}\n{request}\n")
        self.about, _, figures = (json.loads(line) for line in answers)
        if (figures["prompt_tokens"], figures["new_tokens"]) != (len(prompt), new_tokens + 1):
            raise SparseRuntimeError(
                f"llama.cpp ran {figures['prompt_tokens']} + {figures['new_tokens']} tokens; expected "
                f"{len(prompt)} + {new_tokens + 1}"
            )
        self.bytes_per_token = self.about.pop("bytes_per_token")
        self.add(figures["prefill_tok_s"], figures["decode_tok_s"])


def bench_peers(
    model: Any,
    clusters: ClusterSet,
    peers: Sequence[Peer],
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
    ways: Mapping[str, Way] = WAYS,
    progress: ProgressReporter | None = None,
) -> dict[str, Any]:
    """Time a model in our ways and in llama.cpp's, in turns.

    Args:
        model: a dense causal language model on the CPU, in floats or in planes; dense again when this
            returns.
        clusters: of it.
        peers: to run beside it.
        prompt_tokens: length of a random prompt.
        new_tokens: decode steps timed in each round.
        rounds: after one that warms ours up.
        ways: to run the model, by their names in the tables.
        progress: reports one unit per run.

    Returns:
        ``ours`` and ``peers``: a record of each (see :meth:`Runner.record`); ``read_gbps``, its
        median, and ``read_range``; ``cost_share`` and, the same, ``bits_per_weight``; ``llama_cpp``:
        version and instruction sets.

    Raises:
        SparseRuntimeError: llama.cpp does not run, or nothing of ours ran sparse.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(
        3, model.config.get_text_config().vocab_size, (1, prompt_tokens), generator=generator
    )
    bandwidth, read = ReadBandwidth(), list[float]()
    ours = [(way, Runner(name)) for name, way in ways.items()]
    cache = time_prefill(model, prompt[:, :-1])[1]
    share, bits = 1.0, float(DENSE_BITS)
    runs = (rounds + 1) * len(ours) + rounds * len(peers)
    with (progress or TqdmProgress()).task("peers", runs) as advance:
        for number in range(rounds + 1):
            for way, runner in ours:
                with _made(model, clusters, way):
                    seconds = time_prefill(model, prompt)[0]
                    if way.compiled:
                        steps = time_compiled_decode(model, prompt, new_tokens if number else 2)
                    else:
                        steps = time_decode(model, prompt, cache, new_tokens if number else 2)
                    if way.sparse:
                        report = sparse_report(model)
                        share, bits = report.cost_share, report.bits_per_weight
                    runner.bytes_per_token = bytes_per_token(model)
                if number:
                    runner.add(prompt_tokens / seconds, 1 / statistics.mean(steps))
                advance(1)
            for peer in peers if number else ():
                peer.run(prompt[0].tolist(), new_tokens)
                advance(1)
            read.append(bandwidth())
    return {
        "ours": [runner.record() for _, runner in ours],
        "peers": [peer.record() for peer in peers],
        "read_gbps": statistics.median(read),
        "read_range": [min(read), max(read)],
        "cost_share": share,
        "bits_per_weight": bits,
        "rounds": rounds,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "llama_cpp": peers[0].about if peers else None,
    }


@contextmanager
def _made(model: Any, clusters: ClusterSet, way: Way) -> Iterator[None]:
    """The model in one of our ways, inside the context."""
    if way.sparse:
        options: dict[str, Any] = {"fast_linear": way.fast_linear, "tau": way.tau}
        sparsify(model, clusters, check_fingerprint=False, **options)
        reset_cost(model)
    elif way.fast_linear:
        fast_linear(model)
    if way.fast_attention:
        fast_attention(model)
    try:
        yield
    finally:
        if way.sparse:
            unsparsify(model)
        slow_linear(model)
        slow_attention(model)


def _lines(command: Sequence[str], requests: str) -> list[str]:
    result = subprocess.run(command, input=requests, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise SparseRuntimeError(
            f"{' '.join(command[:2])} ended with code {result.returncode}: {last}; {_HOW}"
        )
    return result.stdout.splitlines()


def random_gguf(python: str, folder: Path, shape: str, kind: str) -> Path:
    """A GGUF file of a known shape with random weights, written where there is none.

    Raises:
        SparseRuntimeError: it cannot be written.
    """
    file = folder / f"{shape}.{kind}.gguf"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fields = folder / f"{shape}.json"
        write_json(fields, SHAPES[shape])
        _lines([python, str(_SCRIPT), "write", str(fields), kind, str(file)], "")
    return file


def _time_demo(python: str, _: Mapping[str, Path]) -> dict[str, Any]:
    model, _tokenizer = load_model("demo", dtype=torch.bfloat16)
    clusters = recut(model, _demo_clusters(), budget=_DENSITY)
    return bench_peers(model, clusters, [_demo_peer(python)], rounds=2 * ROUNDS)


def _time_shape(python: str, files: Mapping[str, Path]) -> dict[str, Any]:
    model = random_model(_SHAPE)
    clusters = random_clusters(model, density=_DENSITY)
    # Compiling would take one to two minutes in each round.
    return bench_peers(model, clusters, _shape_peers(python, files), ways=EAGER)


def _time_demo_planes(python: str, _: Mapping[str, Path]) -> dict[str, Any]:
    model, _tokenizer = load_model("demo", dtype=torch.bfloat16)
    pack_model(model, 6, linears=6)
    ways = {
        "6 bits": Way(fast_attention=True),
        "6 bits, sparse": Way(sparse=True, fast_attention=True),
        "6 bits, compiled": Way(compiled=True),
        "6 bits, sparse, compiled": Way(sparse=True, compiled=True),
    }
    peers = [_demo_peer(python)]
    return bench_peers(model, _demo_clusters(), peers, ways=ways, rounds=2 * ROUNDS)


def _time_shape_planes(bits: int, python: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """All weights in planes; of the neurons some 80 % looked at, 40 % counted and 20 % refined."""
    model = random_model(_SHAPE)
    clusters = staged_clusters(model)
    pack_model(model, bits, linears=bits)
    ways = {
        f"{bits} bits": Way(fast_attention=True),
        f"{bits} bits, sparse": Way(sparse=True, fast_attention=True, tau=HALF_REFINED),
        f"{bits} bits, compiled": Way(compiled=True),
        f"{bits} bits, sparse, compiled": Way(sparse=True, compiled=True, tau=HALF_REFINED),
    }
    return bench_peers(model, clusters, _shape_peers(python, files), ways=ways)


def _shape_peers(python: str, files: Mapping[str, Path]) -> list[Peer]:
    return [Peer(f"llama.cpp {kind}", python, files[kind]) for kind in GGUF_TYPES]


def _demo_peer(python: str) -> Peer:
    file = demo_file()
    return Peer(f"llama.cpp {file.suffixes[-2].lstrip('.')}", python, file)


def _demo_clusters() -> ClusterSet:
    return ClusterSet.from_pretrained("runs/demo/clusters", centroids=True)


#: Parts of a run, by what they are called in the figures.
PARTS: dict[str, Callable[[str, Mapping[str, Path]], dict[str, Any]]] = {
    _SHAPE: _time_shape,
    f"{_SHAPE}, 5 bits": partial(_time_shape_planes, 5),
    f"{_SHAPE}, 4 bits": partial(_time_shape_planes, 4),
    "demo": _time_demo,
    "demo, 6 bits": _time_demo_planes,
}


def main(python: str, folder: str, figures: str, *parts: str) -> None:
    """Time all parts, or those that are named, and write the figures beside those of others.

    Raises:
        SparseRuntimeError: a part is unknown, or llama.cpp does not run.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise SparseRuntimeError(f"part {unknown[0]!r} is unknown; expected some of {list(PARTS)}")
    files = {kind: random_gguf(python, Path(folder), _SHAPE, kind) for kind in GGUF_TYPES}
    path = Path(figures)
    record = json.loads(path.read_text(encoding="utf-8")) if parts and path.exists() else {}
    for name in parts or PARTS:
        own = {**PARTS[name](python, files), "host": host_record()}
        record |= own if name == _SHAPE else {name: own}
        write_json(path, record)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SparseRuntimeError as failure:
        sys.exit(f"error: {failure}")
