"""Import names are the same however the package is installed, and layers do not reach upward."""

import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_wheel_holds_one_import_package(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", "-q", "-w", tmp_path],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"sparse_runtime"}
    for module in (
        "cli/app",
        "kernels/op",
        "clusters/awc",
        "predictors/routers",
        "eval/latency/mlp",
    ):
        assert f"sparse_runtime/{module}.py" in names
    assert "sparse_runtime/eval/report/page.html" in names

    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", wheel, "--no-deps", "-q", "--target", target],
        check=True,
    )
    code = (
        "import sparse_runtime, sparse_runtime.clusters; "
        "import sparse_runtime.eval.quality.artifact_quality as q; "
        "print(sparse_runtime.__file__, q.__file__)"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(path.startswith(str(target)) for path in result.stdout.split())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="manylinux is Linux's")
@pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("make", "g++")), reason="needs make and g++"
)
def test_make_wheel(tmp_path):
    """The wheel that is published: its tag, its library, and the kernels once it is installed."""
    folder = Path(sys.executable).parent
    # -o: this environment is good as it is, nothing is to be installed into it.
    command = ["make", "-o", ".venv/.installed", "wheel", f"DIST={tmp_path}", f"BIN={folder}"]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    platform_tag = f"manylinux_2_28_{platform.machine()}"
    assert wheel.name.endswith(f"-py3-none-{platform_tag}.whl")
    archive = zipfile.ZipFile(wheel)
    (info,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
    metadata = archive.read(info).decode()
    assert f"Tag: py3-none-{platform_tag}" in metadata
    assert "Root-Is-Purelib: false" in metadata
    libraries = [name for name in archive.namelist() if ".so" in name]
    assert libraries == ["sparse_runtime/kernels/cpu/libsparse_ffn_cpu.so"]
    assert not [name for name in archive.namelist() if "csrc" in name or ".libs/" in name]

    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", wheel, "--no-deps", "-q", "--target", target],
        check=True,
    )
    code = (
        "import torch; from sparse_runtime.kernels.cpu import library as cpu; "
        "assert cpu.load_cpu_library(); "
        "ones = torch.ones(2, 8); ops = torch.ops.sparse_runtime; "
        "assert torch.equal(ops.cpu_linear(ones, ones, None), torch.full((2, 2), 8.0)); "
        "print(cpu.LIBRARY, ops.cpu_isa())"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    library, isa = result.stdout.split()
    assert library.startswith(str(target))
    assert isa in ("avx512bf16", "avx512", "avx2", "neondot", "neon", "scalar")


def test_import_changes_nothing():
    code = """
import os, torch
before = (torch.get_num_threads(), dict(os.environ))
import sparse_runtime, sys
assert (torch.get_num_threads(), dict(os.environ)) == before
assert not torch.cuda.is_initialized()
assert not [m for m in sys.modules if m.startswith(("sparse_runtime.clusters", "sparse_runtime.eval"))]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_runs_without_triton_and_other_extras():
    """As on macOS and Windows, and as installed without extras."""
    code = """
import sys
sys.path.insert(0, "tests")
for name in ("triton", "matplotlib", "lm_eval", "playwright", "gguf", "fastapi"):
    sys.modules[name] = None
import pytest, torch
from helpers import make_tiny_model, random_cluster_set
from sparse_runtime import sparsify, sparse_modules
from sparse_runtime.errors import BackendUnavailableError
import sparse_runtime.cli, sparse_runtime.eval.latency.bench, sparse_runtime.eval.report.page
model = make_tiny_model()
clusters = random_cluster_set(model, 0.4)
sparsify(model, clusters)
with torch.inference_mode():
    model(torch.tensor([[3]]))
assert sum(int(m.cluster_counts.sum()) + int(m.dense_counts.sum()) for m in sparse_modules(model)) == 3
with pytest.raises(BackendUnavailableError, match="cannot be imported .*; pip install triton"):
    sparsify(make_tiny_model(), clusters, backend="triton")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
