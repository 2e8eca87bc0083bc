# SPDX-License-Identifier: Apache-2.0
"""The kernels of processors with narrower vectors than this one's, or no tile unit, which runs them as well."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from streaminator.engine.compile_kernels import KernelsMissingError, _compiler

HERE = Path(__file__).parent
LAYERS = [
    f"test_fused_layers.py::test_{name}"
    for name in (
        "fused_layers_in_bfloat16_are_near_plain_ones_in_float32[Llama]",
        "a_completion_does_not_depend_on_the_batch_in_either_type[Llama-bfloat16]",
        "fused_layers_give_the_text_that_plain_ones_do[Mistral, window-True]",
        "a_completion_does_not_depend_on_the_batch_in_either_type[Mistral, window-float32]",
    )
]
SAMPLING = [
    f"test_sampling_kernel.py::test_{name}"
    for name in (
        "equal_logits_are_told_apart_as_in_pytorch",
        "a_row_has_the_same_bits_alone_and_with_any_number_of_threads",
    )
]
NARROWER = {
    "amx_bf16": "-mno-amx-bf16",
    "avx512_bf16": "-mno-avx512bf16 -mno-amx-bf16",
    "avx512f": "-mno-avx512f -mno-amx-bf16",
    "avx": "-mno-avx -mno-amx-bf16",  # products are oneDNN's
}
"""What keeps the compiler from using what a processor has, by its name in /proc/cpuinfo."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86 compilers")
@pytest.mark.parametrize("feature", NARROWER)
def test_kernels_of_lesser_processors_are_exact(feature: str, tmp_path: Path) -> None:
    cpu = Path("/proc/cpuinfo")
    if cpu.exists() and f" {feature} " not in cpu.read_text(encoding="utf-8"):
        pytest.skip(f"this processor has no {feature}: all tests run what this one would")
    flags = NARROWER[feature]
    try:
        compiler = shlex.join(_compiler())
    except KernelsMissingError as error:
        pytest.skip(f"no compiled kernels: {error}")
    options = "-march=native -fsyntax-only -x c"
    command = shlex.split(f"{compiler} {flags} {options} {os.devnull}")
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler} does not know {flags}")
    env = os.environ | {"CC": f"{compiler} {flags}", "XDG_CACHE_HOME": str(tmp_path)}
    tests = [str(HERE / name) for name in LAYERS + SAMPLING]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env=env, cwd=HERE.parents[1], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]
    assert list((tmp_path / "streaminator").glob("kernels-*.so")), "nothing was compiled"
