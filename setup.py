"""Builds the C++ library of the CPU backend; everything else is in pyproject.toml.

The library is no Python extension module: it is loaded with ``torch.ops.load_library``, and torch's
stable ABI makes one file serve every Python and every torch from 2.10 on. If it cannot be built
(no compiler, no torch headers) the package is installed without it, with a warning.

Environment variables:
    TORCH_DIR: the folder of an installed torch, with its include and lib folders.
    CXX, CXXFLAGS, LDFLAGS: as usual.
    SPARSE_RUNTIME_REQUIRE_LIBRARY: if 1, fail where the library cannot be built.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = "sparse_runtime/kernels/cpu/csrc"
LIBRARY = "sparse_runtime.kernels.cpu.libsparse_ffn_cpu"
# The oldest torch that the library loads in: 2.10, the first with parallel_for in the stable ABI.
TORCH_TARGET_VERSION = "0x020a000000000000"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-DNDEBUG"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Each file with its own instruction set; dispatch.cpp chooses at run time.
COMMON_FILES: dict[str, list[str]] = {
    "checks.cpp": [],
    "dispatch.cpp": [],
    "experts.cpp": [],
    "ffn.cpp": [],
    "isa_scalar.cpp": [],
    "linear.cpp": [],
    "ops.cpp": [],
    "pass.cpp": [],
    "plane_ffn.cpp": [],
    "plane_linear.cpp": [],
    "plane_ops.cpp": [],
    "plane_pass.cpp": [],
}
X86_FILES = {
    "isa_avx2.cpp": AVX2,
    "isa_avx512.cpp": AVX512,
    "isa_avx512bf16.cpp": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
}
ARM_FILES: dict[str, list[str]] = {
    "isa_neon.cpp": [],
    "isa_neondot.cpp": ["-march=armv8.2-a+dotprod"],
}
HEADERS = sorted(path.name for path in (Path(__file__).parent / SOURCES).glob("*.h"))


def files_of_machine(machine: str) -> dict[str, list[str]]:
    """Source files for a processor architecture, with the flags each needs."""
    if machine in ("x86_64", "AMD64"):
        return COMMON_FILES | X86_FILES
    if machine in ("aarch64", "arm64"):
        return COMMON_FILES | ARM_FILES
    return COMMON_FILES


def find_torch() -> Path:
    """Find an installed torch without importing it.

    Under pip's build isolation the outer environment cannot be imported from, but it is still where
    the interpreter's paths say.
    """
    candidates = []
    if "TORCH_DIR" in os.environ:
        candidates.append(Path(os.environ["TORCH_DIR"]))
    else:
        spec = importlib.util.find_spec("torch")
        if spec and spec.submodule_search_locations:
            candidates += [Path(folder) for folder in spec.submodule_search_locations]
        folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
        folders += [*site.getsitepackages(), site.getusersitepackages()]
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        for prefix in (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX")):
            if prefix:
                folders.append(str(Path(prefix) / "lib" / version / "site-packages"))
        candidates += [Path(folder) / "torch" for folder in dict.fromkeys(folders)]
    for candidate in candidates:
        if (candidate / "include" / "torch" / "csrc" / "stable" / "c" / "shim.h").is_file():
            return candidate
    looked_in = ", ".join(map(str, candidates))
    raise CompileError(f"no torch >= 2.10 with headers found in {looked_in}; set TORCH_DIR")


class BuildLibrary(build_ext):
    """Compiles the library by calling the compiler directly."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the file without Python's ABI tag."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; raise CompileError with one clear line where that fails."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        if sys.platform not in ("linux", "darwin"):
            raise CompileError(f"the CPU library is not built on {sys.platform}")
        if shutil.which(compiler[0]) is None:
            raise CompileError(f"no C++ compiler: {compiler[0]} not found; install one or set CXX")
        torch = find_torch()
        objects_folder = Path(self.build_temp) / "sparse_ffn_cpu"
        objects_folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = [
            *FLAGS,
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            f"-I{torch / 'include'}",
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]

        def compile_file(item: tuple[str, list[str]]) -> str:
            name, own_flags = item
            output = str(objects_folder / f"{name}.o")
            run([*compiler, *flags, *own_flags, "-c", f"{SOURCES}/{name}", "-o", output])
            return output

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_file, files_of_machine(platform.machine()).items()))
        link = ["-shared", "-o", str(target), *objects, f"-L{torch / 'lib'}", "-ltorch_cpu"]
        run([*compiler, *link, *shlex.split(os.environ.get("LDFLAGS", ""))])


def run(command: list[str]) -> None:
    """Run a compiler; on failure raise CompileError with the end of what it printed."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CompileError(f"{shlex.join(command)} failed:\n{result.stderr[-4000:]}")


class Wheel(bdist_wheel):
    """Tags the wheel py3-none-PLATFORM: the library does not depend on Python's version or ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        """Tag for any Python 3, and for this platform only if the library is inside."""
        built = Path(self.get_finalized_command("build").build_lib, *LIBRARY.split("."))
        name = super().get_tag()[2] if built.with_suffix(".so").is_file() else "any"
        return "py3", "none", name


setup(
    # The sources belong into the source distribution only.
    include_package_data=False,
    ext_modules=[
        Extension(
            LIBRARY,
            sources=[f"{SOURCES}/{name}" for name in COMMON_FILES | X86_FILES | ARM_FILES],
            depends=[f"{SOURCES}/{name}" for name in HEADERS],
            optional=os.environ.get("SPARSE_RUNTIME_REQUIRE_LIBRARY") != "1",
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
