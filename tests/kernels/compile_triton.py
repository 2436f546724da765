"""Compile every Triton kernel for a card that need not be there; run by test_triton_compiles.py.

python compile_triton.py floats|planes CAPABILITY [DTYPE…], such as floats 90 bf16. Prints a line for
each kernel and version: name, H where it is compiled in or 0, dtype, bytes of machine code, loads of 16
bytes.
"""

import itertools
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_runtime.kernels.triton import kernels, look_kernel, plane_kernels, plane_row_kernels
from sparse_runtime.kernels.triton.config import TritonConfig

CONFIG = TritonConfig()
# What each parameter is, by name; the rest are pointers to weights.
POINTERS = {
    "ids": "*i64", "cluster_counts": "*i64", "row_counts": "*i64", "rows": "*i32", "count": "*i32",
    "counters": "*i32", "counter": "*i32", "projected": "*fp32", "partial": "*fp32",
    "factors": "*fp32", "cluster_weights": "*fp32", "sets": "*u8", "maybe_sets": "*u8", "member": "*u8",
    "finer_parts": "*fp32", "look": "*u8", "count_records": "*u8", "refine": "*u8", "records": "*u8",
    "gate_bias": "*fp32", "up_bias": "*fp32", "tau": "fp32", "width": "fp32",
}  # fmt: skip
INTEGERS = ("H", "K", "n", "neurons", "set_bytes", "record_bytes", "total", "num_rows",
            "base_stride", "rest_stride", "scales_stride")  # fmt: skip


def variants(**choices):
    return [
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]


ROUTE = [
    {
        **flags, "RANK": rank, "PADDED_RANK": max(1, rank), "BLOCK_R": CONFIG.route_rows,
        "BLOCK_H": CONFIG.route_hidden, "BLOCK_K": CONFIG.route_clusters,
    }
    for rank in (0, 128)
    for flags in variants(CORRECTION=[0, 16], LISTED=[False, True], COUNTED=[True])
]  # fmt: skip
# With a gate and without biases, and the reverse.
FORMS = [{"GATED": gated, "GATE_BIASED": not gated, "UP_BIASED": False} for gated in (True, False)]
LOOK = [
    {
        **flags, **FORMS[flags["VERIFY"]], "WEIGHTED": flags["VERIFY"], "BASE": 4,
        "BLOCK_I": CONFIG.look_rows, "CODES": tl.bfloat16,
    }
    for flags in variants(
        H=[4096, 896],
        VERIFY=[False, True],
        LISTED=[False, True],
        COUNTED=[True],
        ACTIVATION=["silu"],
    )
]  # fmt: skip
FINISH = {"BIASED": True, "CORRECTION": 16}
MANY = {"TOKENS": 16, "WIDEN": False, "BLOCK_R": CONFIG.many_rows}
# Planes: one token and several, Mistral's rows and rows whose last unit has two groups.
PLANES = [
    {"H": size, "BASE": base, "RESIDUAL": residual, "TOKENS": tokens, "PRECISION": "tf32"}
    for size, base, residual, tokens in ((4096, 3, 2, 1), (4096, 4, 2, 16), (896, 4, 4, 1))
]
PLANE_KERNELS = {
    "plane_gate_up_kernel": [
        {
            **plane, **form, "ACTIVATION": "silu", "CLUSTERED": staged, "STAGED": staged,
            "RAMP": staged, "WEIGHTED": staged, "CODES": tl.bfloat16,
            "BLOCK_I": CONFIG.look_rows if form["GATED"] else 2 * CONFIG.look_rows,
        }
        for plane, staged in zip([*PLANES, PLANES[0]], [True, True, True, False], strict=True)
        for form in FORMS
    ],
    "plane_down_kernel": [
        {
            **plane, **FINISH, "LISTED": plane["TOKENS"] == 1, "SPLITS": CONFIG.down_splits,
            "BLOCK_R": 2 * CONFIG.down_rows, "GATED": gated,
            "STAGES": CONFIG.down_stages,
        }
        for plane in PLANES
        for gated in (True, False)
    ],
    "plane_linear_kernel": [
        {**plane, "BIASED": True, "BLOCK_R": CONFIG.linear_rows, "CODES": tl.bfloat16}
        for plane in PLANES
    ],
    "plane_values_kernel": [
        {name: plane[name] for name in ("H", "BASE", "RESIDUAL")} | {"BLOCK_R": 16}
        for plane in PLANES
    ],
}  # fmt: skip
KERNELS = {
    "list_kernel": [{"COUNTED": True}],
    "route_kernel": ROUTE,
    "look_kernel": LOOK,
    "gate_up_one_kernel": [
        {**form, "ACTIVATION": name, "BLOCK_R": CONFIG.gate_rows, "BLOCK_H": CONFIG.gate_hidden}
        for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2")
        for form in FORMS
    ],
    "down_one_kernel": [
        {
            **FINISH, "SPLITS": CONFIG.down_splits, "BLOCK_R": CONFIG.down_rows,
            "BLOCK_H": CONFIG.down_hidden, "STAGES": CONFIG.down_stages,
        }
    ],
    "gate_up_many_kernel": [
        {**MANY, **form, "ACTIVATION": "silu", "BLOCK_H": CONFIG.many_hidden} for form in FORMS
    ],
    "down_many_kernel": [
        {**MANY, **FINISH, "SPLITS": CONFIG.many_splits, "BLOCK_H": CONFIG.many_outputs}
    ],
}  # fmt: skip


# Of a program; 4 where it is not said.
WARPS = {"plane_linear_kernel": CONFIG.linear_warps}


def compile_kernel(name, constants, dtype, target):
    modules = (look_kernel, plane_row_kernels, plane_kernels, kernels)
    kernel = getattr(next(m for m in modules if hasattr(m, name)), name)
    given = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    assert given == constants.keys(), (name, given ^ constants.keys())
    wide = name in PLANE_KERNELS or name.endswith("one_kernel")
    signature, attributes = {}, {}
    for position, parameter in enumerate(kernel.arg_names):
        if parameter in constants:
            signature[parameter] = "constexpr"
            continue
        kind = POINTERS.get(parameter, f"*{dtype}")
        if parameter == "activations" and wide:
            kind = "*fp32"
        signature[parameter] = "i32" if parameter in INTEGERS else kind
        # As at Mistral's shape: pointers and sizes are multiples of 16.
        if parameter not in ("n", "total", "counters", "counter", "tau", "width"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": WARPS.get(name, 4)})


def main():
    weights, capability, *dtypes = sys.argv[1:]
    target = GPUTarget("cuda", int(capability), 32)
    for dtype in dtypes or ["bf16"]:
        for name, versions in (PLANE_KERNELS if weights == "planes" else KERNELS).items():
            for constants in versions:
                compiled = compile_kernel(name, constants, dtype, target)
                loads = re.findall(
                    r"ld\.global[.\w:]*\.v4\.b32|cp\.async\.cg.*, 0x10", compiled.asm["ptx"]
                )
                print(name, constants.get("H", 0), dtype, len(compiled.asm["cubin"]), len(loads))


if __name__ == "__main__":
    main()
