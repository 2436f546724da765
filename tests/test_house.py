"""The house: every arrow points down, and every room can be taken in at a glance."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Folder on disk -> package that it is imported as.
PACKAGES = {
    "sparse_runtime": "sparse_runtime",
    "clusters": "sparse_runtime.clusters",
    "predictors": "sparse_runtime.predictors",
    "eval": "sparse_runtime.eval",
}
#: From the ground up; what stands in one line may not import each other.
FLOORS = (
    "version errors progress printable",
    "files hub cost",
    "kernels",
    "models config",
    "artifact",
    "ffn",
    "api attention",
    "compiled generation",
    "serve",
    "predictors",
    "clusters",
    "eval",
    "cli",
)
# A package's face imports what it shows; nothing of this project may import it.
FACE = {"sparse_runtime", "sparse_runtime.__main__"}
MOST_LINES = 450
MOST_LINES_OF_A_FUNCTION = 80


def modules():
    """Name -> file of every module of the package."""
    found = {}
    for folder, package in PACKAGES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = file
    return found


MODULES = modules()


def imports(name):
    """Modules of this project that one imports, where it is loaded or later."""
    result = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            result |= {
                full if (full := f"{node.module}.{alias.name}") in MODULES else node.module
                for alias in node.names
            }
    return {target for target in result if target in MODULES and target != name}


def floor(name):
    room = name.split(".")[1]
    for number, rooms in enumerate(FLOORS):
        if room in rooms.split():
            return number, room
    raise AssertionError(f"{name} has no floor: put its room {room!r} into FLOORS")


def test_every_arrow_points_down():
    wrong = []
    for name in sorted(set(MODULES) - FACE):
        level, room = floor(name)
        for target in sorted(imports(name)):
            if target in FACE:
                wrong.append(f"{name} imports the package's face, {target}")
                continue
            other, other_room = floor(target)
            if other > level or (other == level and other_room != room):
                wrong.append(f"{name} imports {target}, which is not below it")
    assert not wrong, "\n".join(wrong)


def test_no_circle():
    """Not even among the modules of one room."""
    graph = {name: sorted(imports(name)) for name in MODULES}
    done, path = set(), []

    def visit(name):
        if name in path:
            raise AssertionError(" → ".join([*path[path.index(name) :], name]))
        if name in done:
            return
        path.append(name)
        for target in graph[name]:
            visit(target)
        path.pop()
        done.add(name)

    for name in sorted(graph):
        visit(name)


def tracked(*patterns):
    listed = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [file for file in map(ROOT.joinpath, listed.stdout.split()) if file.exists()]


def test_every_file_fits_in_the_head():
    long = {
        str(file.relative_to(ROOT)): lines
        for file in tracked("*.py", "*.cpp", "*.h")
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert not long, f"over {MOST_LINES} lines: {long}"


def test_every_function_fits_on_a_screen():
    long = []
    for file in tracked("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{file.relative_to(ROOT)}: {node.name}, {lines} lines")
    assert not long, "\n".join(long)


def test_the_rules_would_notice(monkeypatch, tmp_path):
    """An import upward and a circle, both in words that name the two files."""
    up, other = tmp_path / "errors.py", tmp_path / "files.py"
    up.write_text("def f():\n    from sparse_runtime.api import sparsify\n")
    monkeypatch.setitem(MODULES, "sparse_runtime.errors", up)
    with pytest.raises(AssertionError, match=r"sparse_runtime\.errors imports sparse_runtime\.api"):
        test_every_arrow_points_down()
    up.write_text("import sparse_runtime.files\n")
    other.write_text("from sparse_runtime import errors\n")
    monkeypatch.setitem(MODULES, "sparse_runtime.files", other)
    with pytest.raises(AssertionError, match=r"errors → sparse_runtime\.files → .*errors"):
        test_no_circle()
