"""The Triton kernels through the real compiler, down to machine code: no GPU is needed for that.

The interpreter takes what the compiler does not, such as variables that change their type in a loop.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_triton.py")
#: Kernels that read whole rows.
READERS = {"route_kernel", "gate_up_one_kernel", "down_one_kernel", "gate_up_many_kernel",
           "down_many_kernel"}  # fmt: skip


def compiled(tmp_path, *arguments):
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    run = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [
        (name, int(row), dtype, int(size), int(loads))
        for name, row, dtype, size, loads in map(str.split, run.stdout.splitlines())
    ]


def test_hopper(tmp_path):
    lines = compiled(tmp_path, "floats", "90", "bf16")
    assert {name for name, *_ in lines} == READERS | {"list_kernel", "look_kernel"}
    for name, _, _, size, loads in lines:
        assert size > 1000, name
        assert loads > 0 or name not in READERS, f"{name} does not read 16 bytes at a time"


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "89", "100", "120"])
def test_other_cards_and_dtypes(tmp_path, capability):
    lines = compiled(tmp_path, "floats", capability, "bf16", "fp16", "fp32")
    assert {dtype for _, _, dtype, *_ in lines} == {"bf16", "fp16", "fp32"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90", "120"])
def test_planes(tmp_path, capability):
    lines = compiled(tmp_path, "planes", capability, "bf16")
    assert {name for name, *_ in lines} == {
        "plane_gate_up_kernel", "plane_down_kernel", "plane_linear_kernel", "plane_values_kernel"
    }  # fmt: skip
    for name, row, _, size, loads in lines:
        assert size > 1000, name
        # Records of other rows are at multiples of fewer bytes.
        assert loads > 0 or row != 4096, f"{name} does not read 16 bytes at a time"
