"""``sparse-runtime serve``: what it refuses, what it proves, how it ends."""

import copy
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import httpx2 as httpx
import openai
import pytest
from helpers import make_tiny_model, needs_library, random_cluster_set

from sparse_runtime import SparseRuntimeError, sparsify
from sparse_runtime.serve import parts
from sparse_runtime.serve.activation import Activation, prove


@pytest.fixture
def folders(tiny_folder, tiny_model, tmp_path):
    clusters = tmp_path / "clusters"
    random_cluster_set(tiny_model, 0.4).save_pretrained(clusters)
    return tiny_folder, clusters


def test_wrong_usage_is_named(run, folders, tmp_path):
    model, clusters = folders
    both = ("--clusters", clusters, "--clusters", clusters)
    for arguments, code, words in (
        ((tmp_path / "none", "--clusters", clusters), 1, "there is no such folder"),
        ((model, "--clusters", tmp_path / "none"), 1, "none"),
        ((model,), 2, "--clusters"),
        ((model, *both), 2, "1 models and 2 --clusters"),
        ((model, model, *both), 2, "two models are called 'tiny-model'"),
        ((model, model, *both, "--name", "a"), 2, "2 models and 1 --name"),
        ((model, model, *both, "--revision", "v1"), 2, "2 models and 1 --revision"),
        ((model, "--clusters", clusters, "--port", 70000), 2, "0 to 65535"),
        ((model, "--clusters", clusters, "--max-new-tokens", 0), 2, "1 or more"),
        ((model, "--clusters", clusters, "--api-key", ""), 2, "--api-key is empty"),
        ((model, "--clusters", clusters, "--host", "no.such.host.invalid"), 1, "cannot be served"),
    ):
        port = () if "--port" in arguments else ("--port", 0)
        exit_code, _, err = run("serve", *arguments, *port)
        assert exit_code == code, err
        assert words in err
        assert "\nTraceback" not in err


def test_a_port_that_is_taken_is_found_before_the_model_is_loaded(run, folders, monkeypatch):
    from sparse_runtime.cli import serve

    monkeypatch.setattr(serve, "load_model", lambda *args, **options: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("serve", folders[0], "--clusters", folders[1], "--port", port)
    assert code == 1
    assert f"127.0.0.1:{port} cannot be served: Address already in use" in err


def test_libraries_and_versions_that_are_missing_are_named(run, folders, monkeypatch):
    from sparse_runtime.cli import serve

    command = ("serve", folders[0], "--clusters", folders[1], "--port", 0)
    monkeypatch.setattr(parts, "TESTED", "5.1")
    code, _, err = run(*command)
    assert code == 1
    assert re.search(
        r"transformers 5\.1, and transformers 5\.\d+\.\d+ is installed; pip install", err
    )
    monkeypatch.setattr(serve, "_LIBRARIES", {"no_such_module": "no-such-package"})
    code, _, err = run(*command)
    assert code == 1
    assert "serve needs no-such-package; pip install 'sparse-runtime[serve]'" in err


@needs_library
def test_activation_is_counted_layer_by_layer(tiny_model):
    model = sparsify(copy.deepcopy(tiny_model), random_cluster_set(tiny_model, 0.4))
    assert str(prove(model, [1, 2])) == "3 of 3 FFN layers run sparse on cpu"
    # One layer is not in the artifact, one has been changed.
    clusters = random_cluster_set(tiny_model, 0.4)
    del clusters.layers[1]
    with pytest.warns(UserWarning, match="stay dense"):
        model = sparsify(copy.deepcopy(tiny_model), clusters)
    activation = prove(model, [1, 2])
    assert activation == Activation(3, 2, ("cpu",), ("not in the artifact",))
    assert not activation.complete
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *call: None)
    with pytest.warns(UserWarning, match="hook"):
        activation = prove(model, [1, 2])
    assert activation.sparse_layers == 1
    assert activation.why_dense == ("patched", "not in the artifact")


def test_strict_refuses_to_start_where_a_layer_is_dense(run, folders):
    model, clusters = folders
    partial = random_cluster_set(make_tiny_model(), 0.4)
    del partial.layers[1]
    partial.save_pretrained(clusters)
    code, _, err = run(
        "serve", model, "--clusters", clusters, "--strict", "--dtype", "float32", "--port", 0
    )
    assert code == 1
    assert re.search(r"2 of 3 FFN layers run sparse on \w+ \(others: not in the artifact\)", err)
    assert "--strict expects all of them" in err


def test_the_model_needs_a_fast_tokenizer(make_served):
    served = make_served()
    with pytest.raises(SparseRuntimeError, match=r"tokenizer\.json"):
        type(served)("slow", served.model, object(), served.limits)


@pytest.mark.parametrize(
    "end", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_the_command_serves_and_ends_by_a_signal(folders, end):
    """A process of its own: start-up line, an answer, a stream that is told of the end, exit code."""
    model, clusters = folders
    command = (sys.executable, "-P", "-m", "sparse_runtime", "serve", model, "--clusters", clusters)
    options = ("--dtype", "float32", "--port", "0", "--max-new-tokens", "500", "--name", "tiny")
    environment = os.environ | {"SPARSE_RUNTIME_API_KEY": "secret"}
    with subprocess.Popen(
        (*command, *options), stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            lines = []
            while not (found := re.search(r"http://127\.0\.0\.1:\d+/v1", "".join(lines))):
                lines.append(process.stderr.readline())
                assert lines[-1], "".join(lines)
            assert re.search(r"tiny: 3 of 3 FFN layers run sparse on \w+", "".join(lines))
            client = openai.OpenAI(base_url=found[0], api_key="secret", max_retries=0)
            stream = client.completions.create(
                model="tiny", prompt="a", max_tokens=490, stream=True
            )
            next(iter(stream))
            process.send_signal(end)
            with suppress(openai.APIError):  # of the end; the answer may have been over by then
                list(stream)
            rest = process.stderr.read()
            assert process.wait(30) == (-15 if end == signal.SIGTERM else 130), rest
            assert "Traceback" not in rest
            with pytest.raises(httpx.ConnectError):
                httpx.get(found[0])
        finally:
            process.kill()
