"""Whether a folder of packed weights holds what its config says, by the headers of its files alone."""

from __future__ import annotations

import ctypes
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparse_runtime.errors import ModelError
from sparse_runtime.ffn.plane_modules import BIASES, PlaneFFN, PlaneModule
from sparse_runtime.kernels.planes import PLANE_BITS, PlaneFormat
from sparse_runtime.printable import printable

_REMEDY = (
    "Save or download the folder again, or correct quantization_config in its config.json to what it "
    "was packed with"
)
_SUFFIX = ".safetensors"
_FLOATS = ("F16", "BF16", "F32", "F64")
# What no float model calls a tensor.
_OWN_NAMES = ("look", "count", "refine", "planes", *BIASES[1:])
# Of <sys/mman.h>: Python's mmap has it for its own mappings alone.
_DONTNEED = 4
# Of a header, as safetensors itself limits it.
_MOST_BYTES = 100_000_000


@dataclass(frozen=True)
class Found:
    """A tensor of a checkpoint: its file, dtype by safetensors' name, and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def check_packed_files(
    model: nn.Module, files: Iterable[str], prefix: str, renamed: Callable[[str], str]
) -> None:
    """Check that files hold all planes of a model, as bytes of the right sizes, and no others.

    Biases of packed FFNs are checked as floats.

    Args:
        model: with packed modules, on whatever device.
        files: of the checkpoint.
        prefix: of the base model (``model``), which a checkpoint may have or lack.
        renamed: gives the model's name for a checkpoint's, apart from the prefix.

    Raises:
        ModelError: they do not; the message names the tensor, what was found and what was expected.
    """
    found = {
        _bare(renamed(name), prefix): (name, tensor) for name, tensor in _tensors(files).items()
    }
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PlaneModule)}
    known = set()
    for module_name, module in packed.items():
        for plane, parameter in module._parameters.items():
            if parameter is None or plane == "bias":
                continue
            name = f"{module_name}.{plane}"
            known.add(_bare(name, prefix))
            floats, shape = plane in BIASES, list(parameter.shape)
            dtypes = _FLOATS if floats else ("U8",)
            wanted = f"F16, BF16 or F32 {shape}"
            if not floats:
                wanted = f"uint8 {shape} for {_title(module.format)}"
            if _bare(name, prefix) not in found:
                raise ModelError(
                    f"{name} is missing{_instead(module_name, found, prefix)}; expected "
                    f"{wanted}. {_REMEDY}"
                )
            tensor = found[_bare(name, prefix)][1]
            if tensor.dtype not in dtypes or tensor.shape != tuple(parameter.shape):
                raise ModelError(
                    f"{tensor.file}: {name} is {tensor.dtype} {list(tensor.shape)}"
                    f"{_other_bits(module, plane, tensor)}; expected {wanted}. {_REMEDY}"
                )
    modules = {_bare(name, prefix) for name, _ in model.named_modules()}
    for name in sorted(found.keys() - known):
        original, tensor = found[name]
        module_name, _, plane = name.rpartition(".")
        # A model may lack modules of the checkpoint, as a base model lacks the head.
        if module_name in modules and plane in _OWN_NAMES:
            raise ModelError(
                f"{tensor.file}: {printable(original)} is {tensor.dtype} {list(tensor.shape)}, but by "
                f"config.json there is no such tensor{_expected_formats(packed.values())}. {_REMEDY}"
            )


def check_float_files(
    files: Iterable[str], names: Iterable[str], prefix: str, renamed: Callable[[str], str]
) -> None:
    """Check that the weights that are to be packed are floats, and that the files are whole.

    transformers casts what it reads to the model's dtype, the codes of other formats too.

    Args:
        files: of the checkpoint; any but safetensors are left out.
        names: of the weights.
        prefix: of the base model, which a checkpoint may have or lack.
        renamed: gives the model's name for a checkpoint's, apart from the prefix.

    Raises:
        ModelError: a file is damaged, or a weight is something else.
    """
    wanted = {_bare(name, prefix) for name in names}
    for name, tensor in _tensors(f for f in files if f.endswith(_SUFFIX)).items():
        if _bare(renamed(name), prefix) in wanted and tensor.dtype not in _FLOATS:
            raise ModelError(
                f"{tensor.file}: {printable(name)} is {tensor.dtype}; expected F16, BF16 or F32. "
                "Weights of a quantized checkpoint are not rounded again; load the float one that it "
                "was made of"
            )


def release_pages(files: Iterable[str]) -> None:
    """Let pages of memory-mapped checkpoint files go, which the kernel would keep in our name.

    What was read of a shard counts as the process's memory for as long as one tensor of the shard
    lives; packing a model of 985 MB ended at 1.8 GB. Only on Linux, and only for mappings that nobody
    wrote to, so that whatever is read again comes from the file.
    """
    if not sys.platform.startswith("linux"):
        return
    names = {os.path.realpath(file) for file in files}
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        entries = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line, rest in re.findall(
        r"^([0-9a-f]+-[0-9a-f]+ .*)\n((?:\w+:.*\n)+)", entries, re.MULTILINE
    ):
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in names and re.search(r"^Anonymous: +0 kB$", rest, re.M):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


def _tensors(files: Iterable[str]) -> dict[str, Found]:
    tensors = {}
    for path in map(Path, files):
        if path.suffix != _SUFFIX:
            raise ModelError(
                f"{path} is no safetensors file; packed weights are read from those alone. Save the "
                "model again with save_pretrained"
            )
        for name, entry in _header(path).items():
            tensors[name] = Found(path, entry["dtype"], tuple(entry["shape"]))
    return tensors


def _header(file: Path) -> dict[str, Any]:
    """Entries of a safetensors file, whose data is all there."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MOST_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
            size = stream.seek(0, 2) - 8 - length
        header.pop("__metadata__", None)
        ends = {name: entry["data_offsets"][1] for name, entry in header.items()}
        for entry in header.values():
            entry["dtype"], entry["shape"][:]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(
            f"{file} is not a readable safetensors file, or is truncated: {printable(str(error))}. "
            f"{_REMEDY}"
        ) from error
    beyond = [name for name, end in ends.items() if end > size]
    if beyond:
        name = min(beyond, key=ends.__getitem__)
        raise ModelError(
            f"{file} is truncated: {printable(name)} ends at byte {ends[name]} of the data, of which "
            f"there are {size}. {_REMEDY}"
        )
    return header


def _bare(name: str, prefix: str) -> str:
    return name.removeprefix(f"{prefix}.")


def _title(form: PlaneFormat) -> str:
    return f"{form.bits} bits ({form})" if form.residual else f"{form.bits} bits"


def _instead(module: str, found: Mapping[str, tuple[str, Found]], prefix: str) -> str:
    """What stands where a module's planes are looked for: float weights, or a plane of it."""
    start = _bare(module, prefix) + "."
    others = [original for name, (original, _) in found.items() if name.startswith(start)]
    return f" (there is {printable(min(others))})" if others else ""


def _other_bits(module: PlaneModule, plane: str, tensor: Found) -> str:
    """Which formats a tensor of other sizes fits."""
    if tensor.dtype != "U8" or len(tensor.shape) != 2 or plane in BIASES:
        return ""
    fitting = []
    for bits in PLANE_BITS:
        form = PlaneFormat.of_bits(bits)
        if isinstance(module, PlaneFFN):
            size = module.record_sizes(form)[plane]
        else:
            size = form.linear_size(getattr(module, "in_features"))  # noqa: B009
        if tensor.shape[1] == size:
            fitting.append(str(bits))
    return f" (the size for {' or '.join(fitting)} bits)" if fitting else ""


def _expected_formats(modules: Iterable[PlaneModule]) -> str:
    formats = sorted({_title(module.format) for module in modules})
    return f" (it names {' and '.join(formats)})" if formats else ""
