# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels for NVIDIA cards of the given capabilities; prints shared memory.

A program of its own, because Triton either interprets or compiles for as long as it is imported.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from streaminator.engine import (
    gpu_kernels,
    gpu_products,
    gpu_sampling,
    paged_kernels,
    sampling_kernels,
)
from streaminator.engine.paged_attention import SPLIT, key_step, num_stages, tile_height

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
NUMBERS = {
    **dict.fromkeys(("parts", "log_sums", "qkv", "out"), "*fp32"),
    **dict.fromkeys(("tops", "totals", "logprobs", "top_probs"), "*fp32"),
    "log_totals": "*fp64",
    **dict.fromkeys(("rows", "positions", "table", "slots"), "*i64"),
    **dict.fromkeys(("groups", "keys_of", "candidates", "noise_keys", "tokens", "top_ids"), "*i64"),
    **dict.fromkeys(("scale", "softcap", "eps", "temperature"), "fp32"),
    **dict.fromkeys(("size", "num_top", "num_pieces"), "i32"),
}
"""Other arguments are of the model's type, or, if they are named so, integers."""
INTEGERS = ("_token", "_head", "_size", "_splits", "_inputs", "_outputs", "_rows", "_slots")
ALIGNED = ("_token", "_head", "_size", "_inputs", "_outputs")


def kind_of(name, dtype):
    if name in NUMBERS:
        return NUMBERS[name]
    is_integer = name.endswith(INTEGERS) or name in ("num_queries", "line", "num_blocks", "window")
    return "i32" if is_integer else "*" + NAMES[dtype]


def shared_memory(kernel, capability, dtype, num_warps, num_stages=2, **constants):
    signature = {
        name: "constexpr" if name in constants else kind_of(name, dtype)
        for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.endswith(ALIGNED)
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, places, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    return compiled.metadata.shared


def compile_paged(capability):
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
        stages = num_stages(dim, dtype)
        yield shared_memory(paged_kernels.attend, capability, dtype, 4, stages, **constants)


def compile_layers(capability):
    low, high = gpu_products._LOW_ROWS, gpu_products._HIGH_ROWS
    for dtype, rows, stages, has_bias in (
        (torch.bfloat16, low, 4, False),
        (torch.float16, high, 3, True),
    ):
        step = gpu_products._STEP_BYTES // dtype.itemsize
        constants = {"ROWS": rows, "OUTPUTS": 128, "STEP": step, "HAS_BIAS": has_bias}
        for sums in (False, True):
            yield shared_memory(
                gpu_kernels.multiply, capability, dtype, rows // 16, stages, **constants, SUMS=sums
            )
    bf16 = torch.bfloat16
    norm = {"D": 3072, "D_PADDED": 4096, "C": 6}
    yield shared_memory(gpu_kernels.add_norm, capability, bf16, 16, **norm)
    silu = {"D": 8192, "SIZE": 1024, "C": 1}
    yield shared_memory(gpu_kernels.silu_mul, capability, bf16, 4, **silu)
    rotate = {"N": 24, "K": 8, "H": 128, "HALF_PADDED": 64, "HEADS": 8, "HAS_NORMS": True, "C": 4}
    yield shared_memory(gpu_kernels.rotate, capability, bf16, 4, **rotate)


def compile_sampling(capability):
    bf16, groups = torch.bfloat16, {"GROUPS": 64, "GROUP": 64}
    yield shared_memory(sampling_kernels.scan, capability, bf16, 8, **groups)
    yield shared_memory(sampling_kernels.gather, capability, bf16, 8, **groups)
    constants = {"C": 64, "C_PADDED": 64, "P_PADDED": 32}
    for is_greedy in (False, True):
        flags = {"IS_GREEDY": is_greedy, "HAS_REST": not is_greedy}
        yield shared_memory(sampling_kernels.draw, capability, bf16, 1, **constants, **flags)
    rest = {"C": 64, "BLOCK": gpu_sampling._BLOCK}
    yield shared_memory(sampling_kernels.settle, capability, bf16, 16, **rest)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for compile_some in (compile_paged, compile_layers, compile_sampling):
            sys.stdout.write("".join(f"{used}\n" for used in compile_some(int(argument))))
