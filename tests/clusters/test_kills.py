"""A build that is killed again and again ends in the artifact of one that never was, byte for byte."""

import os
import random
import subprocess
import sys
import time

import pytest

# Each start takes seconds; before a release: BUILD_KILLS=200.
KILLS = int(os.environ.get("BUILD_KILLS", "12"))
OPTIONS = (
    "--clusters", 6, "--window", 50, "--max-tokens", 2000, "--router", 2, "--budget", 0.7,
    "--distill", 2, "--dtype", "float32",
)  # fmt: skip


@pytest.mark.slow
def test_killed_at_any_moment(tiny_folder, text, tmp_path):
    def start(output):
        command = [sys.executable, "-m", "sparse_runtime", "build", tiny_folder, "-o", output]
        command += ["--data", text, *OPTIONS]
        return subprocess.Popen(
            [*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    began = time.monotonic()
    assert start(tmp_path / "whole").wait(timeout=120) == 0
    whole = time.monotonic() - began
    expected = {
        file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir() if file.is_file()
    }
    assert len(expected) >= 3
    kills = number = 0
    moments = random.Random(0)
    while kills < KILLS:
        number += 1
        output = tmp_path / str(number)
        while True:
            process = start(output)
            try:
                code = process.wait(timeout=moments.uniform(0.3, 1.0) * whole)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                # Nothing that loads is there before it is whole.
                assert not (output / "config.json").exists() or {
                    file.name for file in output.iterdir() if file.is_file()
                } >= set(expected)
                continue
            assert code == 0
            break
        found = {file.name: file.read_bytes() for file in output.iterdir() if file.is_file()}
        assert found == expected
        assert not (output / ".build").exists()
