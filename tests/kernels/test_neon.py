"""The Arm kernels, cross-compiled and run under an emulator; and the same check on this processor."""

import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "sparse_runtime" / "kernels" / "cpu" / "csrc"
CHECK = Path(__file__).with_name("check_isas.cpp")


def load_setup(monkeypatch):
    """setup.py as a module, for its lists of files and flags."""
    monkeypatch.setattr("setuptools.setup", lambda **unused: None)
    spec = importlib.util.spec_from_file_location("sparse_runtime_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_check(setup, tmp_path, compiler, emulator, machine):
    include = Path(torch.__file__).with_name("include")
    flags = [*setup.FLAGS, f"-DTORCH_TARGET_VERSION={setup.TORCH_TARGET_VERSION}"]
    flags += ["-O2", f"-I{include}", f"-I{SOURCES}"]
    objects = []
    for name, own_flags in {**setup.files_of_machine(machine), CHECK.name: []}.items():
        source = CHECK if name == CHECK.name else SOURCES / name
        output = tmp_path / f"{name}.o"
        subprocess.run([compiler, *flags, *own_flags, "-c", source, "-o", output], check=True)
        if name not in ("checks.cpp", "ops.cpp", "plane_ops.cpp"):  # these need torch
            objects.append(output)
    program = tmp_path / "check"
    subprocess.run([compiler, *objects, "-static", "-o", program], check=True)
    result = subprocess.run(
        [*emulator, program], capture_output=True, text=True, check=False, timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return {line.split()[0] for line in result.stdout.splitlines()}


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs an Arm cross-compiler and qemu-user (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_neon_under_an_emulator(monkeypatch, tmp_path):
    setup = load_setup(monkeypatch)
    isas = run_check(setup, tmp_path, "aarch64-linux-gnu-g++", ["qemu-aarch64"], "aarch64")
    assert isas == {"neondot", "neon", "scalar"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_check_itself_on_this_processor(monkeypatch, tmp_path):
    isas = run_check(load_setup(monkeypatch), tmp_path, "g++", [], platform.machine())
    assert "scalar" in isas
