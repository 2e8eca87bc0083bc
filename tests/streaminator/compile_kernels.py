# SPDX-License-Identifier: Apache-2.0
"""Compile the paged kernels for NVIDIA cards of the given capabilities; prints shared memory.

A program of its own, because Triton either interprets or compiles for as long as it is imported.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from streaminator.engine import paged_kernels
from streaminator.engine.paged_attention import SPLIT, key_step, tile_height

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FLOATS = ("output", "queries", "keys", "values", "own_keys", "own_values")


def shared_memory(kernel, capability, dtype, num_warps, **constants):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOATS:
            signature[name] = "*" + NAMES[dtype]
        elif name in ("parts", "log_sums"):
            signature[name] = "*fp32"
        elif name in ("rows", "positions", "table"):
            signature[name] = "*i64"
        else:
            signature[name] = "fp32" if name in ("scale", "softcap") else "i32"
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.endswith(("_token", "_head"))
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, places, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": 2},
    )
    return compiled.metadata.shared


def compile_all(capability):
    merge = {"N": 32, "V": 128, "V_PADDED": 128, "SPLIT": SPLIT}
    yield shared_memory(paged_kernels.merge, capability, torch.bfloat16, 1, **merge)
    for dtype, num_groups, dim, padded, has_own, has_softcap in (
        (torch.bfloat16, 4, 128, 128, False, False),
        (torch.bfloat16, 4, 128, 128, True, True),
        (torch.float16, 1, 80, 128, False, False),
        (torch.float32, 4, 128, 128, False, False),
    ):
        constants = {
            "K": 8, "G": num_groups, "S": 16, "H": dim, "V": dim,
            "H_PADDED": padded, "V_PADDED": padded, "SPLIT": SPLIT,
            "TILE": tile_height(num_groups, dim, dtype), "STEP": key_step(dim, dtype),
            "HAS_SOFTCAP": has_softcap, "HAS_OWN": has_own,
        }  # fmt: skip
        yield shared_memory(paged_kernels.attend, capability, dtype, 4, **constants)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        sys.stdout.write("".join(f"{used}\n" for used in compile_all(int(argument))))
