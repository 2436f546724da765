"""Import names are the same however the package is installed, and layers do not reach upward."""

import ast
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
    for module in ("cli", "kernels/op", "clusters/awc", "predictors/routers", "eval/quality"):
        assert f"sparse_runtime/{module}.py" in names

    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", wheel, "--no-deps", "-q", "--target", target],
        check=True,
    )
    code = (
        "import sparse_runtime, sparse_runtime.clusters, sparse_runtime.eval.quality as q; "
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


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("sparse_runtime", ("sparse_runtime.clusters", "sparse_runtime.eval")),
        ("predictors", ("sparse_runtime.clusters", "sparse_runtime.eval")),
        ("clusters", ("sparse_runtime.eval",)),
    ],
)
def test_no_import_against_the_flow_of_data(folder, forbidden):
    files = [file for file in (ROOT / folder).rglob("*.py") if file.name != "cli.py"]
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not [n for n in names if n.startswith(forbidden)], f"{file} imports {names}"


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
