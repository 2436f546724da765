"""Builds by several processes: the artifact of one, and errors that reach all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparse_runtime.clusters.ranks import Ranks, in_order, joined

OPTIONS = (
    "--clusters", 6, "--window", 50, "--max-tokens", 2000, "--router", "auto", "--budget", 0.7,
    "--dtype", "float32",
)  # fmt: skip


def start(folder, text, output, count, *options, port=29_400):
    """Start the processes of one build."""
    command = [
        sys.executable,
        "-m",
        "sparse_runtime",
        "build",
        folder,
        "-o",
        output,
        "--data",
        text,
    ]
    command = [str(part) for part in (*command, *OPTIONS, *options)]
    places = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port + os.getpid() % 2000),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            command,
            env=os.environ | places | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def finish(processes):
    found = [process.communicate(timeout=240)[0] for process in processes]
    return [process.returncode for process in processes], found


def test_shares_of_items_and_rows():
    ranks = [Ranks(rank, 3) for rank in range(3)]
    items = [*range(8)]
    assert in_order([one.mine(items) for one in ranks]) == items
    assert joined([items[one.rows(8).start : one.rows(8).stop] for one in ranks]) == items
    assert joined([[*one.rows(2)] for one in ranks]) == [0, 1]
    alone = Ranks.current()
    assert (alone.gather(5), alone.by_first(lambda: 6), alone.together(lambda: 7)) == ([5], 6, [7])


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_artifact_is_that_of_one_process(tiny_folder, text, tmp_path, count):
    codes, logs = finish(start(tiny_folder, text, tmp_path / "one", 1))
    assert codes == [0], logs
    codes, logs = finish(start(tiny_folder, text, tmp_path / "many", count, port=31_500))
    assert codes == [0] * count, logs
    assert logs[1] == ""
    for name in ("clusters.safetensors", "centroids.safetensors"):
        one, many = (load_file(tmp_path / folder / name) for folder in ("one", "many"))
        assert one.keys() == many.keys()
        for key, tensor in one.items():
            if tensor.dtype == torch.uint8:
                differing = (tensor ^ many[key]).count_nonzero() / tensor.numel()
                assert differing < 0.01, key
            else:
                torch.testing.assert_close(many[key], tensor, rtol=2e-2, atol=2e-3)
    records = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "many")
    ]
    assert records[0]["build"]["data"] == records[1]["build"]["data"]
    assert not (tmp_path / "many" / ".build").exists()


def test_settings_that_differ_are_refused_by_all(tiny_folder, text, tmp_path):
    processes = start(tiny_folder, text, tmp_path / "x", 2, port=33_600)
    processes[1].kill()
    processes[1].communicate()
    other = start(tiny_folder, text, tmp_path / "x", 2, "--seed", 1, port=33_600)
    other[0].kill()
    other[0].communicate()
    codes, logs = finish([processes[0], other[1]])
    assert all(codes)
    assert "seed is 1 in process 1 and 0 in the first" in logs[0]
    assert "Traceback" not in logs[0]


def test_a_process_that_dies_leaves_a_state_to_go_on_from(tiny_folder, text, tmp_path):
    output = tmp_path / "clusters"
    processes = start(tiny_folder, text, output, 2, port=35_700)
    deadline = time.monotonic() + 120
    while not list(output.glob(".build/fisher/layer_*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    codes, logs = finish(processes)
    assert codes[0] != 0, logs
    assert not (output / "config.json").exists()
    assert list(Path(output).glob(".build/fisher/layer_*"))
    codes, logs = finish(start(tiny_folder, text, output, 2, port=37_800))
    assert codes == [0, 0], logs
    assert (output / "config.json").exists()
