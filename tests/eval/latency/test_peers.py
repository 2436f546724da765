"""Our variants beside llama.cpp, which a script stands for here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers import needs_library, random_cluster_set

from sparse_runtime import cost_report, sparsify
from sparse_runtime.errors import NotSparseError, SparseRuntimeError
from sparse_runtime.eval.latency import peers
from sparse_runtime.eval.latency.bench import time_compiled_decode
from sparse_runtime.eval.latency.host import host_record
from sparse_runtime.eval.report import peers_markdown
from sparse_runtime.files import write_json
from sparse_runtime.kernels import backends

pytestmark = needs_library
STAND_IN = """
import json, sys
print(json.dumps({"version": "1", "system": "AVX2 = 1", "bytes_per_token": 1000}))
for line in sys.stdin:
    request = json.loads(line)
    print(json.dumps({
        "prompt_tokens": len(request["prompt"]), "new_tokens": request["new_tokens"] + 1 + EXTRA,
        "prefill_tok_s": 100.0, "decode_tok_s": 50.0,
    }))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    def make(extra=0, text=STAND_IN):
        script = tmp_path / "peer.py"
        script.write_text(text.replace("EXTRA", str(extra)))
        monkeypatch.setattr(peers, "_SCRIPT", script)
        return peers.Peer("llama.cpp Q4_0", sys.executable, tmp_path / "file.gguf")

    return make


def bench(model, peer, **options):
    model.generation_config.pad_token_id = 0
    return peers.bench_peers(
        model,
        random_cluster_set(model, 0.4),
        [peer],
        prompt_tokens=12,
        new_tokens=3,
        rounds=2,
        **options,
    )


def test_both_are_timed_in_turns_and_the_page_shows_them(
    tiny_model, stand_in, tmp_path, monkeypatch
):
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}

    def eager(model, ids, steps):
        with torch.inference_mode():
            model(ids[:, :1])
        return [0.5] * steps

    # Compiled steps would take a while to compile.
    monkeypatch.setattr(peers, "time_compiled_decode", eager)
    record = bench(tiny_model, stand_in())
    assert [entry["name"] for entry in record["ours"]] == [
        "dense",
        "dense + fast linears",
        "sparse",
        "sparse + fast linears",
        "dense + fast linears, compiled",
        "sparse + fast linears, compiled",
    ]
    assert [entry["decode_tok_s"] for entry in record["ours"][4:]] == [2, 2]
    (peer,) = record["peers"]
    assert (peer["decode_tok_s"], peer["prefill_tok_s"]) == (50.0, 100.0)
    assert peer["gbps"] == pytest.approx(50 * 1000 / 1e9)
    dense, sparse = (record["ours"][i]["bytes_per_token"] for i in (0, 5))
    weights = sum(p.numel() * 4 for p in tiny_model.parameters()) - 260 * 32 * 4
    ffn = 3 * 3 * 44 * 32 * 4
    assert dense == weights
    assert sparse == pytest.approx(weights - ffn * (1 - record["cost_share"]))
    assert 0.3 < record["cost_share"] < 0.7
    with pytest.raises(NotSparseError):
        cost_report(tiny_model)
    assert all(torch.equal(before[k], v) for k, v in tiny_model.state_dict().items())

    figures, page = tmp_path / "peers.json", tmp_path / "peers.md"
    own = {**record, "host": host_record()}
    write_json(
        figures,
        {**own, "demo": own, "demo, 6 bits": own},
    )
    monkeypatch.setattr(sys, "argv", ["peers_markdown", str(page), str(figures)])
    peers_markdown.main()
    text = page.read_text()
    assert text.count("| llama.cpp Q4_0 | 50.00 | 50–50 | 100.0 |") == 3
    for speed, sentence in (
        (1e6, "\nllama.cpp Q4_0 decodes "),
        (1e-6, " as fast as llama.cpp Q4_0."),
    ):
        other = {**own, "peers": [{**peer, "decode_tok_s": speed}]}
        assert sentence in peers_markdown.report(other)


def test_what_did_not_run_is_no_figure(tiny_model, stand_in):
    with pytest.raises(SparseRuntimeError, match=r"ran 12 \+ 5 tokens; expected 12 \+ 4"):
        bench(tiny_model, stand_in(extra=1), ways=peers.EAGER)
    with pytest.raises(SparseRuntimeError, match=r"ended with code 1: .*No module named 'nobody'"):
        bench(tiny_model, stand_in(text="import nobody"), ways=peers.EAGER)


def test_a_sparse_run_that_was_dense_is_no_figure(tiny_model, stand_in, monkeypatch):
    monkeypatch.setattr(backends, "load_cpu_library", lambda: False)
    with (
        pytest.warns(UserWarning, match="run dense"),
        pytest.raises(SparseRuntimeError, match="no token took the sparse path"),
    ):
        bench(tiny_model, stand_in(), ways=peers.EAGER)


def test_an_error_is_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sparse_runtime.eval.latency.peers",
        "false",
        tmp_path,
        "figures",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: false ")
    assert "ended with code 1" in result.stderr
    assert "Traceback" not in result.stderr


def test_figures_of_something_else(tmp_path, monkeypatch):
    figures = tmp_path / "peers.json"
    figures.write_text(json.dumps({"ours": []}))
    monkeypatch.setattr(sys, "argv", ["peers_markdown", str(tmp_path / "page.md"), str(figures)])
    with pytest.raises(SystemExit, match="make bench-peers"):
        peers_markdown.main()
    assert not (tmp_path / "page.md").exists()


def test_compiled_steps_are_timed_alone(tiny_model):
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), fast_linear=True)
    attention = tiny_model.config._attn_implementation
    steps = time_compiled_decode(tiny_model, torch.tensor([[1] * 20]), 3)
    assert len(steps) == 3
    assert max(steps) < 1  # compiling takes longer
    assert tiny_model.config._attn_implementation == attention
    # All but the prompts of the run that compiled and of the one that was timed.
    assert cost_report(tiny_model).sparse_tokens == 3 * (2 + 3)
